"""Rewrite the sites of an ONNX graph so that the example itself weighs in, in place.

Standard operators only. Opset, IR version, metadata, doc strings, the order of the other nodes, and
the names, types and dimensions of inputs and outputs stay as they are; so does every site that is at
its identity, so that a runtime folds it as before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from bnpatch.core.errors import BnpatchError, check_alpha
from bnpatch.core.inventory import LeftAlone, Survey
from bnpatch.core.moments import Moments
from bnpatch.onnx.expressions import Tape
from bnpatch.onnx.formulas import append_batch_norm, append_site
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import MARK, Site, survey

#: Appends what replaces a site, given its running moments and its alpha; see :func:`append_site`.
Append = Callable[..., ir.Value]

AlphaInputs = Literal["global", "per-site"]

_AT_IDENTITY = "its alpha is at identity"
_SINGLE_VALUE = "an example has one value per channel here, so it would mostly shrink the signal"


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite did.

    Attributes:
        model: the model that was given.
        patched: names of the sites that were rewritten.
        left_alone: every other normalization layer, and why.
        alpha_inputs: by site, the graph input that has its alpha; empty where alphas are constants.
        running_inputs: by site, the graph inputs that have its running mean and variance; likewise.
    """

    model: ir.Model = field(repr=False)
    patched: tuple[str, ...]
    left_alone: tuple[LeftAlone, ...]
    alpha_inputs: Mapping[str, str]
    running_inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def rewrite(
    model: ir.Model,
    alphas: Mapping[str, float],
    *,
    running: Mapping[str, Moments[Array]] | None = None,
    channels_per_group: Mapping[str, int] | None = None,
    alpha_inputs: AlphaInputs | None = None,
    running_inputs: bool = False,
    weigh_single_values: bool = False,
    append: Append = append_site,
) -> Rewritten:
    """Rewrite the sites that ``alphas`` names, in place.

    Args:
        model: the model.
        alphas: weight of the example, in [0, 1], by name of site. A module's name stands for all the
            sites of the module. Sites that are not named are left alone.
        running: running mean and variance, each of shape (C,), by name of site: in the place of those
            in the model, or where the model has none (Group Norm).
        channels_per_group: consecutive channels whose moments are pooled, by name of module, where
            that isn't what the model says: a Batch/Group Norm is stored as Batch Norm.
        alpha_inputs: None writes the alphas into the graph as constants, and leaves sites at identity
            as they are. ``"global"`` reads one alpha from a graph input, ``"per-site"`` one from an
            input for each; the inputs are float32 scalars with ``alphas`` as defaults.
        running_inputs: read the running moments from graph inputs, too, of shape (C,) in float32, with
            those above as defaults. For a search, which changes them all the time.
        weigh_single_values: rewrite also sites whose input is known to have a single value per example
            and channel, which are left alone by default.
        append: appends the nodes that replace a site.

    Raises:
        BnpatchError: a name is no site, or a site has no running moments and none are given.
        InvalidAlphaError: an alpha is not in [0, 1].
        ValueError: the alphas of a global input differ; running moments do
            not fit.
    """
    found = _regrouped(survey(model), channels_per_group or {})
    by_site = _alphas_by_site(alphas, found.sites)
    if alpha_inputs == "global" and len(set(by_site.values())) > 1:
        raise ValueError("one alpha input for all sites has one default, but the alphas differ")
    moments = {
        site.name: _running_moments(site, running or {}) for site in found.sites if site.name in by_site
    }
    reasons = {
        site.name: _why_not(site, by_site.get(site.name), alpha_inputs is None, weigh_single_values)
        for site in found.sites
    }
    moved = {  # Batch Norm without a weight for the example, but by other running moments
        site.name
        for site in found.sites
        if reasons[site.name] in (_AT_IDENTITY, _SINGLE_VALUE)
        and site.identity == 0
        and (running_inputs or _is_given(site, running))
    }
    for name in moved:
        reasons[name] = ""
    chosen = [site for site in found.sites if not reasons[site.name]]
    if missing := [site for site in chosen if moments[site.name] is None]:
        raise BnpatchError(
            f"the site {missing[0].name!r} ({missing[0].kind}) has no running moments",
            "calibrate it on data, or leave it out",
        )
    taken = _names(model)
    weighed = [site for site in chosen if site.name not in moved]
    inputs = _add_alpha_inputs(model.graph, weighed, by_site, alpha_inputs, taken)
    running_names: dict[str, tuple[str, str]] = {}
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for site in chosen:
        site_moments = moments[site.name]
        assert site_moments is not None  # checked above
        tape = Tape(f"{site.name}{MARK.rstrip('/')}", opset, taken)
        given = None
        if running_inputs:
            given = _add_running_inputs(model.graph, site, site_moments, taken)
            running_names[site.name] = (given.mean.name or "", given.var.name or "")
        if site.name in moved:
            result = append_batch_norm(tape, site, site_moments, given)
        else:
            options = {} if given is None else {"given": given}
            result = append(tape, site, site_moments, inputs.get(site.name, by_site[site.name]), **options)
        _replace(site, tape, result)
    left = tuple(
        LeftAlone(site.name, site.kind, reasons[site.name]) for site in found.sites if reasons[site.name]
    )
    names = {site: value.name or "" for site, value in inputs.items()}
    return Rewritten(
        model, tuple(site.name for site in chosen), (*left, *found.left_alone), names, running_names
    )


