"""Find out what is known of a graph's values before the graph runs: constants, names, types and shapes.

:func:`constant_of` computes a value from constants. Exporters put operators such as Identity, CastLike,
Unsqueeze or Expand between a parameter and its use, so it evaluates the few operators in ``_OPERATORS``; any
other value counts as dynamic. :func:`names_of` returns the names of a value and of the values that it is a
view of. :func:`infer_types` returns types and dimensions of all values.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from bnpatch.core.limits import VALUES

Array = NDArray[Any]

#: Operators that normalize by moments.
NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization")

#: The most elements of a constant that is computed. No parameter of a norm and no shape is larger, but a
#: damaged file may ask for any amount of memory.
_MOST_ELEMENTS = 1 << 24
#: The most axes that an array of numpy has.
_MOST_AXES = 64
#: The longest chain of operators that is followed.
_DEEPEST = 32


def constant_of(value: ir.Value | None) -> Array | None:
    """Return a value as an array, or None if it depends on the input of the model.

    An initializer counts as constant even if the graph lists it as an input, which every graph had to do
    before IR version 4.
    """
    return None if value is None else _evaluate(value, _DEEPEST, {})


def names_of(value: ir.Value | None) -> list[str]:
    """Return the names of a value: its own, then those of the values that it is a copy or a view of."""
    names: list[str] = []
    for _ in range(_DEEPEST):
        if value is None:
            break
        names.append(value.name or "")
        node = value.producer()
        if node is None or node.domain not in _DEFAULT or node.op_type not in _VIEWS or not node.inputs:
            break
        value = node.inputs[0]
    return names


def source_of(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value, past those that only copy it or change its shape or type."""
    node = value.producer() if value is not None else None
    for _ in range(_DEEPEST):
        if node is None or node.domain not in _DEFAULT:
            return None
        if node.op_type not in _VIEWS or not node.inputs or node.inputs[0] is None:
            return node
        node = node.inputs[0].producer()
    return None


def _evaluate(value: ir.Value, depth: int, known: dict[int, Array | None]) -> Array | None:
    """Return the array of a value; ``known`` has the values by ``id`` that are evaluated already."""
    if id(value) not in known:
        known[id(value)] = _computed(value, depth, known)
    return known[id(value)]


def _computed(value: ir.Value, depth: int, known: dict[int, Array | None]) -> Array | None:
    if value.const_value is not None:
        return _as_array(value.const_value)
    node = value.producer()
    if node is None or node.domain not in _DEFAULT or depth == 0:
        return None
    if node.op_type == "Constant":
        try:
            return _as_array(ir.convenience.get_const_tensor(value))
        except (ValueError, TypeError):  # a Constant with no attribute, or with several
            return None
    if node.op_type == "Shape":
        return _static_shape(node)
    function = _OPERATORS.get(node.op_type)
    if function is None:
        return None
    operands: list[Array] = []
    # The type does not matter here, so that the second operand of CastLike need not be constant.
    for operand in node.inputs[:1] if node.op_type == "CastLike" else node.inputs:
        array = None if operand is None else _evaluate(operand, depth - 1, known)
        if array is None:
            return None
        operands.append(array)
    try:
        with np.errstate(all="ignore"):  # what is not finite is found later
            result = function(node, operands)
    # NumPy raises these where the node is invalid; the value of such a node stays unknown.
    except (ValueError, TypeError, IndexError, MemoryError, OverflowError, ArithmeticError):
        return None
    return result if result.size <= _MOST_ELEMENTS else None


def _as_array(tensor: ir.TensorProtocol | None) -> Array | None:
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.size > _MOST_ELEMENTS:
        return None
    return np.asarray(tensor.numpy())


def _static_shape(node: ir.Node) -> Array | None:
    """Return the output of a Shape node, or None if the graph does not have it in numbers."""
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if shape is None:
        return None
    bounds = [node.attributes[name].value if name in node.attributes else None for name in ("start", "end")]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    sizes = list(shape)[slice(*bounds)]
    return np.array(sizes) if all(isinstance(size, int) and size >= 0 for size in sizes) else None


def _expand(node: ir.Node, operands: list[Array]) -> Array:
    shape = np.broadcast_shapes(operands[0].shape, tuple(int(size) for size in operands[1]))
    return np.broadcast_to(operands[0], shape)


def _divide(node: ir.Node, operands: list[Array]) -> Array:
    dividend, divisor = operands
    if np.issubdtype(dividend.dtype, np.integer):  # ONNX rounds toward 0
        return np.asarray(np.trunc(dividend / divisor).astype(dividend.dtype))
    return np.asarray(dividend / divisor)


