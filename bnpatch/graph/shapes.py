"""Type and dimensions of the values of a graph, as far as ONNX's own shape inference knows them."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

#: Dimensions of an array: a number where it is known, else a name, or None where there is none.
Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class TensorType:
    """What is known of a value; of no rank, ``()``, where its rank is not known."""

    dtype: ir.DataType | None = None
    dims: Dims = ()


def infer_types(model: ir.Model) -> dict[int, TensorType]:
    """Type and dimensions by ``id`` of the value, in the graph and its subgraphs.

    The model itself stays as it is: inference runs on a copy, whose values are in the same order.
    """
    copy = model.clone()
    copies = list(
        _values(copy.graph)
    )  # listed before: when it fails, the pass leaves inputs of its own behind
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
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
        return size if size >= 0 else None  # -1 is written by tools that mean "any"
    return size.value
