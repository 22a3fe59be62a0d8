"""Find the convolutions that may have had a Batch Norm which was folded into them.

A folded Batch Norm leaves no trace but a bias, which the convolutions of most architectures with Batch
Norm do not have of their own. So these are candidates, no more: what stands before a Softmax or at an
output, or squeezes and excites, has a bias as well.
"""

from dataclasses import dataclass, field

import onnx_ir as ir

from bnpatch.graph.constants import constant_of, names_of
from bnpatch.graph.shapes import Dims, TensorType, infer_types

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization")


@dataclass(frozen=True)
class FoldedCandidate:
    """A convolution with a bias and no norm after it.

    Attributes:
        name: dotted name of the torch module where the weight tells it, else the name of the node.
        node: the convolution.
        channels: C, the number of channels of its output.
        dims: dimensions of its output, (N, C, *spatial).
    """

    name: str
    node: ir.Node = field(repr=False)
    channels: int
    dims: Dims


def folded_candidates(model: ir.Model) -> tuple[FoldedCandidate, ...]:
    """The candidates of a model, in the order of its nodes; looks only.

    Convolutions whose output is known to have a single value per channel (the heart of squeeze and
    excite, or a classifier written as a convolution) are none: no Batch Norm would have been there.
    """
    types = infer_types(model)
    candidates = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _CONVOLUTIONS or len(node.inputs) < 3:
            continue
        weight, bias = constant_of(node.inputs[1]), constant_of(node.inputs[2])
        dims = types.get(id(node.outputs[0]), TensorType()).dims
        if weight is None or bias is None or bias.ndim != 1 or not bias.any():
            continue
        if all(size == 1 for size in dims[2:]) or _is_normalized(node.outputs[0]):
            continue
        candidates.append(FoldedCandidate(_name(node), node, int(bias.size), dims))
    return tuple(candidates)


def _is_normalized(value: ir.Value) -> bool:
    return any(use.node.op_type in _NORMS for use in value.uses())


def _name(node: ir.Node) -> str:
    for name in names_of(node.inputs[1]):
        if name.endswith(".weight"):
            return name.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type
