"""Graphs as other tools write them: quantized, channels last, with Batch Norm in unusual places."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import bnpatch
from bnpatch.models.running_stats import recover_fused
from tests.onnx.build import batch_norm, example, model, parameters

SIDE = 6
SIZE = {"img_size": SIDE}
NAMES = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def kernel(outputs=6, inputs=3, seed=2):
    return np.random.default_rng(seed).normal(size=(outputs, inputs, 1, 1)).astype(np.float32)


def loaded(path, nodes, arrays, x=("n", 3, SIDE, SIDE), y=("n", 6)):
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)]
    used = {name for node in nodes for name in node.input}
    arrays = {name: np.asarray(array) for name, array in arrays.items() if name in used}
    onnx.save(model(nodes, arrays, x=x, outputs=outputs, opset=17), path)
    return bnpatch.load(path, preprocessing=SIZE)


def pooled(value):
    return [
        helper.make_node("GlobalAveragePool", [value], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["y"]),
    ]


def quantized(value, result):
    return [
        helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{result}.q"]),
        helper.make_node("DequantizeLinear", [f"{result}.q", "scale", "zero"], [result]),
    ]


def test_a_batch_norm_between_quantizations(tmp_path):
    """Quantization leaves a Batch Norm after an activation as it is, because nothing takes it in."""
    nodes = [
        *quantized("x", "x.d"),
        helper.make_node("Conv", ["x.d", "c.weight"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        *quantized("r", "r.d"),
        batch_norm(("r.d", *NAMES), "b"),
        *quantized("b", "b.d"),
        *pooled("b.d"),
    ]
    weights = parameters() | {"c.weight": 0.3 * kernel()}
    arrays = weights | {"scale": np.float32(0.05), "zero": np.uint8(100)}
    quantized_model = loaded(tmp_path / "quantized.onnx", nodes, arrays)
    assert [norm.name for norm in quantized_model.inventory().norm_layers] == ["bn"]
    quantized_model.set_alphas(0.3)
    done = bnpatch.export_onnx(quantized_model, tmp_path / "patched.onnx")
    assert done.patched == ("bn",)
    conv, relu, norm = nodes[2], nodes[3], batch_norm(("r", *NAMES), "b")
    conv.input[0] = "x"
    plain = loaded(tmp_path / "plain.onnx", [conv, relu, norm, *pooled("b")], weights)
    plain.set_alphas(0.3)
    x = torch.from_numpy(example(4, 3, SIDE, SIDE))
    # Each of three quantizations rounds by half a step; gamma is at most 1.5, a deviation at least 0.5.
    torch.testing.assert_close(quantized_model.predict(x), plain.predict(x), rtol=0, atol=0.25)


@pytest.mark.parametrize("shift", ["Add", "Sub"])
def test_a_graph_that_takes_channels_last(shift, tmp_path):
    """As converters from TensorFlow write it: a Transpose first, scale and shift after convolutions."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "c.weight"], ["c"], name="conv2d"),
        helper.make_node("Mul", ["c", "scale"], ["m"]),
        helper.make_node(shift, ["m", "shift"], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        *pooled("r"),
    ]
    scale, offset = (parameters()[name].reshape(1, -1, 1, 1) for name in ("bn.weight", "bn.bias"))
    arrays = {"c.weight": kernel(), "scale": scale, "shift": offset}
    found = loaded(tmp_path / "model.onnx", nodes, arrays, x=("n", SIDE, SIDE, 3))
    assert found.fused_convs() == ("c",)
    x = torch.from_numpy(example(12, 3, SIDE, SIDE))
    before = found.predict(x)
    assert recover_fused(found, x) == 1
    torch.testing.assert_close(found.predict(x), before)
    found.set_alphas(0.5)
    assert not torch.allclose(found.predict(x), before, atol=1e-2)
    assert bnpatch.export_onnx(found, tmp_path / "patched.onnx").patched == ("c.folded",)


def test_scale_and_shift_after_a_transposed_convolution(tmp_path):
    nodes = [
        helper.make_node("ConvTranspose", ["x", "c.weight"], ["c"], strides=[2, 2]),
        helper.make_node("Mul", ["c", "scale"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["b"]),
        *pooled("b"),
    ]
    scale, offset = (parameters()[name].reshape(-1, 1, 1) for name in ("bn.weight", "bn.bias"))
    arrays = {"c.weight": kernel(3, 6), "scale": scale, "shift": offset}
    found = loaded(tmp_path / "model.onnx", nodes, arrays)
    x = torch.from_numpy(example(12, 3, SIDE, SIDE))
    assert recover_fused(found, x) == 1
    found.set_alphas(0.5)
    assert bnpatch.export_onnx(found, tmp_path / "patched.onnx").patched == ("c.folded",)


def test_a_batch_norm_that_an_exporter_left_in_training_mode(tmp_path):
    """It normalizes by the batch, so that there is nothing to weight; the Batch Norm beside it is patched."""
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["c"]),
        helper.make_node(
            "BatchNormalization", ["c", *NAMES], ["a", "mean", "var"], training_mode=1, name="left"
        ),
        batch_norm(("a", *NAMES), "b"),
        *pooled("b"),
    ]
    found = loaded(tmp_path / "model.onnx", nodes, parameters() | {"c.weight": kernel()})
    assert len(found.inventory().norm_layers) == 1
    (left,) = found.inventory().skipped_norms
    assert "training mode" in left.reason
