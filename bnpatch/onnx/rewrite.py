"""Rewrite the norm layers of an ONNX graph, in place, so that they weight the example.

The rewrite uses standard operators only. It keeps the opset, the IR version, metadata, doc strings, the order
of the other nodes, and the names, types and dimensions of inputs and outputs. It also keeps every norm layer
whose alpha is that of the baseline, so that a runtime fuses it as before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from bnpatch.core.errors import BnpatchError, check_weight
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.patch import BESIDE_ALPHA, PatchWeights
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.formulas import append_batch_norm, append_norm
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import MARK, OnnxNormLayer, inventory

#: Appends the nodes that replace a norm layer; takes the arguments of :func:`append_norm`.
Append = Callable[..., ir.Value]

AlphaInputs = Literal["global", "per-site"]


class _Use(Enum):
    """What becomes of a norm layer."""

    WEIGHTED = auto()
    OTHER_STATISTICS = auto()  # Batch Norm by other running statistics, without a weight of the example
    KEPT = auto()


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite did.

    Attributes:
        patched: names of the norm layers that were rewritten.
        weight_inputs: by kind of weight ("alpha", "slope", "var_offset") and by name of norm layer, the graph
            input for it; empty if the weights are constants, or if no norm layer has this kind.
        running_inputs: by name of norm layer, the graph inputs for its running mean and variance; empty if
            they are constants.
    """

    patched: tuple[str, ...]
    weight_inputs: Mapping[str, Mapping[str, str]]
    running_inputs: Mapping[str, tuple[str, str]]


def rewrite(
    model: ir.Model,
    weights: PatchWeights,
    *,
    running: Mapping[str, Moments[Array]] | None = None,
    channels_per_group: Mapping[str, int] | None = None,
    alpha_inputs: AlphaInputs | None = None,
    running_inputs: bool = False,
    include_1x1: bool = False,
    append: Append = append_norm,
) -> Rewritten:
    """Rewrite the norm layers for which there is an alpha, in place.

    The name of a module stands for all norm layers of that module, in the weights and in the other mappings.

    Args:
        model: the model.
        weights: alphas, slopes and offsets. Norm layers without an alpha are kept as they are. Lambdas don't
            matter here, because ``running`` has the statistics that they lead to.
        running: running mean and variance, each of shape (C,), that replace those in the model or that the
            model lacks (Group Norm).
        channels_per_group: the number of consecutive channels whose moments are pooled, for a Batch/Group
            Norm, which the model stores as Batch Norm.
        alpha_inputs: None writes the weights into the graph as constants, and keeps norm layers whose alpha
            is that of the baseline. ``"global"`` adds one graph input for all alphas, ``"per-site"`` one for
            each norm layer. The inputs are float32 scalars with ``weights`` as defaults. Slopes and offsets
            become inputs in the same way.
        running_inputs: also add graph inputs for the running statistics, float32 of shape (C,), with the
            moments above as defaults. A search uses them, because it changes the moments often.
        include_1x1: also rewrite norm layers whose input is known to have one value per example and channel,
            which are kept by default.
        append: appends the nodes that replace a norm layer.

    Returns:
        What was rewritten, and the names of the new inputs.

    Raises:
        BnpatchError: a name is no norm layer, a norm layer has no running statistics and none are given, or
            the weights for a global input differ.
        InvalidWeightError: a weight is out of its range.
        ValueError: running statistics have another shape or are not finite.
    """
    found = _regrouped(inventory(model).norm_layers, channels_per_group or {})
    numbers = _numbers(weights, found, alpha_inputs)
    alphas = numbers["alpha"]
    named = [norm_layer for norm_layer in found if norm_layer.name in alphas]
    moments = {norm_layer.name: _running_moments(norm_layer, running or {}) for norm_layer in named}

    def use(norm_layer: OnnxNormLayer) -> _Use:
        other = norm_layer.baseline_alpha == 0 and (running_inputs or _is_given(norm_layer, running or {}))
        constant = alphas[norm_layer.name] if alpha_inputs is None else None
        return _use(norm_layer, constant, other_statistics=other, include_1x1=include_1x1)

    uses = {norm_layer.name: use(norm_layer) for norm_layer in named}
    chosen = [norm_layer for norm_layer in named if uses[norm_layer.name] is not _Use.KEPT]
    weighted = [norm_layer for norm_layer in chosen if uses[norm_layer.name] is _Use.WEIGHTED]
    _check_moments(chosen, moments)
    taken = _names(model)
    inputs = {
        kind: _add_inputs(model.graph, kind, weighted, values, alpha_inputs, taken)
        for kind, values in numbers.items()
    }
    given = _add_running_inputs(model.graph, chosen, moments, taken) if running_inputs else {}
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for norm_layer in chosen:
        name = norm_layer.name
        tape = Tape(f"{name}{MARK.rstrip('/')}", opset, taken)
        if uses[name] is _Use.OTHER_STATISTICS:
            result = append_batch_norm(tape, norm_layer, moments[name], given.get(name))
        else:
            used = {kind: inputs[kind].get(name, values.get(name, 0.0)) for kind, values in numbers.items()}
            weight = ExampleWeight(used["alpha"]) if used["alpha"] in (0, 1) else ExampleWeight(**used)
            if norm_layer.may_have_single_values and not include_1x1:
                weight = weight._replace(alpha=_unless_single_values(tape, norm_layer, weight.alpha))
            options = {"given": given[name]} if name in given else {}
            result = append(tape, norm_layer, moments[name], weight, **options)
        _replace(norm_layer, tape, result)
    return Rewritten(
        tuple(norm_layer.name for norm_layer in chosen),
        {kind: {name: v.name or "" for name, v in values.items()} for kind, values in inputs.items()},
        {name: (value.mean.name or "", value.var.name or "") for name, value in given.items()},
    )


