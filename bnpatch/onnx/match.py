"""Find the normalization layers of an ONNX graph: the norm layers, and the skipped norms with reasons.

A norm layer gets the dotted name of its torch module, which exporters keep in the names of the parameters
(``layer1.0.bn1.weight``).
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from bnpatch.core.inventory import SCALE_AND_SHIFT, Inventory, SkippedNorm
from bnpatch.core.text import counted
from bnpatch.onnx.decomposed import find_decomposed, is_affine
from bnpatch.onnx.group_norm import find_exported_group_norm
from bnpatch.onnx.inference import NORMS, Array, Dims, TensorType, constant_of, infer_types, names_of

#: Part of the name of every node and value that a rewrite adds.
MARK = "/bnpatch/"

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LIBRARIES = ("torch.", "timm.", "torchvision.")  # in these, classes with "norm" in their names are norms
_PARAMETER = re.compile(r"(.+)\.(?:running_mean|running_var|weight|bias)$")
_GROUP_NORM_PER_CHANNEL = 21  # from this opset on, the scale has one value per channel, not per group


@dataclass(frozen=True)
class OnnxNormLayer:
    """A Batch Norm or Group Norm in a graph.

    Attributes:
        name: dotted name of the torch module if the parameters or the exporter's metadata tell it, else the
            name of the node, else that of its output; unique in the model.
        module_name: the name before it was made unique. A torch module that is called several times gives
            several norm layers with the same value here.
        kind: ``BatchNormalization`` or ``GroupNormalization``.
        nodes: the nodes that compute it, in order; the last one has the output.
        operand: which input of the first node is normalized.
        dtype: type of the input.
        dims: dimensions of the input, (N, C, *spatial).
        channels_per_group: number of consecutive channels whose moments are pooled; 1 is Batch Norm.
        eps: added to the variance.
        weight: learned scale (gamma) of shape (C,).
        bias: learned shift (beta) of shape (C,).
        running_mean: running mean of shape (C,), or None if it has to be computed from data.
        running_var: running variance of shape (C,), or None likewise.
    """

    name: str
    module_name: str
    kind: str
    nodes: tuple[ir.Node, ...] = field(repr=False)
    dtype: ir.DataType
    dims: Dims
    channels_per_group: int
    eps: float
    weight: Array = field(repr=False)
    bias: Array = field(repr=False)
    running_mean: Array | None = field(default=None, repr=False)
    running_var: Array | None = field(default=None, repr=False)
    operand: int = field(default=0, kw_only=True)

    @property
    def node(self) -> ir.Node:
        """The last node, which has the output."""
        return self.nodes[-1]

    @property
    def input(self) -> ir.Value:
        """The value that is normalized, (N, C, *spatial)."""
        value = self.nodes[0].inputs[self.operand]
        assert value is not None  # _classified has read its type
        return value

    @property
    def output(self) -> ir.Value:
        """The result, of the shape of the input."""
        return self.node.outputs[0]

    @property
    def num_channels(self) -> int:
        """C, the number of channels."""
        return int(self.weight.size)

    @property
    def baseline_alpha(self) -> float:
        """The alpha at which the norm layer computes what the original does."""
        return 0.0 if self.kind == "BatchNormalization" else 1.0

    @property
    def needs_calibration(self) -> bool:
        """Whether the norm layer has no running statistics, so that they have to be computed from data."""
        return self.running_mean is None

    @property
    def single_value(self) -> bool:
        """Whether an example is known to have one value per channel, and therefore no variance.

        It is False for a Batch Norm that pools channels, because the pooled values have a variance.
        """
        return not self._pools_channels and all(size == 1 for size in self.dims[2:])

    @property
    def may_have_single_values(self) -> bool:
        """Whether an example may have one value per channel, because the graph leaves its size open."""
        return not (self._pools_channels or any(isinstance(n, int) and n != 1 for n in self.dims[2:]))

    @property
    def _pools_channels(self) -> bool:
        return self.channels_per_group > 1 and self.baseline_alpha == 0


def inventory(model: ir.Model) -> Inventory[OnnxNormLayer]:
    """List the norm layers of a model, and the skipped norms with reasons. The model is not changed.

    The function also searches subgraphs (If, Loop, Scan). It lists norms in model-local functions as skipped,
    because all calls of such a function share one body; :func:`bnpatch.onnx.io.inline_norms` gives every call
    its own.
    """
    types = infer_types(model)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    names: dict[str, int] = {}
    norm_layers: list[OnnxNormLayer] = []
    skipped_norms: list[SkippedNorm] = []
    for node, function in _nodes(model):
        found = _classified(node, opset, types, function)
        if isinstance(found, OnnxNormLayer):
            norm_layers.append(replace(found, name=_unique(found.module_name, names)))
        elif isinstance(found, SkippedNorm):
            skipped_norms.append(found)
    return Inventory(tuple(norm_layers), tuple(skipped_norms))


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield node, ""
    for function in model.functions.values():
        for node in ir.traversal.RecursiveGraphIterator(function):
            yield node, function.name


def _classified(
    node: ir.Node, opset: int, types: Mapping[int, TensorType], function: str
) -> OnnxNormLayer | SkippedNorm | None:
    """Return a norm layer, a skipped norm with the reason, or None for a node that is no norm."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type not in NORMS:
        return None if function else _classified_arithmetic(node, types)
    kind = node.op_type
    try:
        if function:
            raise _SkippedError(
                f"it lies in the model-local function {function!r}, which has to be inlined first"
            )
        if kind == "BatchNormalization":
            return _batch_norm(node, opset, types)
        if kind == "GroupNormalization":
            return _group_norm(node, opset, types)
        input_ = _type_of(_input_of_producer(node), types)
        if exported := find_exported_group_norm(node, input_.dims):
            kind = "GroupNormalization"
            return _norm_layer(
                exported.nodes, kind, input_, exported.num_groups, exported.eps,
                [exported.weight, exported.bias], _module_name(exported.nodes[-1], exported.parameters),
            )  # fmt: skip
        raise _SkippedError("Instance Norm normalizes by the example alone, on purpose")
    except _SkippedError as reason:
        return SkippedNorm(_module_name(node, list(node.inputs[1:])), kind, str(reason))


