"""Recognize Batch Norm that a graph computes by Sub, Div or Mul, Mul and Add with constants per channel.

Modules that compute a frozen Batch Norm in their own code are exported like this, and so are graphs of
TensorFlow 1. Two arrangements have running statistics that can be read:

    centred: (x - mean) / sqrt(var + eps) * gamma + beta
    scaled:  x * s + (beta - mean * s)  with  s = gamma / sqrt(var + eps)

The second one can be read only if the graph still computes ``s`` and the shift from the four parameters. Most
tools compute both once and store the results. Then ``y = x * s + t`` with stored numbers s and t is all that
is left, and these fit any running statistics. :func:`is_affine` finds such nodes, so that bnpatch can list
them as skipped with this reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnpatch.onnx.group_norm import is_per_channel, only_user, other_operand
from bnpatch.onnx.inference import Array, TensorType, constant_of, source_of

_EPS = 1e-5  # torch's default, where the file has only the standard deviation

# Operators between the images and the first layer of a model that normalizes images itself.
_ON_IMAGES = "Cast Transpose Identity Add Sub Mul Div Resize Gather Slice Concat".split()
# What pre-activation networks put before a Batch Norm.
_BEFORE_AFFINE = "Add Sum Concat MaxPool AveragePool Relu LeakyRelu Clip Sigmoid".split()


@dataclass(frozen=True)
class DecomposedBatchNorm:
    """The nodes of one Batch Norm and its parameters.

    Attributes:
        nodes: the nodes in order; the last one has the output.
        operand: which input of the first node is normalized.
        eps: added to the variance.
        parameters: gamma, beta, running mean and running variance, each of shape (C,).
        values: the values of the graph that hold them.
    """

    nodes: tuple[ir.Node, ...]
    operand: int
    eps: float
    parameters: list[Array]
    values: list[ir.Value | None]


@dataclass
class _Parts:
    """What has been read of a Batch Norm so far; without gammas gamma is 1, and without beta beta is 0."""

    nodes: list[ir.Node]
    mean: ir.Value | None = None
    var: Array | None = None
    eps: float = _EPS
    var_value: ir.Value | None = None
    gammas: tuple[ir.Value | None, ...] = ()
    beta: ir.Value | None = None


def find_decomposed(node: ir.Node, types: Mapping[int, TensorType]) -> DecomposedBatchNorm | None:
    """Return the Batch Norm whose first node this is, or None.

    Args:
        node: any node.
        types: types of the graph's values, see :func:`bnpatch.onnx.inference.infer_types`.
    """
    read = {"Sub": _centred, "Mul": _scaled}.get(node.op_type)
    operand = _operand(node)
    if read is None or operand is None or node.domain not in ("", "ai.onnx"):
        return None
    x = node.inputs[operand]
    assert x is not None  # _operand chose it
    dims = types.get(id(x), TensorType()).dims
    parts = read(node, operand, len(dims))
    if parts is None or parts.var is None:
        return None
    gamma = np.asarray(1.0)
    for value in parts.gammas:
        gamma = gamma * _numbers(value)
    arrays = [gamma, _numbers(parts.beta) if parts.beta else np.zeros(1), _numbers(parts.mean), parts.var]
    channels = dims[1] if isinstance(dims[1], int) else max(array.size for array in arrays)
    if channels < 2 or any(array.size not in (1, channels) for array in arrays):
        return None
    parameters = [np.broadcast_to(array.reshape(-1), channels) for array in arrays]
    values = [parts.mean, parts.var_value, *parts.gammas, parts.beta]
    return DecomposedBatchNorm(tuple(parts.nodes), operand, parts.eps, parameters, values)


def is_affine(node: ir.Node, types: Mapping[int, TensorType]) -> bool:
    """Tell whether a node is a Mul before an Add, by numbers per channel, at a place where norms usually are.

    A scale and a shift after a norm or a convolution don't count; :mod:`bnpatch.onnx.fused_conv` finds those
    after a convolution.
    """
    operand = _operand(node) if node.op_type == "Mul" and node.domain in ("", "ai.onnx") else None
    x = None if operand is None else node.inputs[operand]
    producer = None if x is None else x.producer()
    if x is None or producer is None or producer.op_type not in _BEFORE_AFFINE or _is_on_images(x):
        return False
    dims = types.get(id(x), TensorType()).dims
    shift = next(constant_steps(node, len(dims), ("Add", "Sub")), None)
    scale = constant_of(other_operand(node, x))
    return shift is not None and scale is not None and is_per_channel(scale, len(dims)) and scale.size > 1


def constant_steps(node: ir.Node, rank: int, operators: tuple[str, ...]) -> Iterator[tuple[ir.Node, Array]]:
    """Yield the nodes that alone use the output of a node, one after the other, with numbers per channel.

    Args:
        node: any node; it is not yielded.
        rank: number of dimensions of its output.
        operators: the operators that are followed.
    """
    while True:
        user = next((u for u in (only_user(node, op) for op in operators) if u is not None), None)
        numbers = None if user is None else constant_of(other_operand(user, node.outputs[0]))
        if user is None or numbers is None or numbers.size < 2 or not is_per_channel(numbers, rank):
            return
        yield user, numbers
        node = user


def _centred(node: ir.Node, operand: int, rank: int) -> _Parts | None:
    """Read (x - mean) / sqrt(var + eps) * gamma + beta."""
    mean, x = node.inputs[1], node.inputs[0]
    if operand != 0 or not _fits(mean, rank):
        return None
    parts = _Parts([node], mean=mean)
    divide, multiply = only_user(node, "Div"), only_user(node, "Mul")
    user = divide or multiply
    factor = None if user is None else other_operand(user, node.outputs[0])
    if user is None or not _fits(factor, rank) or (divide and user.inputs[0] is factor):
        return None
    parts.nodes.append(user)
    found = _deviation(factor) if divide else _inverse_deviation(factor)
    if found is not None:
        gamma, parts.var_value, parts.eps = found
        parts.var, parts.gammas = _numbers(parts.var_value), () if gamma is None else (gamma,)
    _read_gamma_and_beta(parts, rank)
    if parts.var is None and x is not None and not _is_on_images(x):
        # The graph has stored the standard deviation (or its inverse) as numbers. A single Mul could be by
        # gamma over the deviation, from which the deviation can't be read, so a second Mul is required.
        std = _numbers(factor)
        if not np.all(std > 0) or not (divide or parts.gammas):
            return None
        square = std**2 if divide else std**-2
        parts.eps = min(_EPS, float(square.min()))
        parts.var = square - parts.eps
    return parts


def _scaled(node: ir.Node, operand: int, rank: int) -> _Parts | None:
    """Read x * s + (beta - mean * s) with s = gamma / sqrt(var + eps)."""
    scale = node.inputs[1 - operand]
    found = _inverse_deviation(scale) if _fits(scale, rank) else None
    add = only_user(node, "Add")
    shift = source_of(other_operand(add, node.outputs[0])) if add is not None else None
    if found is None or add is None or shift is None or shift.op_type != "Sub":
        return None
    product = source_of(shift.inputs[1])
    if product is None or product.op_type != "Mul" or not _fits(other_operand(add, node.outputs[0]), rank):
        return None
    s = _numbers(scale).reshape(-1)
    means = [
        mean
        for mean, factor in (product.inputs, product.inputs[::-1])
        if mean is not None and np.array_equal(_numbers(factor).reshape(-1), s)
    ]
    if not means:
        return None
    gamma, var, eps = found
    gammas = () if gamma is None else (gamma,)
    return _Parts([node, add], means[0], _numbers(var), eps, var, gammas, shift.inputs[0])


def _read_gamma_and_beta(parts: _Parts, rank: int) -> None:
    """Read gamma from a Mul and beta from an Add, if they follow, and add these to the nodes."""
    for operator in ("Mul", "Add"):
        last = parts.nodes[-1]
        user = only_user(last, operator)
        value = None if user is None else other_operand(user, last.outputs[0])
        if user is None or not _fits(value, rank):
            continue
        parts.nodes.append(user)
        if operator == "Mul":
            parts.gammas = (*parts.gammas, value)
        else:
            parts.beta = value


_Deviation = tuple[ir.Value | None, ir.Value, float]  # gamma or None, running variance, eps


def _inverse_deviation(value: ir.Value | None) -> _Deviation | None:
    """Read gamma / sqrt(var + eps), in any of the ways to write it."""
    node = source_of(value)
    if node is None:
        return None
    if node.op_type == "Mul":
        for gamma, inverse in (node.inputs, node.inputs[::-1]):
            if (found := _inverse_deviation(inverse)) is not None and found[0] is None:
                return gamma, *found[1:]
    if node.op_type == "Div" and (found := _deviation(node.inputs[1])) is not None:
        return node.inputs[0], *found[1:]
    if node.op_type == "Reciprocal":
        return _deviation(node.inputs[0])
    return _power(node, -0.5)


def _deviation(value: ir.Value | None) -> _Deviation | None:
    """Read sqrt(var + eps)."""
    node = source_of(value)
    if node is None:
        return None
    return _sum(node.inputs[0]) if node.op_type == "Sqrt" else _power(node, 0.5)


def _power(node: ir.Node, exponent: float) -> _Deviation | None:
    if node.op_type != "Pow" or not np.array_equal(_numbers(node.inputs[1]).reshape(-1), [exponent]):
        return None
    return _sum(node.inputs[0])


def _sum(value: ir.Value | None) -> _Deviation | None:
    """Read var + eps."""
    node = source_of(value)
    if node is None or node.op_type != "Add":
        return None
    for var, eps in (node.inputs, node.inputs[::-1]):
        if var is not None and _numbers(var).size > 1 and _numbers(eps).size == 1:
            return None, var, float(_numbers(eps).item())
    return None


def _operand(node: ir.Node) -> int | None:
    """Return which of two inputs is not constant; None if both are, or neither is."""
    if len(node.inputs) != 2 or any(value is None for value in node.inputs):
        return None
    first, second = (constant_of(value) is None for value in node.inputs)
    return None if first == second else int(second)


def _fits(value: ir.Value | None, rank: int) -> bool:
    constant = constant_of(value)
    return constant is not None and is_per_channel(constant, rank)


def _numbers(value: ir.Value | None) -> Array:
    constant = constant_of(value)
    return np.zeros(0) if constant is None else constant.astype(np.float64)


def _is_on_images(value: ir.Value) -> bool:
    """Tell whether a value is an image: the model's input, or computed from it by preprocessing alone."""
    seen = [value]
    while seen:
        value = seen.pop()
        if value.is_graph_input():
            return True
        node = value.producer()
        if node is not None and node.op_type in _ON_IMAGES:
            seen += [operand for operand in node.inputs if operand is not None]
    return False