def _unsqueeze(node: ir.Node, operands: list[Array]) -> Array:
    axes = operands[1].tolist() if len(operands) > 1 else list(node.attributes["axes"].as_ints())
    if len(axes) > _MOST_AXES:  # numpy would count them for minutes before it says so
        raise ValueError(f"{len(axes)} axes")
    return np.expand_dims(operands[0], tuple(axes))


def _reshape(node: ir.Node, operands: list[Array]) -> Array:
    shape = [operands[0].shape[i] if size == 0 else size for i, size in enumerate(operands[1].tolist())]
    return operands[0].reshape(shape)


def _constant_of_shape(node: ir.Node, operands: list[Array]) -> Array:
    shape = tuple(int(size) for size in operands[0])
    fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.float32(0)
    return np.broadcast_to(np.asarray(fill).reshape(()), shape)


def _range(node: ir.Node, operands: list[Array]) -> Array:
    start, limit, delta = (operand.item() for operand in operands)
    if (limit - start) / delta > _MOST_ELEMENTS:
        raise ValueError("too long")
    return np.arange(start, limit, delta)


_DEFAULT = ("", "ai.onnx")
_VIEWS = ("Identity", "Cast", "CastLike", "Unsqueeze", "Reshape", "Expand")
_OPERATORS: Mapping[str, Callable[[ir.Node, list[Array]], Array]] = {
    "Add": lambda node, operands: operands[0] + operands[1],
    "Identity": lambda node, operands: operands[0],
    "Cast": lambda node, operands: operands[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy()),
    "CastLike": lambda node, operands: operands[0],
    "Concat": lambda node, operands: np.concatenate(operands, axis=node.attributes["axis"].as_int()),
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Expand": _expand,
    "Mul": lambda node, operands: operands[0] * operands[1],
    "Neg": lambda node, operands: -operands[0],
    "Pow": lambda node, operands: operands[0] ** operands[1],
    "Range": _range,
    "Reciprocal": lambda node, operands: 1 / operands[0],
    "Reshape": _reshape,
    "Sqrt": lambda node, operands: np.sqrt(operands[0]),
    "Sub": lambda node, operands: operands[0] - operands[1],
    "Unsqueeze": _unsqueeze,
}

#: Dimensions of a value: each is a number if it is known, else a name, else None.
Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class TensorType:
    """Type and dimensions of a value, as far as they are known; ``dims`` is ``()`` for an unknown rank."""

    dtype: ir.DataType | None = None
    dims: Dims = ()

    @property
    def least_size(self) -> int:
        """Number of elements, where each dimension that is not known counts as 1, and so does 0.

        Some tools write 0 for a size that is open.
        """
        return math.prod(max(size, 1) for size in self.dims if isinstance(size, int))


def check_sizes(model: ir.Model) -> None:
    """Check that no value of a graph has too many numbers.

    The function checks twice. First it infers shapes without the values of small tensors, because computing
    these would fill the memory for a Range of a trillion numbers, or for a shape that Concat doubles again
    and again. Then it infers shapes with these values, because the sizes of other values follow from them.

    Raises:
        BnpatchError: a value has more numbers than :data:`~bnpatch.core.limits.VALUES` allows.
    """
    for with_values in (False, True):
        sizes = (known.least_size for known in infer_types(model, with_values).values())
        largest = max(sizes, default=0)
        VALUES.check(largest, f"the graph has a value of {largest:,} numbers")


def infer_types(model: ir.Model, with_values: bool = True) -> dict[int, TensorType]:
    """Return type and dimensions by ``id`` of the value, for the graph and its subgraphs.

    Shape inference runs on a copy of the model, whose values are in the same order. The model is not changed.

    Args:
        model: the model.
        with_values: follow the values of small tensors too, such as computed shapes.
    """
    copy = model.clone()
    copies = list(_values(copy.graph))  # before the pass, which leaves additional inputs behind if it fails
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=with_values)(copy)
    types = {}
    for mine, inferred in zip(_values(model.graph), copies, strict=True):
        dims = () if inferred.shape is None else tuple(_dim(size) for size in inferred.shape)
        types[id(mine)] = TensorType(inferred.dtype, dims)
    return types


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _values(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for subgraph in attribute.as_graphs():
                    yield from _values(subgraph)
        yield from node.outputs


def _dim(size: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(size, int):
        return size if size >= 0 else None  # some tools write -1 for "any"
    return size.value
