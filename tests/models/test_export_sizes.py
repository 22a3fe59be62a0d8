"""An exported file is compared with the model at the sizes that it may get."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnpatch
from bnpatch.models.export import ParityError, export_onnx, patched_graph
from bnpatch.report.files import write_results
from tests.models.onnx_graph import graph as image_graph
from tests.models.onnx_graph import opened
from tests.nn.norms import images
from tests.onnx.build import bn_model


@pytest.fixture
def any_size(tmp_path):
    """A patched ONNX model that takes images of any size."""
    path = tmp_path / "source.onnx"
    onnx.save(bn_model(x=("n", 3, "h", "w"), conv=True), path)
    model = bnpatch.load(path, preprocessing={"img_size": (5, 4)})
    model.set_alphas(0.3)
    return model


def test_a_file_for_images_of_any_size_is_compared_at_two(any_size, tmp_path):
    done = export_onnx(any_size, tmp_path / "model.onnx")
    assert (done.batches, done.sizes) == ((1, 2, 5, 2), ((3, 5, 4), (3, 37, 36)))
    # It is compared at that of the data, too.
    done = export_onnx(any_size, tmp_path / "model.onnx", images=images(4, 3, 9, 9))
    assert (done.batches, done.sizes) == ((1, 2, 5, 4, 2), ((3, 5, 4), (3, 9, 9), (3, 37, 36)))


def spoiled(model, height):
    """What :func:`patched_graph` returns, with a graph that is wrong for images of this height alone."""
    graph, patched = patched_graph(model)
    proto = ir.to_proto(graph)
    name = proto.graph.output[0].name
    last = next(node for node in proto.graph.node if node.output[0] == name)
    last.output[0] = "before"
    for value, called in ((2, "axis"), (height, "height")):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), called))
    for operator, inputs, output in (
        ("Shape", ["x"], "sizes"),
        ("Gather", ["sizes", "axis"], "rows"),
        ("Equal", ["rows", "height"], "is_wrong"),
        ("Cast", ["is_wrong"], "error"),
        ("Add", ["before", "error"], name),
    ):
        options = {"to": onnx.TensorProto.FLOAT} if operator == "Cast" else {}
        proto.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **options))
    return ir.from_proto(proto), patched


def test_a_file_that_deviates_at_another_size_does_not_stay(any_size, tmp_path, monkeypatch):
    graph = spoiled(any_size, height=5 + 32)
    monkeypatch.setattr("bnpatch.models.export.patched_graph", lambda *_: graph)
    with pytest.raises(ParityError, match="deviates"):
        export_onnx(any_size, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.filterwarnings("ignore:the model is right on")  # its answers are not what this is about
def test_a_search_compares_its_file_at_the_size_of_the_data(tmp_path, monkeypatch):
    """Whatever other size test data has, and also where the same recipe is exported later."""
    model = opened(tmp_path, image_graph(["n", 3, "h", "w"], last="flat"))
    labels = np.arange(20) % 4
    data, others = ((images(20, 3, *size).numpy(), labels) for size in ((3, 7), (2, 2)))
    result = bnpatch.tune_alpha(model, data, test_data=others, granularity="global", trials=1)
    assert model.preprocessing.input_size == (3, 3, 7)
    assert result.recipe.provenance["data"]["input_shape"] == [3, 3, 7]
    graph = spoiled(model, height=3)
    model.preprocessing = replace(model.preprocessing, input_size=(3, 2, 2))
    monkeypatch.setattr("bnpatch.models.export.patched_graph", lambda *_: graph)
    with pytest.raises(ParityError, match="deviates"):
        write_results(result, model, tmp_path / "out")
    assert not (tmp_path / "out" / "patched.onnx").exists()
    assert (tmp_path / "out" / "recipe.partial.json").exists()


def test_a_model_for_one_size_is_compared_at_that(tmp_path):
    proto = bn_model(x=("n", 3, "h", "w"), conv=True)
    proto.graph.node[-1].output[0] = "before"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 3, 5, 4), np.float32), "map"))
    proto.graph.node.append(onnx.helper.make_node("Mul", ["before", "map"], ["y"]))
    onnx.save(proto, tmp_path / "source.onnx")
    model = bnpatch.load(tmp_path / "source.onnx", preprocessing={"img_size": (5, 4)})
    model.set_alphas(0.3)
    assert export_onnx(model, tmp_path / "model.onnx").sizes == ((3, 5, 4),)