def _classified_arithmetic(
    node: ir.Node, types: Mapping[int, TensorType]
) -> OnnxNormLayer | SkippedNorm | None:
    """Classify a node, as :func:`_classified` does, that may begin a Batch Norm of simpler operators."""
    if (found := find_decomposed(node, types)) is not None:
        input_ = _type_of(node.inputs[found.operand], types)
        name = _module_name(found.nodes[-1], found.values)
        try:
            layer = _norm_layer(
                found.nodes, "BatchNormalization", input_, found.parameters[0].size, found.eps,
                found.parameters, name,
            )  # fmt: skip
            return replace(layer, operand=found.operand)
        except _SkippedError as reason:
            return SkippedNorm(name, "BatchNormalization", str(reason))
    if is_affine(node, types):
        return SkippedNorm(_module_name(node, list(node.inputs)), "Mul, Add", SCALE_AND_SHIFT)
    return None


class _SkippedError(Exception):
    """A node is skipped; the message says why."""


def _batch_norm(node: ir.Node, opset: int, types: Mapping[int, TensorType]) -> OnnxNormLayer:
    if opset < 7:
        raise _SkippedError(
            f"BatchNormalization of opset {opset} is another operator: convert the model to 7 or newer"
        )
    if _int(node, "training_mode", 0):
        raise _SkippedError(
            "it runs in training mode: it normalizes by its own batch, or standardizes weights"
        )
    if opset < 9 and not _int(node, "spatial", 1):
        raise _SkippedError("it has moments per position (spatial = 0), not per channel")
    if len(node.inputs) != 5 or any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]):
        raise _SkippedError("it has another number of inputs or outputs than at inference")
    parameters = [
        _parameter(value, ("scale", "bias", "mean", "var")[i]) for i, value in enumerate(node.inputs[1:])
    ]
    if any(MARK in name for name in names_of(node.inputs[1])):
        raise _SkippedError("it belongs to a patch: patch the original model instead")
    if not np.all(parameters[3] >= 0):
        raise _SkippedError("its running variance is negative somewhere")
    input_ = _type_of(node.inputs[0], types)
    name = _module_name(node, [node.inputs[i] for i in (3, 4, 1, 2)])
    return _norm_layer((node,), node.op_type, input_, parameters[0].size, _eps(node), parameters, name)


