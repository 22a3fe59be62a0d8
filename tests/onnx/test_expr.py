import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from bnpatch.core.moments import Moments, mix, pool
from bnpatch.onnx.expressions import Tape, Value
from tests.onnx.build import example, run


def evaluate(build, arrays, opset=18):
    """Run what ``build`` makes of graph values, on onnxruntime."""
    inputs = [
        ir.Value(name=f"in{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(a.shape))
        for i, a in enumerate(arrays)
    ]
    tape = Tape("t", opset, set())
    output = build(*(Value(tape, v) for v in inputs))
    graph = ir.Graph(inputs, [output.value], nodes=tape.nodes, opset_imports={"": opset}, name="g")
    feeds = {f"in{i}": a for i, a in enumerate(arrays) if i}
    return run(ir.Model(graph, ir_version=8), arrays[0], **feeds), tape


@pytest.mark.parametrize("opset", [7, 13, 18])
def test_mix_on_graph_values_is_mix_on_arrays(opset):
    mean, var = example(3, 4), example(3, 4, seed=2) ** 2
    running = Moments(example(4, seed=3), example(4, seed=4) ** 2)
    for alpha in (0.0, 0.3, 1.0):
        for part in ("mean", "var"):
            got, _ = evaluate(
                lambda m, v, alpha=alpha, part=part: getattr(mix(alpha, Moments(m, v), running), part),
                [mean, var],
                opset,
            )
            expected = getattr(mix(alpha, Moments(mean, var), running), part)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("opset", [7, 18])
def test_pool_on_graph_values_is_pool_on_arrays(opset):
    mean, var = example(2, 3, 4), example(2, 3, 4, seed=2) ** 2
    expected = pool(Moments(mean, var), axes=(0, 2))
    for part in ("mean", "var"):
        got, _ = evaluate(
            lambda m, v, part=part: getattr(pool(Moments(m, v), axes=(0, 2)), part), [mean, var], opset
        )
        np.testing.assert_allclose(got, getattr(expected, part), rtol=1e-5)  # float32
        assert got.shape == (1, 3, 1)


def test_what_is_constant_is_computed_beforehand():
    running = Moments(0.0, np.ones(4))
    _, tape = evaluate(lambda m, v: mix(0.25, Moments(m, v), running).var, [example(3, 4)] * 2)
    operators = [node.op_type for node in tape.nodes if node.op_type != "Constant"]
    # alpha * v + (1 - alpha) * rv + alpha * (1 - alpha) * m^2: two sums, m^2 and two products; and alpha * m
    assert sorted(operators) == ["Add", "Add", "Mul", "Mul", "Mul", "Mul"]


def test_equal_nodes_are_made_once_and_equal_looking_constants_are_not_confused():
    long = np.arange(5000.0)
    other = long.copy()
    other[2500] = -1  # NumPy prints both alike
    got, tape = evaluate(lambda x: x * long + x * long + x * other, [np.ones(5000, np.float32)])
    np.testing.assert_allclose(got, 2 * long + other)
    assert sum(node.op_type == "Mul" for node in tape.nodes) == 2


def test_an_array_on_the_left_leaves_the_operation_to_the_value():
    array, x = np.array([2.0, 4.0]), np.array([1.0, 8.0], np.float32)
    got, _ = evaluate(lambda v: (array - v) + (array / v) + (array * v) + (1 - v), [x])
    np.testing.assert_allclose(got, (array - x) + (array / x) + array * x + 1 - x)


def test_names_already_taken_are_avoided():
    tape = Tape("s", 18, {"s/Sqrt", "s/Sqrt_output"})
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    output = Value(tape, x).sqrt().value
    assert output.name == "s/Sqrt_output_1"
    assert tape.nodes[0].name == "s/Sqrt_1"


def test_a_value_of_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'x' is not known"):
        Value(Tape("s", 18, set()), ir.Value(name="x"))


def test_a_cast_to_the_same_type_adds_nothing():
    tape = Tape("s", 18, set())
    x = Value(tape, ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT)))
    assert x.cast(ir.DataType.FLOAT) is x
    assert x.cast(ir.DataType.DOUBLE).dtype == ir.DataType.DOUBLE
    assert tape.nodes[0].attributes["to"].as_int() == TensorProto.DOUBLE
