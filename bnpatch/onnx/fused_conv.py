"""Find convolutions of an ONNX graph that a Batch Norm may have been fused into, and add it again.

A fused Batch Norm leaves only one trace, a bias: in most architectures with Batch Norm, convolutions have no
bias of their own. A Batch Norm of which the graph has only a Mul and an Add, with numbers per channel, is
treated as fused, because its running statistics can't be read either. The convolutions that are found are
only candidates: one before a Softmax, at an output or in a squeeze-and-excite block has a bias, too.

The scale and shift of the Batch Norm are lost, but they are not needed, because normalization does not change
under an affine map of each channel. The output y0 of such a convolution is treated as the output of a virtual
Batch Norm. Its running statistics (b, v) are those of y0 over data like the training data, its scale is
sqrt(v + eps), and its shift is b. With alpha = 0 it returns its input; with alpha > 0 it is the formula of
the paper up to eps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import Moments
from bnpatch.onnx.decomposed import constant_steps, find_decomposed
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.inference import Array, Dims, TensorType, constant_of, infer_types, names_of
from bnpatch.onnx.statistics import centred_moments

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization")


@dataclass(frozen=True)
class FusedConv:
    """A convolution with a bias, or with a scale and a shift per channel after it, and with no norm after it.

    Attributes:
        name: dotted name of the torch module if the name of the weight tells it, else the name of the node.
        node: the convolution.
        channels: C, the number of channels of its output.
        dims: dimensions of its output, (N, C, *spatial).
    """

    name: str
    node: ir.Node = field(repr=False)
    channels: int
    dims: Dims

    @property
    def parameters(self) -> list[Array]:
        """Weight and bias of the convolution."""
        arrays = (constant_of(value) for value in self.node.inputs[1:3])
        return [array for array in arrays if array is not None]


def find_fused_convs(model: ir.Model) -> tuple[FusedConv, ...]:
    """Return the candidates of a model, in the order of its nodes. The model is not changed.

    Two kinds of convolution are left out, because they had no Batch Norm: those whose output is known to have
    one value per channel (in squeeze-and-excite, or a classifier written as a convolution), and those that
    embed patches in a model with Layer Norm (a transformer; from opset 17 on, which has that operator).
    """
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    convs = [
        node
        for node in nodes
        if node.domain in ("", "ai.onnx") and node.op_type in _CONVOLUTIONS and len(node.inputs) >= 2
    ]
    if not convs:
        return ()  # inferring types takes a second for 10,000 nodes
    types = infer_types(model)
    candidates = []
    has_layer_norm = any(node.op_type == "LayerNormalization" for node in nodes)
    for node in convs:
        dims = types.get(id(node.outputs[0]), TensorType()).dims
        channels = _shifted_channels(node, len(dims))
        if not channels or all(size == 1 for size in dims[2:]) or _is_normalized(node.outputs[0], types):
            continue
        if has_layer_norm and _embeds_patches(node):
            continue
        candidates.append(FusedConv(_name(node), node, channels, dims))
    return tuple(candidates)


def observe(model: ir.Model, candidates: Sequence[FusedConv]) -> list[tuple[str, str]]:
    """Add the moments of each candidate's output as outputs of the model, see :func:`observe_values`."""
    return observe_values(model, [(c.node.outputs[0], len(c.dims)) for c in candidates])


