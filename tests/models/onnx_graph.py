"""Graphs of a convolution and a Batch Norm, with variations of inputs and outputs."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import bnpatch


def graph(dims, *, channels_last=False, dtype=TensorProto.FLOAT, last="none", outputs=1):
    """A convolution, a Batch Norm and a mean over positions, with variations of what surrounds them."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 3, 1, 1)),
        "bn.weight": rng.uniform(0.5, 1, 4),
        "bn.bias": rng.normal(size=4),
        "bn.running_mean": rng.normal(size=4),
        "bn.running_var": rng.uniform(0.5, 1, 4),
    }
    nodes = []
    image = "x"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [image], ["as_float"], to=TensorProto.FLOAT))
        image = "as_float"
    if channels_last:
        nodes.append(helper.make_node("Transpose", [image], ["nchw"], perm=[0, 3, 1, 2]))
        image = "nchw"
    nodes += [
        helper.make_node("Conv", [image, "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *list(arrays)[1:]], ["n"]),
        helper.make_node("GlobalAveragePool", ["n"], ["p"]),
    ]
    tail = {
        "none": [],
        "flat": ["Flatten"],
        "softmax": ["Flatten", "Softmax", "Identity"],
        "log": ["Flatten", "LogSoftmax"],
    }
    value = "p"
    for index, op in enumerate(tail[last]):
        nodes.append(helper.make_node(op, [value], [f"y{index}"]))
        value = f"y{index}"
    shapes = {value: ["n", 4], "p": ["n", 4, 1, 1]}
    infos = [helper.make_tensor_value_info(v, TensorProto.FLOAT, shapes[v]) for v in [value, "p"][:outputs]]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, dims)],
        infos,
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def opened(tmp_path, model, **kwargs):
    onnx.save(model, tmp_path / "model.onnx")
    return bnpatch.load(tmp_path / "model.onnx", **kwargs)


BYTES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
