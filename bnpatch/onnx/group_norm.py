"""Recognise Group Norm in graphs of an opset that has no operator for it.

Both torch exporters write Group Norm as these nodes:

    Reshape to (N, G, -1) -> InstanceNormalization -> Reshape to the shape before -> Mul -> Add

The Instance Norm has a scale of ones and a bias of zeros. Mul and Add are missing if the layer has no learned
scale and shift.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnpatch.onnx.inference import Array, Dims, constant_of


@dataclass(frozen=True)
class ExportedGroupNorm:
    """The nodes of one Group Norm and its parameters.

    Attributes:
        nodes: the nodes in order, from the first Reshape to the last node.
        num_groups: G, the number of groups.
        eps: added to the variance.
        weight: learned scale of shape (C,).
        bias: learned shift of shape (C,).
        parameters: the values of the graph that hold scale and shift.
    """

    nodes: tuple[ir.Node, ...]
    num_groups: int
    eps: float
    weight: Array
    bias: Array
    parameters: list[ir.Value | None]


def find_exported_group_norm(node: ir.Node, dims: Dims) -> ExportedGroupNorm | None:
    """Return the Group Norm that an InstanceNormalization node is part of, or None.

    The result is also None if a value inside the Group Norm is used elsewhere, or if the number of channels
    is not known.

    Args:
        node: the InstanceNormalization node.
        dims: dimensions of the input of the Reshape before it, as far as they are known.
    """
    if len(node.inputs) != 3 or node.inputs[0] is None or len(node.outputs) != 1:
        return None
    ones, zeros = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    before, after = node.inputs[0].producer(), only_user(node, "Reshape")
    if ones is None or zeros is None or before is None or before.op_type != "Reshape" or after is None:
        return None
    if not np.all(ones == 1) or not np.all(zeros == 0) or only_user(before, node.op_type) is not node:
        return None
    if len(before.inputs) != 2 or not _splits_into(before.inputs[1], ones.size):
        return None
    if len(after.inputs) != 2 or not _is_shape_of(after.inputs[1], before.inputs[0]):
        return None
    nodes, parameters = [before, node, after], []
    constants: list[Array] = []
    for op_type, neutral in (("Mul", 1.0), ("Add", 0.0)):
        user = only_user(nodes[-1], op_type)
        operand = None if user is None else other_operand(user, nodes[-1].outputs[0])
        constant = constant_of(operand)
        if user is None or constant is None or not is_per_channel(constant, len(dims)):
            constants.append(np.full(1, neutral))
            continue
        constants.append(constant.reshape(-1))
        nodes.append(user)
        parameters.append(operand)
    known = dims[1] if len(dims) > 2 and isinstance(dims[1], int) else 1
    channels = max(known, *(constant.size for constant in constants))
    if (
        not ones.size
        or channels % ones.size
        or any(constant.size not in (1, channels) for constant in constants)
    ):
        return None
    weight, bias = (np.broadcast_to(constant, channels) for constant in constants)
    eps = node.attributes.get("epsilon")
    value = 1e-5 if eps is None else float(eps.value)
    return ExportedGroupNorm(tuple(nodes), ones.size, value, weight, bias, parameters)


def only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return the node of this type that alone uses the output of a node, or None."""
    output = node.outputs[0]
    # A use as the second operand of CastLike does not count, because it reads only the type.
    uses = [use for use in output.uses() if not (use.node.op_type == "CastLike" and use.idx == 1)]
    if len(uses) != 1 or output.is_graph_output():
        return None
    user = uses[0].node
    same_graph = user.graph is node.graph
    return user if user.op_type == op_type and user.domain in ("", "ai.onnx") and same_graph else None


def _splits_into(shape: ir.Value | None, num_groups: int) -> bool:
    """Tell whether a value is the shape (N, G, -1); N may be a number, or 0 to keep the size."""
    sizes = constant_of(shape)
    return sizes is not None and sizes.shape == (3,) and sizes[1] == num_groups and sizes[2] != 0


def _is_shape_of(shape: ir.Value | None, value: ir.Value | None) -> bool:
    """Tell whether a Reshape to ``shape`` restores the shape of ``value``.

    A constant with more than two entries is assumed to be that shape, (N, C, ...).
    """
    if shape is None or value is None:
        return False
    node = shape.producer()
    if node is not None and node.op_type == "Shape":
        whole = not any(
            name in node.attributes and node.attributes[name].value not in (0, None)
            for name in ("start", "end")
        )
        return whole and node.inputs[0] is value
    sizes = constant_of(shape)
    return sizes is not None and sizes.ndim == 1 and sizes.size > 2


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other input of a node that has two, or None."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def is_per_channel(constant: Array, rank: int) -> bool:
    """Tell whether a constant has one value per channel when it broadcasts with an input of this rank."""
    sizes = (1,) * (rank - constant.ndim) + constant.shape
    return len(sizes) == rank > 2 and all(size == 1 for i, size in enumerate(sizes) if i != 1)