def _numbers(
    weights: PatchWeights, norm_layers: list[OnnxNormLayer], alpha_inputs: AlphaInputs | None
) -> dict[str, dict[str, float]]:
    """Return the weights by kind and by name of norm layer; raise an error if one input can't serve all."""
    numbers = {kind: _by_norm(kind, weights.of(kind), norm_layers) for kind in ("alpha", *BESIDE_ALPHA)}
    for kind, values in numbers.items():
        if alpha_inputs == "global" and len(set(values.values())) > 1:
            raise BnpatchError(
                f"one {kind} input for all norm layers has one default, but the {kind}s differ",
                "leave one adjustable for each: --alpha-input per-site",
            )
    return numbers


def _use(
    norm_layer: OnnxNormLayer, constant: float | None, *, other_statistics: bool, include_1x1: bool
) -> _Use:
    """Decide what becomes of a norm layer.

    Args:
        norm_layer: the norm layer.
        constant: its alpha; None if that is an input of the graph.
        other_statistics: whether it may get other running statistics.
        include_1x1: see :func:`rewrite`.
    """
    if constant == norm_layer.baseline_alpha or (norm_layer.single_value and not include_1x1):
        return _Use.OTHER_STATISTICS if other_statistics else _Use.KEPT
    return _Use.WEIGHTED


def _regrouped(found: Sequence[OnnxNormLayer], groups: Mapping[str, int]) -> list[OnnxNormLayer]:
    return [replace(n, channels_per_group=groups.get(n.module_name, n.channels_per_group)) for n in found]


def _by_norm(kind: str, weights: Mapping[str, float], norm_layers: list[OnnxNormLayer]) -> dict[str, float]:
    known = {name for norm_layer in norm_layers for name in (norm_layer.name, norm_layer.module_name)}
    if unknown := [name for name in weights if name not in known]:
        some = ", ".join(norm_layer.name for norm_layer in norm_layers[:5])
        more = ", ..." if len(norm_layers) > 5 else ""
        raise BnpatchError(
            f"the model has no norm layer {unknown[0]!r}",
            f"its norm layers are {some}{more}" if norm_layers else "it has none",
        )
    for name, weight in weights.items():
        check_weight(kind, weight, name)
    by_norm = {n.name: weights.get(n.name, weights.get(n.module_name)) for n in norm_layers}
    return {name: float(weight) for name, weight in by_norm.items() if weight is not None}


def _is_given(norm_layer: OnnxNormLayer, running: Mapping[str, Moments[Array]]) -> bool:
    return norm_layer.name in running or norm_layer.module_name in running


def _running_moments(norm_layer: OnnxNormLayer, given: Mapping[str, Moments[Array]]) -> Moments[Any]:
    """Return the given running statistics of a norm layer, else its own, which may be None."""
    if not _is_given(norm_layer, given):
        return Moments(norm_layer.running_mean, norm_layer.running_var)
    moments = given.get(norm_layer.name, given.get(norm_layer.module_name))
    assert moments is not None
    name, shape = norm_layer.name, (norm_layer.num_channels,)
    arrays = [np.asarray(part, np.float64) for part in (moments.mean, moments.var)]
    if any(array.shape != shape or not np.all(np.isfinite(array)) for array in arrays):
        raise ValueError(f"running statistics of {name!r} must be finite and of shape {shape}")
    if np.any(arrays[1] < 0):
        raise ValueError(f"the running variance of {name!r} is negative somewhere")
    return Moments(*arrays)


