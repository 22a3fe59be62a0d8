"""Graphs that normalize images themselves, and others."""

import numpy as np
import pytest
import torch
from onnx import helper

from bnpatch.onnx.own_normalization import largest_value
from tests.models.onnx_graph import graph, opened
from tests.onnx.build import from_proto, model

MEAN, STD = np.array([0.4, 0.3, 0.6]), np.array([0.25, 0.2, 0.3])


def per_channel(values):
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


NORMALIZING = {
    "mean and std": (1, [("Sub", MEAN), ("Div", STD)]),
    "mean and std of bytes": (255, [("Sub", 255 * MEAN), ("Mul", 1 / (255 * STD))]),
    "to [0, 1], then mean and std": (255, [("Div", [255]), ("Sub", MEAN), ("Div", STD)]),
    "to [0, 1]": (255, [("Mul", [1 / 255])]),
    "bytes to [-1, 1]": (255, [("Div", [127.5]), ("Add", [-1])]),
    "to [-1, 1]": (1, [("Mul", [2]), ("Sub", [1])]),
}
OTHERS = {
    "nothing": [],
    "a negative mean": [("Add", MEAN), ("Div", STD)],
    "a large mean": [("Sub", 1000 * MEAN), ("Div", STD)],
    "a tiny scale": [("Sub", MEAN), ("Div", STD / 100)],
    "no scale": [("Mul", [0])],
    "numbers that are not finite": [("Mul", [np.nan])],
    "a doubled deviation": [("Mul", [0.5])],
}


def normalizing(steps, first=(), x=("n", 3, 8, 8)):
    nodes, arrays, value = [], {}, "x"
    for at, op in enumerate(first):
        nodes.append(
            helper.make_node(op, [value], [value := f"f{at}"], **({"to": 1} if op == "Cast" else {}))
        )
    for at, (op, values) in enumerate(steps):
        arrays[f"c{at}"] = per_channel(values)
        nodes.append(helper.make_node(op, [value, f"c{at}"], [value := f"s{at}"]))
    return model([*nodes, helper.make_node("Relu", [value], ["y"])], arrays, x=x)


@pytest.mark.parametrize("name", NORMALIZING)
@pytest.mark.parametrize("first", [(), ("Cast", "Identity")])
def test_the_largest_value_of_an_image_is_found(name, first):
    largest, steps = NORMALIZING[name]
    assert largest_value(from_proto(normalizing(steps, first)), "x") == largest


@pytest.mark.parametrize("name", OTHERS)
def test_other_arithmetic_is_none(name):
    assert largest_value(from_proto(normalizing(OTHERS[name])), "x") is None


def test_an_input_that_something_else_reads_is_none():
    proto = normalizing(NORMALIZING["to [-1, 1]"][1])
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["z"]))
    assert largest_value(from_proto(proto), "x") is None
    proto.graph.node[-1].op_type = "Shape"
    assert largest_value(from_proto(proto), "x") == 1


@pytest.mark.parametrize("name", NORMALIZING)
def test_images_come_as_the_graph_takes_them(name, tmp_path):
    """The model returns for images what its body returns for images that were normalized before."""
    largest, steps = NORMALIZING[name]
    body = graph(["n", 3, 8, 8], last="flat")
    proto = graph(["n", 3, 8, 8], last="flat")
    arrays = normalizing(steps).graph
    proto.graph.node[0].input[0] = f"s{len(steps) - 1}"
    for at, node in enumerate(arrays.node[:-1]):
        proto.graph.node.insert(at, node)
    proto.graph.initializer.extend(arrays.initializer)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    y = x.astype(np.float32) * largest / 255
    for op, values in steps:
        y = {"Sub": y - per_channel(values), "Add": y + per_channel(values)}.get(
            op, y * per_channel(values) if op == "Mul" else y / per_channel(values)
        )
    expected = opened(tmp_path, body).predict(torch.from_numpy(y))
    found = opened(tmp_path, proto)
    assert found.preprocessing.source == f"values up to {largest}, because the graph normalizes images itself"
    np.testing.assert_allclose(found.predict(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-4)
    asked = opened(tmp_path, proto, preprocessing={"mean": (0.5,), "std": (0.5,)})
    assert asked.preprocessing.mean == (0.5,) * 3
