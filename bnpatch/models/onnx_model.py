"""The ONNX backend: an ONNX graph that can be patched and run by onnxruntime.

One session has all weights as inputs and serves the whole search. Another session runs the graph as it was
read; it is used if every norm layer is at its identity, so that the baseline is exactly the user's file.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.inventory import (
    CALIBRATE,
    FUSED,
    NEEDS_CALIBRATION,
    AnyNormLayer,
    Inventory,
    NormFacts,
    SkippedNorm,
)
from bnpatch.core.moments import Moments, pool
from bnpatch.core.patch import PatchState, as_arrays
from bnpatch.core.recipe import Recipe, fingerprint
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.base import Model, Watch, in_use
from bnpatch.models.fingerprints import of_graph_norm
from bnpatch.models.metadata import write_metadata
from bnpatch.models.onnx_sessions import (
    MomentNames,
    WeightedSession,
    open_by_batch,
    open_weighted,
    run_in_portions,
)
from bnpatch.models.outputs import Output
from bnpatch.onnx import match
from bnpatch.onnx.fused_conv import find_fused_convs, insert_norms, observe
from bnpatch.onnx.rewrite import AlphaInputs, rewrite
from bnpatch.onnx.runtime import Signature, open_session

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}


@dataclass
class OnnxModel(Model[AnyNormLayer]):
    """Runs and patches an ONNX graph. :func:`bnpatch.load` makes one of an ONNX file.

    Attributes:
        graph: the model as it was read; it is never changed.
        name: the name of the model in tables and files.
        signature: the input and the output of the graph.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, or None if they are not known.
        class_order: how class folders are sorted if their names don't tell the class.
        device: cpu or cuda.
        notes: what a person should know about how it was loaded.
        state: see :class:`~bnpatch.models.base.Model`.
    """

    has_gradients: ClassVar[bool] = False
    runs_onnx: ClassVar[bool] = True
    suffix: ClassVar[str] = ".onnx"
    norm_cost: ClassVar[int] = 40_000

    graph: ir.Model
    name: str
    signature: Signature
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    arch: None = None
    output: Output | None = None
    wanted_output: str | None = None
    # A field, so that it goes along where dataclasses.replace makes another of this model.
    _state: PatchState = field(default_factory=PatchState, repr=False)

    def __post_init__(self) -> None:
        self._open_anew(self._state)
        self.set_state(self._state)

    def _open_anew(self, state: PatchState) -> None:
        """Find the norm layers of the graph with the recovered norms of a state; drop all sessions."""
        self._norm_layers = match.inventory(self._with_norms(state.running))
        self._plain: Any = None
        self._weighted: WeightedSession | None = None
        self._observed: WeightedSession | None = None
        self._by_batch: tuple[Any, MomentNames] | None = None

    def inventory(self) -> Inventory[AnyNormLayer]:
        """List the norm layers, one per module, and the norms that are skipped."""
        norm_layers: dict[str, AnyNormLayer] = {}
        for norm_layer in self._patchable():
            norm_layers.setdefault(
                norm_layer.module, _ModuleNorm(norm_layer.module, norm_layer.kind, norm_layer.num_channels)
            )
        missing = self.uncalibrated()
        left = {
            s.module: SkippedNorm(s.module, s.kind, NEEDS_CALIBRATION, True)
            for s in self._norm_layers.norm_layers
            if s.module in missing
        }
        return Inventory(tuple(norm_layers.values()), (*left.values(), *self._norm_layers.skipped_norms))

    def uncalibrated(self) -> tuple[str, ...]:
        """Name the norms that become norm layers once they have running statistics: Group Norm."""
        names = (
            s.module
            for s in self._norm_layers.norm_layers
            if s.needs_calibration and s.module not in self._state.running
        )
        return tuple(dict.fromkeys(names))

    def identities(self) -> dict[str, float]:
        """Return, by name of norm layer, the alpha at which the model computes what the file does."""
        return {norm_layer.module: norm_layer.identity for norm_layer in self._patchable()}

    def fused_convs(self) -> tuple[str, ...]:
        """Name the convolutions that a Batch Norm may have been fused into and that are not recovered yet."""
        candidates = find_fused_convs(self.graph)
        return tuple(c.name for c in candidates if c.name + FUSED not in self._state.running)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the largest weights."""
        weights = (value.const_value for value in self.graph.graph.initializers.values())
        floats = [w for w in weights if w is not None and w.dtype in _DTYPES]
        return _DTYPES[max(floats, key=lambda w: w.size).dtype] if floats else torch.float32

    @property
    def opset(self) -> int:
        """Opset version of the standard operators."""
        return self.graph.opset_imports.get("", 0)

    def _make_norm_layers(self, state: PatchState) -> None:
        before = self._state
        if state.running is before.running and state.include_1x1 == before.include_1x1:
            return
        known = {conv.name + FUSED for conv in find_fused_convs(self.graph)} | {
            norm.module for norm in self._norm_layers.norm_layers if norm.needs_calibration
        }
        if unknown := [name for name in state.running if name not in known]:
            raise BnpatchError(f"{self.name} has no norm {unknown[0]!r} to calibrate", "calibrate it again")
        self._open_anew(state)
        self._state = replace(before, running=state.running, include_1x1=state.include_1x1)

    def _use(self, state: PatchState) -> None:
        """Check the state; sessions take it as inputs when they run."""
        weights = state.weights
        weighted = {name for name, alpha in weights.alphas.items() if alpha or weights.lambdas[name]}
        if pooled := [name for name in state.channels_per_group if name in weighted]:
            raise BnpatchError(
                f"the recipe pools channels at {pooled[0]!r}, of which an ONNX file knows nothing",
                "export the torch checkpoint with the recipe",
            )

    def _refuse_without_norm_layers(self) -> None:
        remedy = "it was fused into the convolutions, most likely: add --recover-folded"
        if left := self.inventory().skipped_norms:
            waits = any(norm.is_uncalibrated for norm in left)
            remedy = CALIBRATE if waits else f"its norms are skipped: {left[0].reason}"
        raise BnpatchError(f"{self.name} has no norm that could be patched", remedy)

    def facts(self) -> dict[str, NormFacts]:
        """Return, by name of norm layer, what the layer has from the file."""
        eps = {norm.module: norm.eps for norm in self._patchable()}
        return {name: NormFacts(_as_tensors(part), eps[name]) for name, part in self._source().items()}

    def _source(self) -> dict[str, Moments[Any]]:
        own = {norm.module: norm for norm in self._patchable()}
        running = self._state.running
        return {
            name: as_arrays(running[name]) if name in running else _moments_of(norm)
            for name, norm in own.items()
        }

    def statistics_in_use(self) -> dict[str, Moments[Any]]:
        """Return, by name, the mean and variance (C,) in use where they are not those of the file."""
        used = in_use(self._state, self._source())
        unweighted = {n for n in self._state.running if not self._state.weights.lambdas[n]}
        # The graph with recovered norms already has the statistics of these norms.
        return {n: m for n, m in used.items() if not (n in unweighted and n.endswith(FUSED))}

    def predict(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs (N, ...).

        Returns:
            Logits (N, K), or outputs of another shape if the graph has them, on the CPU.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        output = self.output_for(x)
        if self.weights.is_identity(self.identities()):
            (y,) = self.run(self._plain_session(), [output.name], x)
        else:
            opened = self._weighted = self._kept(self._weighted) or self._open_weighted()
            (y,) = self.run(opened.session, [output.name], x, self._feeds(opened))
        return output.read(torch.from_numpy(y))

    def _plain_session(self) -> Any:
        self._plain = self._plain or open_session(self.graph, self.device)
        return self._plain

    def _returned(self, x: Tensor) -> dict[str, Tensor]:
        names = list(self.signature.outputs)
        arrays = self.run(self._plain_session(), names, x)
        return {name: torch.from_numpy(y) for name, y in zip(names, arrays, strict=True)}

    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        operators = self.signature.outputs
        return self._returned(x), [name for name, operator in operators.items() if operator == "Sigmoid"]

    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Run a batch as :meth:`predict` does. There are no gradients.

        Returns:
            The outputs; and by name of norm layer or uncalibrated norm, the moments (N, C) of each example at
            its input. If a module is called k times, they are of shape (k * N, C).
        """
        opened = self._observed = self._kept(self._observed) or self._open_weighted(observe=True)
        names = [name for pairs in opened.moments.values() for pair in pairs for name in pair]
        output = self.output_for(x)
        y, *parts = self.run(opened.session, [output.name, *names], x, self._feeds(opened))
        by_name = {name: torch.from_numpy(part).flatten(1) for name, part in zip(names, parts, strict=True)}
        return output.read(torch.from_numpy(y)), {
            module: Moments(*(torch.cat([by_name[n] for n in part]) for part in zip(*pairs, strict=True)))
            for module, pairs in opened.moments.items()
        }

    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch as in training: Batch Norm normalizes by the moments of the batch.

        Group Norm computes what it always does. A graph with a fixed batch size runs in batches of that size.

        Returns:
            By name of norm layer, the moments (C,) of the whole batch at its input, pooled over all calls if
            a module is called several times. Norm layers in a branch (If, Loop) are missing.
        """
        self._by_batch = self._by_batch or open_by_batch(
            self._with_norms(self._state.running), self._patchable(), self._running(), self.device
        )
        session, names = self._by_batch
        if not names:
            return {}  # for an empty list of outputs, onnxruntime would return all outputs
        outputs = [name for pairs in names.values() for pair in pairs for name in pair]
        values = zip(outputs, self.run(session, outputs, x), strict=True)
        rows = {name: torch.from_numpy(value).flatten(1) for name, value in values}
        moments = {}
        for module, pairs in names.items():
            pooled = pool(
                Moments(*(torch.cat([rows[n] for n in part]) for part in zip(*pairs, strict=True))), axes=0
            )
            moments[module] = Moments(pooled.mean[0], pooled.var[0])
        return moments

    def run(
        self, session: Any, outputs: list[str], x: Tensor, feeds: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> list[npt.NDArray[Any]]:
        """Run a session of this model on a batch, in portions if the graph's batch size is fixed.

        Args:
            session: a session of the graph, or of a graph that was made from it.
            outputs: names of the outputs to return; one axis of each is that of the batch, or it is of shape
                (1, ...) for one value per batch.
            x: see :meth:`predict`.
            feeds: values of further inputs.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        inputs = self._prepare(x)
        try:
            return run_in_portions(session, outputs, self.signature, inputs, feeds or {})
        except BnpatchError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common class that is public
            raise BnpatchError(
                f"{self.name} does not take an input of shape {inputs.shape}: {first_line(error)}",
                "set --img-size, or give inputs (example_input in Python) of the shape that it takes",
            ) from error

    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Return the spatial shape of each norm layer's input by name, as far as it can be inferred.

        If the graph leaves the size of the image open, the shapes are for the size of ``example``, by default
        for that of the preprocessing.
        """
        shapes = _known_shapes(self._patchable())
        if len(shapes) == len(self.weights.alphas):
            return shapes
        size = list(self.preprocessing.input_size if example is None else example.shape[1:])
        if len(size) != len(self.signature.size):
            return shapes
        if self.signature.channels_last:
            size = [*size[1:], size[0]]
        graph = self._with_norms(self.state.running)
        images = next(value for value in graph.graph.inputs if value.name == self.signature.input)
        images.shape = ir.Shape([self.signature.batch, *size])
        names = {norm.module for norm in self._patchable()}
        return _known_shapes([n for n in match.inventory(graph).norm_layers if n.module in names]) | shapes

    def watch_fused(self, example: Tensor) -> Watch | None:
        """See :meth:`bnpatch.models.base.Model.watch_fused`."""
        graph = self.graph.clone()
        convs = [conv for conv in find_fused_convs(graph) if conv.node.graph is graph.graph]
        names = [name for pair in observe(graph, convs) for name in pair]
        session = open_session(graph, self.device)

        def watch(x: Tensor) -> dict[str, Moments[Any]]:
            outputs = self.run(session, names, x)
            pairs = zip(convs, outputs[::2], outputs[1::2], strict=True)
            return {conv.name: Moments(mean, var) for conv, mean, var in pairs}

        return watch if convs else None

    def save(self, path: str | os.PathLike[str], recipe: Recipe) -> bool:
        """Write the patched file, which needs no recipe to be loaded."""
        from bnpatch.models.export import export_onnx  # imported here because it imports this module

        with self.in_state(recipe.state):
            export_onnx(self, path)
        return True

    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        """Return a hash of the parameters of each norm layer, by name; the torch model has the same hashes.

        Args:
            running: names of further norms to include, which have no running statistics yet.
        """
        known = {*running, *self._state.running}
        there = (n for n in self._norm_layers.norm_layers if not n.needs_calibration or n.module in known)
        hashes = {norm.module: of_graph_norm(norm) for norm in there}
        for conv in find_fused_convs(self.graph):
            if conv.name + FUSED in known:  # hash the convolution, not the moments, which depend on data
                hashes[conv.name + FUSED] = fingerprint(conv.parameters)
        return hashes

    def evaluating(self) -> AbstractContextManager[None]:
        """Do nothing, because a graph is always in evaluation mode."""
        return nullcontext()

    def rewritten(
        self, alpha_inputs: AlphaInputs | None = None, example_input: Tensor | None = None
    ) -> tuple[ir.Model, tuple[str, ...]]:
        """Return a patched copy of the graph, and the names of the norm layers that were rewritten.

        Args:
            alpha_inputs: see :func:`bnpatch.onnx.rewrite.rewrite`.
            example_input: not used.
        """
        weights = self.weights
        alphas, lambdas = weights.alphas, weights.lambdas
        # A recovered norm layer at its identity is left out of the graph, because it would do nothing.
        used = {
            name: moments
            for name, moments in self._state.running.items()
            if alpha_inputs or alphas[name] or lambdas[name] or not name.endswith(FUSED)
        }
        graph = self._with_norms(used)
        there = {n: a for n, a in alphas.items() if n in used or not n.endswith(FUSED)}
        patched: tuple[str, ...] = ()
        if alpha_inputs is not None or not weights.is_identity(self.identities()):
            running = {name: m for name, m in self.statistics_in_use().items() if name in there}
            patched = rewrite(
                graph,
                there,
                running=running,
                alpha_inputs=alpha_inputs,
                include_1x1=self._state.include_1x1,
                slopes={n: s for n, s in weights.slopes_to_write(alpha_inputs).items() if n in there},
            ).patched
        write_metadata(graph, self.preprocessing, self.class_names, self.chosen_output)
        return graph, patched

    def _with_norms(self, moments: Mapping[str, Moments[Any]]) -> ir.Model:
        graph = self.graph.clone()
        fused = {name: as_arrays(part) for name, part in moments.items() if name.endswith(FUSED)}
        insert_norms(graph, {name.removesuffix(FUSED): part for name, part in fused.items()})
        return graph

    def _patchable(self) -> list[match.NormLayer]:
        return [
            s
            for s in self._norm_layers.norm_layers
            if not s.needs_calibration or s.module in self._state.running
        ]

    def _prepare(self, x: Tensor) -> npt.NDArray[Any]:
        takes_bytes = self.signature.dtype == np.uint8
        if not x.is_floating_point() and not takes_bytes:
            shape = (1, -1, 1, 1)
            mean, std = (
                255 * torch.tensor(v).view(shape) for v in (self.preprocessing.mean, self.preprocessing.std)
            )
            x = (x.float() - mean) / std
        if self.signature.channels_last and x.ndim == 4:
            x = x.movedim(1, -1)
        x = x.float() if x.dtype == torch.bfloat16 else x  # NumPy has no such type
        return np.ascontiguousarray(x.cpu().numpy().astype(self.signature.dtype))

    def _open_weighted(self, observe: bool = False) -> WeightedSession:
        state = self._state
        return open_weighted(
            self._with_norms(state.running),
            self._patchable(),
            state.weights,
            self._running(),
            self.device,
            include_1x1=state.include_1x1,
            observe=observe,
        )

    def _kept(self, opened: WeightedSession | None) -> WeightedSession | None:
        """Return a session unless it lacks slopes that the weights have."""
        return opened if opened and (opened.slopes or not self.weights.varying()) else None

    def _feeds(self, opened: WeightedSession) -> dict[str, npt.NDArray[Any]]:
        return opened.feeds(self.weights, self.statistics_in_use())

    def _running(self) -> dict[str, Moments[Any]]:
        """Running statistics from data, of norms that are in the graph."""
        running = self._state.running
        return {name: as_arrays(part) for name, part in running.items() if not name.endswith(FUSED)}


def _known_shapes(norms: Iterable[match.NormLayer]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for norm in norms:
        spatial = tuple(int(size) for size in norm.dims[2:] if isinstance(size, int))
        if len(spatial) == len(norm.dims[2:]):
            shapes[norm.module] = spatial
    return shapes


def _moments_of(norm_layer: match.NormLayer) -> Moments[Any]:
    assert norm_layer.running_mean is not None  # otherwise the state has running statistics
    assert norm_layer.running_var is not None
    return Moments(norm_layer.running_mean, norm_layer.running_var)


def _as_tensors(moments: Moments[Any]) -> Moments[Tensor]:
    return Moments(*(torch.as_tensor(np.asarray(p, np.float32)) for p in (moments.mean, moments.var)))


@dataclass(frozen=True)
class _ModuleNorm:
    name: str
    kind: str
    num_channels: int