def _regrouped(found: Survey[Site], groups: Mapping[str, int]) -> Survey[Site]:
    sites = (
        replace(site, channels_per_group=groups.get(site.module, site.channels_per_group))
        for site in found.sites
    )
    return Survey(tuple(sites), found.left_alone)


def _alphas_by_site(alphas: Mapping[str, float], sites: tuple[Site, ...]) -> dict[str, float]:
    known = {name for site in sites for name in (site.name, site.module)}
    if unknown := [name for name in alphas if name not in known]:
        some = ", ".join(site.name for site in sites[:5]) + (", ..." if len(sites) > 5 else "")
        raise BnpatchError(
            f"the model has no site {unknown[0]!r}", f"its sites are {some}" if sites else "it has none"
        )
    for name, alpha in alphas.items():
        check_alpha(alpha, name)
    by_site = {site.name: alphas.get(site.name, alphas.get(site.module)) for site in sites}
    return {name: float(alpha) for name, alpha in by_site.items() if alpha is not None}


def _why_not(site: Site, alpha: float | None, constant: bool, weigh_single_values: bool) -> str:
    if alpha is None:
        return "no alpha was given for it"
    if constant and alpha == site.identity:
        return _AT_IDENTITY
    return _SINGLE_VALUE if site.single_value and not weigh_single_values else ""


def _is_given(site: Site, running: Mapping[str, Moments[Array]] | None) -> bool:
    return running is not None and (site.name in running or site.module in running)


def _running_moments(site: Site, given: Mapping[str, Moments[Array]]) -> Moments[Array] | None:
    moments = given.get(site.name, given.get(site.module))
    if moments is None:
        if site.running_mean is None or site.running_var is None:
            return None
        return Moments(site.running_mean, site.running_var)
    moments = Moments(*(np.asarray(v, np.float64) for v in (moments.mean, moments.var)))
    if any(
        v.shape != (site.num_channels,) or not np.all(np.isfinite(v)) for v in (moments.mean, moments.var)
    ):
        raise ValueError(
            f"running moments of {site.name!r} must be finite and of shape ({site.num_channels},)"
        )
    if np.any(moments.var < 0):
        raise ValueError(f"the running variance of {site.name!r} is negative somewhere")
    return moments


def _add_alpha_inputs(
    graph: ir.Graph, sites: list[Site], alphas: Mapping[str, float], mode: AlphaInputs | None, taken: set[str]
) -> dict[str, ir.Value]:
    if mode is None or not sites:
        return {}
    if mode == "global":
        shared = _add_input(graph, "alpha", alphas[sites[0].name], taken)
        return {site.name: shared for site in sites}
    return {site.name: _add_input(graph, f"alpha.{site.name}", alphas[site.name], taken) for site in sites}


def _add_running_inputs(
    graph: ir.Graph, site: Site, moments: Moments[Array], taken: set[str]
) -> Moments[ir.Value]:
    return Moments(
        mean=_add_input(graph, f"running_mean.{site.name}", moments.mean, taken),
        var=_add_input(graph, f"running_var.{site.name}", moments.var, taken),
    )


def _add_input(graph: ir.Graph, name: str, default: float | Array, taken: set[str]) -> ir.Value:
    """A graph input that is an initializer too: its value is the default, and can be overridden."""
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


def _replace(site: Site, tape: Tape, result: ir.Value) -> None:
    """Put the nodes on the tape in the place of those of the site; the output keeps its name."""
    graph, output = site.node.graph, site.output
    assert graph is not None  # matched
    same = (node for node in tape.nodes if node.op_type == site.node.op_type == "BatchNormalization")
    if heir := next(same, None):  # a name that tools may know stays with the operator that it was given to
        heir.name, heir.doc_string = site.node.name, site.node.doc_string
        heir.metadata_props.update(site.node.metadata_props)
    graph.insert_after(site.node, tape.nodes)
    name, result.type, result.shape = output.name, output.type, output.shape
    result.doc_string = output.doc_string
    result.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    output.name = None
    _drop_unused(site.node)
    result.name = name


def _drop_unused(node: ir.Node) -> None:
    """Remove a node whose outputs nobody reads, and what served it alone; inputs of a graph stay."""
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
