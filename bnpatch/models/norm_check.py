"""Check a patched ONNX graph norm layer by norm layer, without the code that wrote it.

What a search runs and what an export writes come from one rewrite, so comparing the two says nothing about
the rewrite. Here the patched graph is compared with the original one and with the formula of
:mod:`bnpatch.core.moments`, in float64:

1. The patched graph runs, and returns the output of every norm layer.
2. The original graph runs on the same images. What follows a norm layer reads the output that the patched
   graph had there. It returns the input of each norm layer, and what its own nodes compute from that input.
3. At each norm layer, the formula with the weight of the baseline must give what the original nodes give
   (running statistics, scale, shift and eps were read right), and the formula with the weights of the patch
   must give what the patched graph gives. And the outputs must be the same.

From layer to layer it follows that the patched graph is the original one with the formula at its norm layers.
The check takes two runs, and memory for four copies of what norm layers return.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import ExampleWeight, Moments, mix_example, pool
from bnpatch.core.patch import as_arrays
from bnpatch.models.base import Model
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.onnx.fused_conv import insert_norms
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import OnnxNormLayer, inventory
from bnpatch.onnx.runtime import open_session

_MOST_BYTES = 5e8  # kept for two images; if they need more, only one is compared

#: A part of the graph, what it must compute, and what it computes.
Triple = tuple[str, Tensor, Tensor]


def compared_by_norm_layer(source: Model[Any], exported: OnnxModel, x: Tensor) -> Iterator[Triple]:
    """Yield pairs of tensors that must be equal but for rounding.

    Nothing is yielded if a norm layer lies in a branch or a loop, whose values can't be outputs of the graph.

    Args:
        source: a model of a graph, with its state.
        exported: the patched graph that was made of it.
        x: inputs (N, ...), of which the first two are used, or the first alone if they are large.
    """
    original, _ = source.unpatched_graph()
    fused = {name: as_arrays(part) for name, part in source.state.running.items() if name.endswith(FUSED)}
    insert_norms(original, {name.removesuffix(FUSED): part for name, part in fused.items()})
    norms = [norm for norm in inventory(original).norm_layers if norm.module_name in source.weights.alphas]
    if any(norm.node.graph is not original.graph for norm in norms):
        return
    x, names = _first_images(source, exported, x), [norm.output.name or "" for norm in norms]
    shown = _shown(patched := exported.graph.clone(), names)
    last = source.output_for(x).name
    *found, y = exported.run(open_session(patched, exported.device), [*shown, last], x)
    shown, inputs = _cut(original, norms)
    feeds = dict(zip(inputs, found, strict=True))
    *values, expected = exported.run(open_session(original, exported.device), [*shown, last], x, feeds)
    inputs_of_norms, unpatched = values[: len(norms)], values[len(norms) :]
    facts, in_use = source.facts(), source.statistics_in_use()
    for norm, *arrays in zip(norms, inputs_of_norms, unpatched, found, strict=True):
        name, at = norm.module_name, f"norm layer {norm.name}"
        x, before, after = map(_wide, arrays)  # the layer's input, its output without and with the patch
        running, baseline = facts[name].source, ExampleWeight(norm.baseline_alpha)
        is_single = math.prod(x.shape[2:]) == 1 and not source.state.include_1x1
        weight = baseline if is_single else source.weights.example_weight(name)
        finite = before.isfinite()  # float16 may overflow where float64 does not
        yield _finite(finite, f"what was read of {at}", before, _normalized(x, norm, running, baseline))
        if name.endswith(FUSED):  # a recovered norm returns its input
            yield _finite(finite, at, x, before)
        yield _finite(finite, at, _normalized(x, norm, in_use.get(name, running), weight), after)
    if last not in names:  # else it was compared at that norm layer
        yield "the output", _wide(expected), _wide(y)


def _finite(finite: Tensor, part: str, expected: Tensor, found: Tensor) -> Triple:
    """Return a triple without the values that are not finite in the original."""
    is_whole = bool(finite.all())
    return (part, expected, found) if is_whole else (part, expected[finite], found[finite])


def _normalized(x: Tensor, norm: OnnxNormLayer, running: Moments[Any], weight: ExampleWeight) -> Tensor:
    """Normalize x (N, C, *spatial) by the formula, in float64."""
    rows = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    example = Moments(rows.mean(2), rows.var(2, correction=0))
    usual = Moments(*(_wide(part)[None] for part in (running.mean, running.var)))
    groups = (-1, x.shape[1] // norm.channels_per_group, norm.channels_per_group)
    example, usual = (
        pool(Moments(part.mean.reshape(groups), part.var.reshape(groups)), 2) for part in (example, usual)
    )
    mixed = mix_example(weight, example, usual, norm.eps)
    by_group = rows.reshape(len(x), groups[1], -1)
    normalized = ((by_group - mixed.mean) / mixed.total**0.5).reshape(rows.shape)
    y: Tensor = normalized * _wide(norm.weight)[:, None] + _wide(norm.bias)[:, None]
    return y.reshape(x.shape)


def _first_images(source: Model[Any], exported: OnnxModel, x: Tensor) -> Tensor:
    """Return the first images: as many as the graph takes, or two, or one if norm layers return much."""
    sizes, norms = source.norm_shapes(x), source.inventory().norm_layers
    values = sum(norm.num_channels * math.prod(sizes.get(norm.name, (1,))) for norm in norms)
    count = exported.signature.batch or (2 if 2 * 4 * 4 * values <= _MOST_BYTES else 1)
    return x[torch.arange(count) % len(x)]


def _shown(graph: ir.Model, names: Sequence[str]) -> list[str]:
    """Make values of the main graph outputs, in place; return the names of the outputs."""
    values = {value.name: value for node in graph.graph for value in node.outputs}
    return [_output(graph, values[name], f"bnpatch/check/{n}") for n, name in enumerate(names)]


def _output(graph: ir.Model, value: ir.Value, name: str) -> str:
    """Add an output, in place, that returns a value by Identity, as the value may be an output or input."""
    node = ir.node("Identity", [value])
    shown = node.outputs[0]
    shown.name, shown.type = name, value.type
    graph.graph.append(node)
    graph.graph.outputs.append(shown)
    return name


def _cut(graph: ir.Model, norms: Sequence[OnnxNormLayer]) -> tuple[list[str], list[str]]:
    """Cut a graph after each norm layer, in place: what follows reads a new input instead of its output.

    Returns:
        The names of the new outputs: the input of each norm layer, then the output of each. And the names of
        the new inputs, one for each norm layer.
    """
    inputs = []
    for n, norm in enumerate(norms):
        rank = ir.Shape([None] * len(norm.dims))
        given = ir.Value(name=f"bnpatch/given/{n}", shape=rank, type=ir.TensorType(norm.dtype))
        graph.graph.inputs.append(given)
        for use in tuple(norm.output.uses()):
            use.node.replace_input_with(use.idx, given)
        inputs.append(given.name or "")
    values = [*(norm.input for norm in norms), *(norm.output for norm in norms)]
    return [_output(graph, value, f"bnpatch/check/{n}") for n, value in enumerate(values)], inputs


def _wide(values: Array | Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))
