"""Sessions of onnxruntime: of a graph as it is, with a patch as inputs, or normalizing by the batch.

One session has all alphas and running statistics as inputs, so that a search opens it once, and other weights
need no other graph. Once a state has slopes, they are inputs too, and so are offsets. Another session runs
the graph as it was read, so that the baseline is exactly the user's file. A third one normalizes by the batch
and returns its moments, to re-estimate statistics.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.inventory import FUSED
from bnpatch.core.patch import BESIDE_ALPHA, PatchState, PatchWeights, Statistics, as_arrays
from bnpatch.onnx.expressions import Tape
from bnpatch.onnx.formulas import append_by_batch
from bnpatch.onnx.fused_conv import observe_values
from bnpatch.onnx.match import OnnxNormLayer, inventory
from bnpatch.onnx.rewrite import rewrite
from bnpatch.onnx.runtime import Signature, open_session

Array = npt.NDArray[Any]

#: By name of norm layer, pairs of names for mean and variance, one pair per call of the module.
MomentNames = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class WeightedSession:
    """A session with weights and running statistics as inputs.

    Attributes:
        session: the session of onnxruntime.
        weights: by kind of weight and by name of input, the norm layer whose weight it takes; slopes are
            missing if all are 0, and so are offsets.
        running: by name of norm layer, the inputs that take running mean and variance.
        moments: by name of norm layer, the outputs with mean and variance of each example.
    """

    session: Any
    weights: Mapping[str, Mapping[str, str]]
    running: MomentNames
    moments: MomentNames

    def feeds(self, weights: PatchWeights, statistics: Statistics) -> dict[str, npt.NDArray[Any]]:
        """Return the values of the inputs, for weights and for statistics in use by name of norm layer."""
        feeds: dict[str, npt.NDArray[Any]] = {}
        for kind, inputs in self.weights.items():
            values = weights.of(kind)
            feeds |= {name: np.asarray(values[norm], np.float32) for name, norm in inputs.items()}
        for norm, moments in statistics.items():
            for mean, var in self.running.get(norm, ()):
                feeds[mean] = np.asarray(moments.mean, np.float32)
                feeds[var] = np.asarray(moments.var, np.float32)
        return feeds


class Sessions:
    """The sessions of one graph; each is opened when it is first asked for, and kept.

    Args:
        graph: the model as it was read.
        recovered: the model with its recovered norms.
        norms: the norm layers of ``recovered`` that can be patched.
        state: running statistics of norms that have none in the graph, and whether to weight single values.
            Its weights don't matter.
        device: where to run.
    """

    def __init__(
        self,
        graph: ir.Model,
        recovered: ir.Model,
        norms: Sequence[OnnxNormLayer],
        state: PatchState,
        device: torch.device,
    ) -> None:
        self._graph, self._recovered, self._norms, self._device = graph, recovered, norms, device
        self._include_1x1 = state.include_1x1
        self._running = {n: as_arrays(part) for n, part in state.running.items() if not n.endswith(FUSED)}
        self._weighted: dict[bool, WeightedSession] = {}

    @cached_property
    def plain(self) -> Any:
        """The session of the graph as it was read."""
        return open_session(self._graph, self._device)

    @cached_property
    def by_batch(self) -> tuple[Any, MomentNames]:
        """See :func:`_open_by_batch`."""
        return _open_by_batch(self._recovered.clone(), self._norms, self._running, self._device)

    def weighted(self, weights: PatchWeights, observe: bool = False) -> WeightedSession:
        """Return a session with all weights as inputs; slopes and offsets only if one of them has an effect.

        Args:
            weights: the weights to run with, for every norm layer.
            observe: return the moments of each example at every norm layer outside branches, too.
        """
        opened = self._weighted.get(observe)
        needed = {"alpha", *(kind for kind in BESIDE_ALPHA if weights.in_effect(kind))}
        if opened is None or not needed <= opened.weights.keys():
            opened = self._weighted[observe] = self._open_weighted(weights, observe)
        return opened

    def _open_weighted(self, weights: PatchWeights, observe: bool) -> WeightedSession:
        graph, moments = self._recovered.clone(), {}
        if observe:
            moments = _with_moments(graph)
        done = rewrite(
            graph,
            weights.to_write(weights.alphas, as_inputs=True),
            running=self._running,
            alpha_inputs="per-site",
            running_inputs=True,
            include_1x1=self._include_1x1,
        )
        session = open_session(graph, self._device)
        taken = {value.name for value in session.get_overridable_initializers()}
        modules = {norm.name: norm.module_name for norm in self._norms}
        inputs = {
            kind: {name: modules[norm] for norm, name in by_norm.items() if name in taken}
            for kind, by_norm in done.weight_inputs.items()
            if by_norm
        }
        running: MomentNames = {}
        for name, pair in done.running_inputs.items():
            if pair[0] in taken:
                running.setdefault(modules[name], []).append(pair)
        return WeightedSession(session, inputs, running, moments)


def _with_moments(graph: ir.Model) -> MomentNames:
    """Add outputs with the moments of each example at every norm layer outside branches."""
    names: MomentNames = {}
    outside = [norm for norm in inventory(graph).norm_layers if norm.node.graph is graph.graph]
    values = observe_values(graph, [(norm.input, len(norm.dims)) for norm in outside])
    for norm, pair in zip(outside, values, strict=True):
        names.setdefault(norm.module_name, []).append(pair)
    return names


def _open_by_batch(
    graph: ir.Model, norms: Sequence[OnnxNormLayer], running: Statistics, device: torch.device
) -> tuple[Any, MomentNames]:
    """Open a session whose norms normalize by the batch.

    Args:
        graph: the model with its recovered norms; it is rewritten.
        norms: the norm layers to look at; those in branches are left out.
        running: running statistics of norms that have none in the graph.
        device: where to run.

    Returns:
        The session, and the names of its outputs with the moments of the batch.
    """
    names: MomentNames = {}
    inside = {n.module_name for n in inventory(graph).norm_layers if n.node.graph is not graph.graph}

    def append(tape: Tape, norm: OnnxNormLayer, *_: Any) -> ir.Value:
        result, moments = append_by_batch(tape, norm)
        graph.graph.outputs.extend([moments.mean, moments.var])
        names.setdefault(norm.module_name, []).append((moments.mean.name or "", moments.var.name or ""))
        return result

    # An alpha of 0.5 is the baseline of no norm layer, so all of them are rewritten.
    alphas = {norm.module_name: 0.5 for norm in norms if norm.module_name not in inside}
    rewrite(graph, PatchWeights(alphas), running=running, include_1x1=True, append=append)
    return open_session(graph, device), names


@contextmanager
def naming_the_shape(model: str, inputs: Array) -> Iterator[None]:
    """Turn errors of onnxruntime into one that names the model and the shape of the inputs it refused."""
    try:
        yield
    except BnpatchError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common class that is public
        raise BnpatchError(
            f"{model} does not take an input of shape {inputs.shape}: {first_line(error)}",
            "set --img-size, or give inputs (example_input in Python) of the shape that it takes",
        ) from error


def run_in_portions(
    session: Any, outputs: list[str], signature: Signature, inputs: Array, feeds: Mapping[str, Array]
) -> list[Array]:
    """Run a session on a batch, in portions if the graph's batch size is fixed; see :meth:`OnnxModel.run`."""
    size = signature.batch
    if size is None or not len(inputs):
        results: list[Array] = session.run(outputs, {signature.input: inputs, **feeds})
        return results
    parts: list[list[Array]] = [[] for _ in outputs]
    axes = [0] * len(outputs)
    for start in range(0, len(inputs), size):
        # Examples are repeated to fill the batch, because padding would change the moments of a batch.
        portion = inputs.take(range(start, start + size), axis=0, mode="wrap")
        count = min(size, len(inputs) - start)
        for n, result in enumerate(session.run(outputs, {signature.input: portion, **feeds})):
            axes[n] = next((axis for axis, length in enumerate(result.shape) if length == size), 0)
            parts[n].append(result.take(range(min(count, result.shape[axes[n]])), axis=axes[n]))
    return [np.concatenate(part, axis=axis) for part, axis in zip(parts, axes, strict=True)]
