"""Shapes, layouts and types of inputs and outputs of ONNX files."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.outputs import Kind
from tests.models.onnx_graph import BYTES, graph, opened
from tests.models.small import assert_close
from tests.nn.norms import images, settle


@pytest.mark.parametrize(
    "dims",
    [["n", 3, 8, 8], [1, 3, 8, 8], [2, 3, 8, 8], ["n", 3, "h", "w"], [None, 3, None, None], [0, 3, 8, 8]],
)
def test_batches_fixed_or_not_and_sizes_known_or_not(tmp_path, dims):
    model = opened(tmp_path, graph(dims, last="flat"), preprocessing={"img_size": 8})
    expected = opened(tmp_path, graph(["n", 3, 8, 8], last="flat")).predict(BYTES)
    torch.testing.assert_close(model.predict(BYTES), expected)
    model.set_alphas(0.3)
    assert model.predict(BYTES).shape == (5, 4)
    assert model.num_outputs() == 4


def test_an_open_image_size_is_said(tmp_path):
    model = opened(tmp_path, graph(["n", 3, "h", "w"]))
    assert "--img-size" in model.notes[0]
    assert model.preprocessing.input_size == (3, 224, 224)


@pytest.mark.parametrize(("open_axis", "large_axis"), [(0, 1), (0, 2), (1, 2), (1, 3)])
def test_an_input_of_too_many_numbers_is_refused_where_another_size_is_0(tmp_path, open_axis, large_axis):
    model = graph(["n", 3, 8, 8])
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[open_axis].dim_value, dims[large_axis].dim_value = 0, 2**62  # no numbers at all, as it stands
    with pytest.raises(BnpatchError, match=r"the graph has a value of [\d,]+ numbers"):
        opened(tmp_path, model)


def test_layouts_and_types_of_input(tmp_path):
    expected = opened(tmp_path, graph(["n", 3, 8, 8])).predict(BYTES)
    assert expected.shape == (5, 4)  # (N, K, 1, 1)
    last = opened(tmp_path, graph(["n", 8, 8, 3], channels_last=True))
    assert last.preprocessing.input_size == (3, 8, 8)
    torch.testing.assert_close(last.predict(BYTES), expected)
    takes_bytes = opened(tmp_path, graph(["n", 3, 8, 8], dtype=TensorProto.UINT8))
    as_floats = opened(tmp_path, graph(["n", 3, 8, 8])).predict(BYTES.float())
    torch.testing.assert_close(takes_bytes.predict(BYTES), as_floats)
    half = opened(tmp_path, graph(["n", 3, 8, 8], dtype=TensorProto.FLOAT16))
    torch.testing.assert_close(half.predict(BYTES), expected, rtol=1e-2, atol=1e-2)  # inputs of 11 bits


@pytest.mark.parametrize("last", ["softmax", "log"])
def test_probabilities_are_told_from_logits(tmp_path, last):
    logits = opened(tmp_path, graph(["n", 3, 8, 8], last="flat")).predict(BYTES)
    given = opened(tmp_path, graph(["n", 3, 8, 8], last=last)).predict(BYTES)
    targets = torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(given, targets), torch.nn.functional.cross_entropy(logits, targets)
    )


def test_an_output_is_chosen(tmp_path):
    model = graph(["n", 3, 8, 8], last="softmax", outputs=2)
    softmax, logits = opened(tmp_path, model), opened(tmp_path, model, output="p")
    assert [m.output_for(BYTES).kind for m in (softmax, logits)] == [Kind.SOFTMAX, Kind.LOGITS]
    torch.testing.assert_close(softmax.predict(BYTES).softmax(1), logits.predict(BYTES).softmax(1))
    with pytest.raises(BnpatchError, match="no output 'nope'; choose --output-name among"):
        opened(tmp_path, model, output="nope")


def test_a_rank_that_shapes_do_not_tell_is_found_by_running(tmp_path):
    """How many sizes Compress keeps depends on its values."""
    proto = graph(["n", 3, 8, 8], last="flat")
    conv, norm, *rest = proto.graph.node
    norm.input[0] = "reshaped"
    between = [
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("Compress", ["shape", "all"], ["sizes"]),
        helper.make_node("Reshape", ["c", "sizes"], ["reshaped"]),
    ]
    nodes = [conv, *between, norm, *rest]
    initializers = [*proto.graph.initializer, numpy_helper.from_array(np.ones(4, np.bool_), "all")]
    made = helper.make_graph(nodes, "g", proto.graph.input, proto.graph.output, initializers)
    proto = helper.make_model(made, opset_imports=proto.opset_import, ir_version=9)
    model = opened(tmp_path, proto, preprocessing={"img_size": 8})
    assert [norm.name for norm in model.inventory().norm_layers] == ["bn"]
    model.set_alphas(0.3)
    expected = opened(tmp_path, graph(["n", 3, 8, 8], last="flat"))
    expected.set_alphas(0.3)
    torch.testing.assert_close(model.predict(BYTES), expected.predict(BYTES))


@pytest.mark.parametrize("dims", [["n", 3], ["n", 3, 8, 8, 8, 8]])
def test_what_takes_no_images_is_refused(tmp_path, dims):
    model = graph(["n", 3, 8, 8])
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for dim in dims:
        model.graph.input[0].type.tensor_type.shape.dim.add(
            **{"dim_param" if dim == "n" else "dim_value": dim}
        )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BnpatchError, match=r"takes images|not a valid ONNX model"):
        bnpatch.load(tmp_path / "model.onnx")


def test_a_wrong_size_is_one_line(tmp_path):
    model = opened(tmp_path, graph(["n", 3, 8, 8]))
    with pytest.raises(BnpatchError, match=r"does not take an input of shape \(1, 3, 9, 9\)") as error:
        model.predict(torch.zeros(1, 3, 9, 9))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_maps_that_become_1_x_1_at_run_time_are_those_of_torch(tmp_path):
    """A file of any image size weights examples where torch does: not where a channel has one value."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.MaxPool2d(4), torch.nn.BatchNorm2d(4)
    module = settle(torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    open_axes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    program = torch.export.export(module, (images(2, 3, 16, 16),), dynamic_shapes=open_axes)
    torch.export.save(program, tmp_path / "model.pt2")
    found, expected = bnpatch.load(tmp_path / "model.pt2"), bnpatch.load(module, device="cpu")
    for model in (found, expected):
        model.set_alphas(0.4)
    bnpatch.export_onnx(found, tmp_path / "constant.onnx")
    for side in (16, 4):
        x = images(5, 3, side, side)
        assert_close(found.predict(x), expected.predict(x))
        assert_close(bnpatch.load(tmp_path / "constant.onnx").predict(x), expected.predict(x))


@pytest.mark.filterwarnings("ignore:the model is right on")  # its answers are not what this is about
def test_a_file_of_any_size_runs_at_that_of_the_data_only(tmp_path, capfd):
    """Its head is for 2 x 6 pixels, so that it runs at no other size."""
    proto = graph(["n", 3, "h", "w"], last="flat")
    arrays = [numpy_helper.from_array(np.ones((48, 2), np.float32), "head")]
    pool, flat = (node for node in proto.graph.node if node.op_type in ("GlobalAveragePool", "Flatten"))
    pool.op_type = "Identity"
    proto.graph.node.append(helper.make_node("Gemm", [flat.output[0], "head"], ["logits"]))
    proto.graph.initializer.extend(arrays)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2]))
    x, labels = images(40, 3, 2, 6).numpy(), np.arange(40) % 2
    model = opened(tmp_path, proto)
    result = bnpatch.tune_alpha(model, (x, labels), granularity="global", trials=1)
    model.save(tmp_path / "patched.onnx", result.recipe)
    assert bnpatch.load(tmp_path / "patched.onnx").preprocessing.input_size == (3, 2, 6)
    assert opened(tmp_path, proto, preprocessing={"img_size": (2, 6)}).num_outputs() == 2
    with pytest.raises(BnpatchError, match="does not take an input"):
        model.predict(torch.zeros(1, 3, 4, 6))
    assert "onnxruntime" not in capfd.readouterr().err