def _group_norm(node: ir.Node, opset: int, types: Mapping[int, TensorType]) -> OnnxNormLayer:
    if len(node.inputs) != 3:
        raise _SkippedError("it has another number of inputs than its operator")
    num_groups = _int(node, "num_groups", 0)
    parameters = [_parameter(value, ("scale", "bias")[i]) for i, value in enumerate(node.inputs[1:])]
    input_ = _type_of(node.inputs[0], types)
    if opset < _GROUP_NORM_PER_CHANNEL:
        channels = input_.dims[1] if len(input_.dims) > 1 else None
        if not isinstance(channels, int) or num_groups < 1 or channels % num_groups:
            raise _SkippedError("its number of channels is not known, and its scale has one value per group")
        parameters = [np.repeat(parameter, channels // num_groups) for parameter in parameters]
    name = _module_name(node, list(node.inputs[1:]))
    return _norm_layer((node,), node.op_type, input_, num_groups, _eps(node), parameters, name)


def _norm_layer(
    nodes: tuple[ir.Node, ...], kind: str, input_: TensorType, num_groups: int, eps: float,
    parameters: list[Array], name: str,
) -> OnnxNormLayer:  # fmt: skip
    channels = parameters[0].size
    if len({parameter.size for parameter in parameters}) > 1 or channels == 0:
        raise _SkippedError("its parameters differ in size, or are empty")
    if num_groups < 1 or channels % num_groups:
        raise _SkippedError(
            f"its {counted(channels, 'channel')} can't be divided into {counted(num_groups, 'group')}"
        )
    if not all(np.all(np.isfinite(parameter)) for parameter in parameters) or not np.isfinite(eps) or eps < 0:
        raise _SkippedError("its parameters are not finite (overflowed in float16, perhaps)")
    if input_.dtype not in _FLOATS:
        raise _SkippedError("the type of its input is not known, or not floating point")
    if len(input_.dims) < 2:
        raise _SkippedError("the rank of its input is not known, or below 2")
    if isinstance(input_.dims[1], int) and input_.dims[1] != channels:
        raise _SkippedError(f"its input has {counted(input_.dims[1], 'channel')}, its parameters {channels}")
    dims = (input_.dims[0], channels, *input_.dims[2:])
    return OnnxNormLayer(
        name, name, kind, nodes, input_.dtype, dims, channels // num_groups, eps,
        *(parameter.astype(np.float64) for parameter in parameters),
    )  # fmt: skip


def _parameter(value: ir.Value | None, role: str) -> Array:
    array = constant_of(value)
    if array is None:
        raise _SkippedError(f"its {role} is computed at run time")
    if array.ndim != 1:
        raise _SkippedError(f"its {role} has shape {array.shape}, not one value per channel")
    return array.astype(np.float64)


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(_number(node, name, ir.AttributeType.INT, default))


def _eps(node: ir.Node) -> float:
    return _number(node, "epsilon", ir.AttributeType.FLOAT, 1e-5)


def _number(node: ir.Node, name: str, kind: ir.AttributeType, default: float) -> float:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.is_ref() or attribute.type != kind:
        raise _SkippedError(f"its attribute {name} is not a number")
    return float(attribute.value)


def _module_name(node: ir.Node, parameters: list[ir.Value | None]) -> str:
    for value in parameters:
        for name in names_of(value):
            if match := _PARAMETER.match(name):
                return match.group(1)
    return _scope(node) or node.name or node.outputs[0].name or node.op_type


def _scope(node: ir.Node) -> str:
    """Return the name of the norm module that a node comes from, or of the call in another module's forward.

    The name is in the metadata that torch's exporter writes; it is empty if there are none.
    """
    try:
        scopes, classes = (
            [str(part) for part in ast.literal_eval(node.metadata_props.get(key, "[]"))]
            for key in ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
        )
    except (ValueError, SyntaxError, TypeError):  # another tool wrote something else under these keys
        return ""
    if len(scopes) < 2 or len(classes) < 2:
        return ""
    library, _, name = classes[-2].rpartition(".")
    if library.startswith(_LIBRARIES) and "norm" in name.lower():
        return scopes[-2]
    return ".".join(filter(None, scopes[-2:]))


def _unique(name: str, used: dict[str, int]) -> str:
    """Return a name that is not used yet; ``used`` has the last number that was added to each."""
    unique, count = name, used.get(name, 1)
    while unique in used:
        count += 1
        unique = f"{name}#{count}"
    used[name] = count
    used.setdefault(unique, 1)
    return unique


def _input_of_producer(node: ir.Node) -> ir.Value | None:
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return producer.inputs[0] if producer is not None and producer.inputs else None


def _type_of(value: ir.Value | None, types: Mapping[int, TensorType]) -> TensorType:
    return types.get(id(value), TensorType()) if value is not None else TensorType()