def _check_moments(norm_layers: list[OnnxNormLayer], moments: Mapping[str, Moments[Any]]) -> None:
    for norm_layer in norm_layers:
        if moments[norm_layer.name].mean is None:
            raise BnpatchError(
                f"the norm layer {norm_layer.name!r} ({norm_layer.kind}) has no running statistics",
                "estimate them on data, or leave it out",
            )


def _add_inputs(
    graph: ir.Graph,
    kind: str,
    norm_layers: list[OnnxNormLayer],
    weights: Mapping[str, float],
    mode: AlphaInputs | None,
    taken: set[str],
) -> dict[str, ir.Value]:
    names = [norm_layer.name for norm_layer in norm_layers if norm_layer.name in weights]
    if mode is None or not names:
        return {}
    if mode == "global":
        return dict.fromkeys(names, _add_input(graph, kind, weights[names[0]], taken))
    return {name: _add_input(graph, f"{kind}.{name}", weights[name], taken) for name in names}


def _add_running_inputs(
    graph: ir.Graph, norm_layers: list[OnnxNormLayer], moments: Mapping[str, Moments[Array]], taken: set[str]
) -> dict[str, Moments[ir.Value]]:
    return {
        name: Moments(
            mean=_add_input(graph, f"running_mean.{name}", moments[name].mean, taken),
            var=_add_input(graph, f"running_var.{name}", moments[name].var, taken),
        )
        for name in (norm_layer.name for norm_layer in norm_layers)
    }


def _add_input(graph: ir.Graph, name: str, default: float | Array, taken: set[str]) -> ir.Value:
    """Add a graph input that is also an initializer, whose value is the default of the input."""
    while name in taken:
        name += "_"
    taken.add(name)
    array = np.asarray(default, np.float32)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def _unless_single_values(tape: Tape, norm_layer: OnnxNormLayer, alpha: float | ir.Value) -> ir.Value:
    """Append nodes that return alpha, or the baseline's alpha if an example has one value per channel."""
    sizes = Value(tape, tape.op("Shape", norm_layer.input, dtype=ir.DataType.INT64)).cast(ir.DataType.FLOAT)
    spatial = tape.constant(np.arange(2, len(norm_layer.dims)), ir.DataType.INT64)
    count = tape.op("ReduceProd", tape.op("Gather", sizes.value, spatial, dtype=sizes.dtype), keepdims=0)
    more_than_one = tape.op("Min", (Value(tape, count) - 1.0).value, tape.constant(1.0, ir.DataType.FLOAT))
    weight = Value(tape, alpha) if isinstance(alpha, ir.Value) else alpha
    gated = Value(tape, more_than_one) * (weight - norm_layer.baseline_alpha) + norm_layer.baseline_alpha
    return gated.value


def _names(model: ir.Model) -> set[str]:
    names = {
        value.name or ""
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values())
    }
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        names.add(node.name or "")
        names.update(output.name or "" for output in node.outputs)
    return names


def _replace(norm_layer: OnnxNormLayer, tape: Tape, result: ir.Value) -> None:
    """Replace the nodes of a norm layer by those on the tape; the output keeps its name."""
    graph, output = norm_layer.node.graph, norm_layer.output
    assert graph is not None  # the inventory found the node in a graph
    old = norm_layer.node
    same = (node for node in tape.nodes if node.op_type == old.op_type == "BatchNormalization")
    if new := next(same, None):  # a new node of the same operator keeps the name, which tools may refer to
        new.name, new.doc_string = old.name, old.doc_string
        new.metadata_props.update(old.metadata_props)
    graph.insert_after(norm_layer.node, tape.nodes)
    name, result.type, result.shape = output.name, output.type, output.shape
    result.doc_string = output.doc_string
    result.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    output.name = None
    _drop_unused(norm_layer.node)
    result.name = name


def _drop_unused(node: ir.Node) -> None:
    """Remove a node if its outputs are unused, and then the nodes and initializers that only it used.

    Inputs of a graph stay.
    """
    graph = node.graph
    if graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in dict.fromkeys(inputs):
        if (producer := value.producer()) is not None:
            _drop_unused(producer)
        elif value.is_initializer() and not (
            value.uses() or value.is_graph_input() or value.is_graph_output()
        ):
            owner = value.graph
            if owner is not None and value.name is not None:
                del owner.initializers[value.name]
