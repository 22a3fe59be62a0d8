"""Rewrite the norm layers of an ONNX graph, in place, so that they weight the example.

The rewrite uses standard operators only. It keeps the opset, the IR version, metadata, doc strings, the order
of the other nodes, and the names, types and dimensions of inputs and outputs. It also keeps every norm layer
whose alpha is that of the baseline, so that a runtime fuses it as before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from bnpatch.core.errors import BnpatchError, check_alpha, check_slope
from bnpatch.core.inventory import Inventory, SkippedNorm
from bnpatch.core.moments import Moments
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.formulas import append_batch_norm, append_norm
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import MARK, OnnxNormLayer, inventory

#: Appends the nodes that replace a norm layer; takes the arguments of :func:`append_norm`.
Append = Callable[..., ir.Value]

AlphaInputs = Literal["global", "per-site"]


class _Use(Enum):
    """What becomes of a norm layer; all but the first two leave it as it is."""

    WEIGHTED = auto()
    MOVED = auto()  # Batch Norm that does not weight the example, but gets other running statistics
    UNNAMED = auto()
    AT_BASELINE = auto()
    SINGLE_VALUE = auto()


_REASONS = {
    _Use.UNNAMED: "no alpha was given for it",
    _Use.AT_BASELINE: "its alpha is that of the baseline",
    _Use.SINGLE_VALUE: "an example has one value per channel here, so it would mostly shrink the signal",
}


@dataclass(frozen=True)
class Rewritten:
    """The result of a rewrite.

    Attributes:
        model: the model that was given.
        patched: names of the norm layers that were rewritten.
        skipped_norms: every other normalization layer, and why it was skipped.
        alpha_inputs: by name of norm layer, the graph input for its alpha; empty if alphas are constants.
        slope_inputs: the same for its slope; norm layers without a slope are missing.
        running_inputs: by name of norm layer, the graph inputs for its running mean and variance; empty if
            they are constants.
    """

    model: ir.Model = field(repr=False)
    patched: tuple[str, ...]
    skipped_norms: tuple[SkippedNorm, ...]
    alpha_inputs: Mapping[str, str]
    running_inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    slope_inputs: Mapping[str, str] = field(default_factory=dict)


def rewrite(
    model: ir.Model,
    alphas: Mapping[str, float],
    *,
    running: Mapping[str, Moments[Array]] | None = None,
    channels_per_group: Mapping[str, int] | None = None,
    alpha_inputs: AlphaInputs | None = None,
    running_inputs: bool = False,
    include_1x1: bool = False,
    slopes: Mapping[str, float] | None = None,
    append: Append = append_norm,
) -> Rewritten:
    """Rewrite the norm layers that ``alphas`` names, in place.

    Args:
        model: the model.
        alphas: weight of the example, in [0, 1], by name of norm layer. The name of a module stands for all
            norm layers of that module. Norm layers that are not named are skipped.
        running: by name of norm layer, running mean and variance, each of shape (C,), that replace those in
            the model or that the model lacks (Group Norm).
        channels_per_group: by name of module, the number of consecutive channels whose moments are pooled,
            for a Batch/Group Norm, which the model stores as Batch Norm.
        alpha_inputs: None writes the alphas into the graph as constants, and keeps norm layers whose alpha
            is that of the baseline. ``"global"`` adds one graph input for all alphas, ``"per-site"`` one for
            each norm layer. The inputs are float32 scalars with ``alphas`` as defaults. The slopes become
            inputs in the same way.
        running_inputs: also add graph inputs for the running statistics, float32 of shape (C,), with the
            moments above as defaults. A search uses them, because it changes the moments often.
        include_1x1: also rewrite norm layers whose input is known to have one value per example and channel,
            which are skipped by default.
        slopes: how much the weight depends on the distance of the example, in [-4, 4], by name like
            ``alphas``. Norm layers that are not named have none.
        append: appends the nodes that replace a norm layer.

    Returns:
        The model, and what was rewritten and skipped.

    Raises:
        BnpatchError: a name is no norm layer, or a norm layer has no running statistics and none are given.
        InvalidAlphaError: an alpha is not in [0, 1].
        InvalidSlopeError: a slope is not in [-4, 4].
        ValueError: the alphas or the slopes for a global input differ, or running statistics have another
            shape or are not finite.
    """
    found = _regrouped(inventory(model), channels_per_group or {})
    by_norm = _by_norm(alphas, found.norm_layers, check_alpha)
    slope_by_norm = _by_norm(slopes or {}, found.norm_layers, check_slope)
    for name, values in (("alpha", by_norm), ("slope", slope_by_norm)):
        if alpha_inputs == "global" and len(set(values.values())) > 1:
            raise ValueError(f"one {name} input for all norm layers has one default, but the {name}s differ")
    moments = {
        norm_layer.name: _running_moments(norm_layer, running or {})
        for norm_layer in found.norm_layers
        if norm_layer.name in by_norm
    }

    def use(norm_layer: OnnxNormLayer) -> _Use:
        moves = norm_layer.baseline_alpha == 0 and (running_inputs or _is_given(norm_layer, running))
        constant = by_norm.get(norm_layer.name), alpha_inputs is None
        return _use(norm_layer, *constant, moves=moves, include_1x1=include_1x1)

    uses = {norm_layer.name: use(norm_layer) for norm_layer in found.norm_layers}
    chosen = [norm_layer for norm_layer in found.norm_layers if uses[norm_layer.name] not in _REASONS]
    if missing := [norm_layer for norm_layer in chosen if moments[norm_layer.name] is None]:
        raise BnpatchError(
            f"the norm layer {missing[0].name!r} ({missing[0].kind}) has no running statistics",
            "estimate them on data, or leave it out",
        )
    taken = _names(model)
    weighted = [norm_layer for norm_layer in chosen if uses[norm_layer.name] is _Use.WEIGHTED]
    inputs = _add_inputs(model.graph, "alpha", weighted, by_norm, alpha_inputs, taken)
    slope_inputs = _add_inputs(model.graph, "slope", weighted, slope_by_norm, alpha_inputs, taken)
    running_names: dict[str, tuple[str, str]] = {}
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for norm_layer in chosen:
        name, norm_moments = norm_layer.name, moments[norm_layer.name]
        assert norm_moments is not None  # checked above
        tape = Tape(f"{name}{MARK.rstrip('/')}", opset, taken)
        given = None
        if running_inputs:
            given = _add_running_inputs(model.graph, norm_layer, norm_moments, taken)
            running_names[name] = (given.mean.name or "", given.var.name or "")
        if uses[name] is _Use.MOVED:
            result = append_batch_norm(tape, norm_layer, norm_moments, given)
        else:
            alpha = inputs.get(name, by_norm[name])
            slope = slope_inputs.get(name, slope_by_norm.get(name, 0.0))
            options = _options(given, alpha, slope)
            if norm_layer.may_have_single_values and not include_1x1:
                alpha = _unless_single_values(tape, norm_layer, alpha)
            result = append(tape, norm_layer, norm_moments, alpha, **options)
        _replace(norm_layer, tape, result)
    left = tuple(
        SkippedNorm(norm_layer.name, norm_layer.kind, _REASONS[uses[norm_layer.name]])
        for norm_layer in found.norm_layers
        if uses[norm_layer.name] in _REASONS
    )
    return Rewritten(
        model,
        tuple(norm_layer.name for norm_layer in chosen),
        (*left, *found.skipped_norms),
        {norm_layer: value.name or "" for norm_layer, value in inputs.items()},
        running_names,
        {norm_layer: value.name or "" for norm_layer, value in slope_inputs.items()},
    )


def _use(
    norm_layer: OnnxNormLayer, alpha: float | None, constant: bool, *, moves: bool, include_1x1: bool
) -> _Use:
    """Decide what becomes of a norm layer; ``moves`` tells whether it may get other running statistics."""
    if alpha is None:
        return _Use.UNNAMED
    if constant and alpha == norm_layer.baseline_alpha:
        return _Use.MOVED if moves else _Use.AT_BASELINE
    if norm_layer.single_value and not include_1x1:
        return _Use.MOVED if moves else _Use.SINGLE_VALUE
    return _Use.WEIGHTED


def _options(
    given: Moments[ir.Value] | None, alpha: float | ir.Value, slope: float | ir.Value
) -> dict[str, Any]:
    """The arguments of ``append`` that are not at their defaults."""
    options: dict[str, Any] = {} if given is None else {"given": given}
    if slope != 0 and alpha not in (0, 1):  # no slope changes these weights
        options["slope"] = slope
    return options


def _regrouped(found: Inventory[OnnxNormLayer], groups: Mapping[str, int]) -> Inventory[OnnxNormLayer]:
    norm_layers = (
        replace(norm_layer, channels_per_group=groups.get(norm_layer.module, norm_layer.channels_per_group))
        for norm_layer in found.norm_layers
    )
    return Inventory(tuple(norm_layers), found.skipped_norms)


def _by_norm(
    weights: Mapping[str, float], norm_layers: tuple[OnnxNormLayer, ...], check: Callable[[float, str], float]
) -> dict[str, float]:
    known = {name for norm_layer in norm_layers for name in (norm_layer.name, norm_layer.module)}
    if unknown := [name for name in weights if name not in known]:
        some = ", ".join(norm_layer.name for norm_layer in norm_layers[:5]) + (
            ", ..." if len(norm_layers) > 5 else ""
        )
        raise BnpatchError(
            f"the model has no norm layer {unknown[0]!r}",
            f"its norm layers are {some}" if norm_layers else "it has none",
        )
    for name, weight in weights.items():
        check(weight, name)
    by_norm = {
        norm_layer.name: weights.get(norm_layer.name, weights.get(norm_layer.module))
        for norm_layer in norm_layers
    }
    return {name: float(weight) for name, weight in by_norm.items() if weight is not None}


def _is_given(norm_layer: OnnxNormLayer, running: Mapping[str, Moments[Array]] | None) -> bool:
    return running is not None and (norm_layer.name in running or norm_layer.module in running)


def _running_moments(norm_layer: OnnxNormLayer, given: Mapping[str, Moments[Array]]) -> Moments[Array] | None:
    moments = given.get(norm_layer.name, given.get(norm_layer.module))
    if moments is None:
        if norm_layer.running_mean is None or norm_layer.running_var is None:
            return None
        return Moments(norm_layer.running_mean, norm_layer.running_var)
    moments = Moments(*(np.asarray(v, np.float64) for v in (moments.mean, moments.var)))
    if any(
        v.shape != (norm_layer.num_channels,) or not np.all(np.isfinite(v))
        for v in (moments.mean, moments.var)
    ):
        raise ValueError(
            f"running statistics of {norm_layer.name!r} must be finite and of shape "
            f"({norm_layer.num_channels},)"
        )
    if np.any(moments.var < 0):
        raise ValueError(f"the running variance of {norm_layer.name!r} is negative somewhere")
    return moments


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
    graph: ir.Graph, norm_layer: OnnxNormLayer, moments: Moments[Array], taken: set[str]
) -> Moments[ir.Value]:
    return Moments(
        mean=_add_input(graph, f"running_mean.{norm_layer.name}", moments.mean, taken),
        var=_add_input(graph, f"running_var.{norm_layer.name}", moments.var, taken),
    )


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
    """Append nodes that return alpha, but that of the baseline if an example has one value per channel."""
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
    same = (node for node in tape.nodes if node.op_type == norm_layer.node.op_type == "BatchNormalization")
    if heir := next(same, None):  # a new node of the same operator keeps the name, which tools may refer to
        heir.name, heir.doc_string = norm_layer.node.name, norm_layer.node.doc_string
        heir.metadata_props.update(norm_layer.node.metadata_props)
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