def observe_values(model: ir.Model, values: Sequence[tuple[ir.Value, int]]) -> list[tuple[str, str]]:
    """Add the moments of values as outputs of a model, in place.

    Args:
        model: the model.
        values: values (N, C, *spatial) of its main graph, each with its number of dimensions.

    Returns:
        For each value the names of two outputs, its mean and variance per example, (N, C, 1, ..., 1).
    """
    names = []
    opset = model.opset_imports.get("", 0)
    for index, (output, rank) in enumerate(values):
        tape = Tape(f"bnpatch/observe/{index}", opset, set())
        value = Value(tape, output, output.dtype or ir.DataType.FLOAT).cast(ir.DataType.FLOAT)
        if rank == 2:  # one value per channel has the variance 0
            parts = [Value(tape, tape.op("Identity", value.value), value.dtype), value - value]
        else:
            moments = centred_moments(value, tuple(range(2, rank)))
            parts = [moments.mean, moments.var]
        producer = output.producer()
        if producer is None:  # the value is an input of the graph
            model.graph.insert_before(model.graph[0], tape.nodes)
        else:
            model.graph.insert_after(producer, tape.nodes)
        model.graph.outputs.extend(part.value for part in parts)
        names.append((parts[0].value.name or "", parts[1].value.name or ""))
    return names


def insert_norms(model: ir.Model, moments: Mapping[str, Moments[Array]], eps: float = 1e-5) -> None:
    """Put a Batch Norm that returns its input after each named convolution, in place.

    Args:
        model: the model.
        moments: by name of convolution, mean and variance of its output, each of shape (C,).
        eps: added to the variance, so that a constant channel is not divided by 0.
    """
    for candidate in find_fused_convs(model) if moments else ():
        if candidate.name not in moments:
            continue
        mean, var = moments[candidate.name].mean, moments[candidate.name].var
        output = candidate.node.outputs[0]
        dtype = output.dtype or ir.DataType.FLOAT
        parameters = {"weight": np.sqrt(var + eps), "bias": mean, "running_mean": mean, "running_var": var}
        values = []
        for name, array in parameters.items():
            tensor = ir.tensor(array.astype(dtype.numpy()), name=f"{candidate.name}{FUSED}.{name}")
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor
            )
            model.graph.register_initializer(value)
            values.append(value)
        norm = ir.node("BatchNormalization", [output, *values], attributes={"epsilon": eps})
        norm.name = f"{candidate.name}{FUSED}"
        result = norm.outputs[0]
        result.type, result.shape = output.type, output.shape
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        norm.replace_input_with(0, output)
        result.name, output.name = output.name, f"{output.name}{FUSED}"
        _graph_of(candidate).insert_after(candidate.node, norm)


def _graph_of(candidate: FusedConv) -> ir.Graph | ir.Function:
    graph = candidate.node.graph
    assert graph is not None  # find_fused_convs found the node in a graph
    return graph


def _shifted_channels(node: ir.Node, rank: int) -> int:
    """Return the number of channels that a convolution shifts, by its bias or by an Add after it; else 0."""
    weight, bias = constant_of(node.inputs[1]), constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is not None and bias is not None and bias.ndim == 1 and bias.any():
        return int(bias.size)
    steps = constant_steps(node, rank, ("Mul", "Div", "Add", "Sub"))
    shifts = (numbers.size for step, numbers in steps if step.op_type in ("Add", "Sub"))
    return next(shifts, 0) if weight is not None else 0


def _is_normalized(value: ir.Value, types: Mapping[int, TensorType]) -> bool:
    users = [use.node for use in value.uses()]
    if any(find_decomposed(node, types) for node in users):
        return True
    # Exporters write Group Norm as a Reshape followed by an Instance Norm.
    users += [use.node for node in users if node.op_type == "Reshape" for use in node.outputs[0].uses()]
    return any(node.op_type in _NORMS for node in users)


def _embeds_patches(node: ir.Node) -> bool:
    """Tell whether a convolution takes patches that do not overlap (kernel size = stride > 1)."""
    weight, strides = constant_of(node.inputs[1]), node.attributes.get("strides")
    if node.op_type != "Conv" or weight is None or strides is None:
        return False
    return list(weight.shape[2:]) == list(strides.as_ints()) and max(strides.as_ints()) > 1


def _name(node: ir.Node) -> str:
    for name in names_of(node.inputs[1]):
        if name.endswith(".weight"):
            return name.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type
