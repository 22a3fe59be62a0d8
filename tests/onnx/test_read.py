import logging
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.io import load, save
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import batch_norm, bn_model, example, from_proto, in_function, model, parameters, run


def write(path, proto):
    path.write_bytes(proto.SerializeToString() if not isinstance(proto, bytes) else proto)
    return path


def wide_model():
    """A convolution of 64 KiB, before a norm."""
    arrays = parameters(128, prefix="bn") | {"conv.weight": np.ones((128, 128, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv"),
        batch_norm(("c", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")),
    ]
    return model(nodes, arrays, x=("n", 128, 4, 4))


@pytest.fixture
def external(tmp_path):
    """The file of a model with external data."""
    return save(from_proto(wide_model()), tmp_path / "m.onnx", external_data_threshold=10_000)


def test_a_model_comes_back_as_it_was(tmp_path):
    proto = bn_model(conv=True)
    file = save(load(write(tmp_path / "in.onnx", proto)), tmp_path / "out.onnx")
    assert onnx.load(file) == ir.to_proto(from_proto(proto))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_nodes_in_any_order_are_sorted(tmp_path):
    """Converters to float16 that keep the types of inputs and outputs append the casts at the end."""
    nodes = [
        batch_norm(("a", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), "b"),
        helper.make_node("Cast", ["b"], ["y"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["a"], to=onnx.TensorProto.FLOAT16),
    ]
    proto = model(nodes, parameters(dtype=np.float16))
    graph = load(write(tmp_path / "m.onnx", proto))
    assert [node.op_type for node in graph.graph] == ["Cast", "BatchNormalization", "Cast"]
    assert len(inventory(graph).norm_layers) == 1
    assert run(graph, example(2, 6, 5, 4)).shape == (2, 6, 5, 4)
    del proto.graph.node[2]  # then nothing computes what the norm reads
    with pytest.raises(BnpatchError, match="not a valid ONNX model"):
        load(write(tmp_path / "m.onnx", proto))


def test_functions_with_norms_are_inlined(tmp_path):
    graph = load(write(tmp_path / "m.onnx", in_function()))
    assert [norm_layer.name for norm_layer in inventory(graph).norm_layers] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" * 9, "not an ONNX model"),
        (b"hello", "not an ONNX model"),
        (bn_model().SerializeToString()[:-40], "truncated"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "not an ONNX model"),
        (bn_model(opset=6), "opset 6; supported are 7 to"),
        (bn_model(opset=999), "install a newer onnx"),
        (model([helper.make_node("Relu", ["nowhere"], ["y"])]), "not a valid ONNX model"),
        (model([helper.make_node("BatchNormalization", ["x"], ["y"])]), "not a valid ONNX model"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    with pytest.raises(BnpatchError, match=expected) as caught:
        load(write(tmp_path / "m.onnx", content))
    assert "m.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_libraries_print_nothing_of_a_damaged_graph(tmp_path, monkeypatch, capsys, caplog):
    """Where nobody has set up logging; where somebody has, as pytest does, the records are there."""

    def fails(*args, **options):
        raise RuntimeError("no shapes today")

    caplog.set_level(logging.WARNING)  # also after a test of the command line, which disables warnings
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fails)
    proto = bn_model()
    file = write(tmp_path / "m.onnx", proto)
    proto.graph.node[0].input[0] = "nowhere"
    damaged = write(tmp_path / "damaged.onnx", proto)
    for handlers in ([], logging.root.handlers):
        with monkeypatch.context() as patch:
            patch.setattr(logging.root, "handlers", handlers)
            inventory(load(file))
            with pytest.raises(BnpatchError, match="not a valid ONNX model"):
                load(damaged)
        assert capsys.readouterr().err == ""
    for text in ("Shape inference failed", "no shapes today", "cannot be found in any scope"):
        assert caplog.text.count(text) > 0


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(BnpatchError, match=r"cannot read .*none\.onnx: no such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(BnpatchError, match=r"cannot read .*: not a regular file"):
        load(tmp_path)


def test_no_standard_opset(tmp_path):
    proto = bn_model()
    proto.opset_import[0].domain = "com.example"
    with pytest.raises(BnpatchError, match="does not say which opset"):
        load(write(tmp_path / "m.onnx", proto))


def test_external_data_over_a_threshold(external):
    assert sorted(p.name for p in external.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert external.stat().st_size < 20_000
    graph = load(external)
    rewrite(graph, PatchWeights({"bn": 0.3}))
    one = save(graph, external.parent / "one.onnx")
    two = save(graph, external.parent / "two.onnx", external_data_threshold=10_000)
    x = example(2, 128, 4, 4)
    s = [onnx_session(file) for file in (one, two)]
    np.testing.assert_array_equal(*(each.run(None, {"x": x})[0] for each in s))
    assert (external.parent / "two.onnx.data").exists()
    assert not (external.parent / "one.onnx.data").exists()
    memory = from_proto(wide_model())
    rewrite(memory, PatchWeights({"bn": 0.3}))
    np.testing.assert_array_equal(s[0].run(None, {"x": x})[0], run(memory, x))


def onnx_session(file):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_a_file_with_external_data_is_written_over_itself(external):
    x = example(2, 128, 4, 4)
    before = onnx_session(external).run(None, {"x": x})[0]
    save(load(external), external, external_data_threshold=10_000)
    np.testing.assert_array_equal(onnx_session(external).run(None, {"x": x})[0], before)


def test_external_data_in_attributes_come_along(tmp_path):
    array = np.arange(6, dtype=np.float32)
    (tmp_path / "c.bin").write_bytes(array.tobytes())
    tensor = numpy_helper.from_array(array, "t")
    onnx.external_data_helper.set_external_data(tensor, "c.bin")
    tensor.ClearField("raw_data")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        batch_norm(("x", "w", "bn.bias", "bn.running_mean", "bn.running_var")),
    ]
    graph = load(write(tmp_path / "m.onnx", model(nodes, parameters())))
    np.testing.assert_array_equal(inventory(graph).norm_layers[0].weight, array)
    (tmp_path / "else").mkdir()
    file = save(graph, tmp_path / "else" / "m.onnx")
    assert onnx_session(file).run(None, {"x": example(1, 6, 5, 4)})[0].shape == (1, 6, 5, 4)


def test_missing_external_data(external):
    (external.parent / "m.onnx.data").unlink()
    with pytest.raises(BnpatchError, match=r"'m\.onnx\.data' of .* does not exist; put it beside"):
        load(external)


def test_short_external_data(external):
    data = external.parent / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(BnpatchError, match="is too short; fetch it again"):
        load(external)


def relocated(external, location):
    proto = onnx.load(external, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(proto.SerializeToString())


def test_external_data_outside_the_folder(external, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    moved = inner / "m.onnx"
    external.rename(moved)
    relocated(moved, "../m.onnx.data")
    with pytest.raises(BnpatchError, match="outside the base directory"):
        load(moved)
    relocated(moved, str(tmp_path / "m.onnx.data"))
    with pytest.raises(BnpatchError, match=r"m\.onnx"):
        load(moved)


def test_a_bare_file_name_is_checked_like_a_path(external, tmp_path):
    """onnx-ir skips its checks where the path has no folder in it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    external.rename(inner / "m.onnx")
    relocated(inner / "m.onnx", "../m.onnx.data")
    program = "from bnpatch.onnx.io import load; load('m.onnx')"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=inner,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert "BnpatchError" in result.stderr
    assert "outside the base directory" in result.stderr


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_linked_external_data(external, tmp_path, link):
    """A cache that keeps its blobs elsewhere and links to them."""
    inner = tmp_path / "inner"
    inner.mkdir()
    external.rename(inner / "m.onnx")
    getattr(inner / "m.onnx.data", link)(tmp_path / "m.onnx.data")
    with pytest.raises(BnpatchError, match=r"copy the model and its data as plain files"):
        load(inner / "m.onnx")


def test_a_symlink_within_the_folder(external):
    """onnx's own checker refuses it."""
    data = external.parent / "m.onnx.data"
    data.rename(external.parent / "blob")
    data.symlink_to("blob")
    with pytest.raises(BnpatchError, match=r"copy the model and its data as plain files"):
        load(external)


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    target = write(tmp_path / "m.onnx", b"before")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(BnpatchError, match="No space left on device; choose another place"):
        save(from_proto(bn_model()), target)
    assert target.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(BnpatchError, match="cannot be written"):
        save(from_proto(bn_model()), tmp_path / "none" / "m.onnx")


def test_saving_leaves_the_model_as_it_was(external):
    graph = load(external)
    save(graph, external.parent / "other.onnx")
    tensors = [v.const_value for v in graph.graph.initializers.values()]
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
