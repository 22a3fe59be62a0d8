"""The ONNX backend: an ONNX graph that can be patched and run by onnxruntime."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from typing_extensions import override

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import CALIBRATE, FUSED, NEEDS_CALIBRATION, Inventory, NormFacts, SkippedNorm
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchState, as_arrays
from bnpatch.core.recipe import Recipe
from bnpatch.models.backend import Watch
from bnpatch.models.base import Model
from bnpatch.models.fingerprints import fingerprint, of_graph_norm
from bnpatch.models.metadata import write_metadata
from bnpatch.models.onnx_as_torch import as_torch
from bnpatch.models.onnx_sessions import (
    MomentNames,
    Sessions,
    WeightedSession,
    naming_the_shape,
    run_in_portions,
)
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.hooks import joined, pooled_rows
from bnpatch.onnx.fused_conv import find_fused_convs, insert_norms, observe
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import OnnxNormLayer, inventory
from bnpatch.onnx.runtime import Signature, open_session

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}


@dataclass
class OnnxModel(Model[OnnxNormLayer]):
    """Runs and patches an ONNX graph. :func:`bnpatch.load` makes one of an ONNX file.

    Attributes:
        graph: the model as it was read; it is never changed.
        signature: the input and the output of the graph.

    :class:`~bnpatch.models.base.Model` has the other attributes.
    """

    runs_onnx: ClassVar[bool] = True
    suffix: ClassVar[str] = ".onnx"
    norm_cost: ClassVar[int] = 40_000

    graph: ir.Model
    signature: Signature

    def __post_init__(self) -> None:
        self._open_anew(self._state)
        self.set_state(self._state)

    def _open_anew(self, state: PatchState) -> None:
        """Add the recovered norms of a state to the graph, find its norm layers, and drop all sessions."""
        fused = {n.removesuffix(FUSED): as_arrays(m) for n, m in state.running.items() if n.endswith(FUSED)}
        self._recovered = self.graph.clone()
        insert_norms(self._recovered, fused)
        self._found = inventory(self._recovered)
        self._patchable = [
            norm
            for norm in self._found.norm_layers
            if not norm.needs_calibration or norm.module_name in state.running
        ]
        self._sessions = Sessions(self.graph, self._recovered, self._patchable, state, self.device)

    @override
    def inventory(self) -> Inventory[OnnxNormLayer]:
        missing = self.uncalibrated()
        norm_layers: dict[str, OnnxNormLayer] = {}  # one per module, and not one per call of it
        for norm in self._patchable:
            norm_layers.setdefault(norm.module_name, replace(norm, name=norm.module_name))
        uncalibrated = {
            name: SkippedNorm(name, norm.kind, NEEDS_CALIBRATION, is_uncalibrated=True)
            for norm in self._found.norm_layers
            if (name := norm.module_name) in missing
        }
        return Inventory(tuple(norm_layers.values()), (*uncalibrated.values(), *self._found.skipped_norms))

    @override
    def uncalibrated(self) -> tuple[str, ...]:
        patchable = {norm.module_name for norm in self._patchable}
        found = dict.fromkeys(norm.module_name for norm in self._found.norm_layers)
        return tuple(name for name in found if name not in patchable)

    @override
    def baseline_alphas(self) -> dict[str, float]:
        return {norm.module_name: norm.baseline_alpha for norm in self._patchable}

    def fused_convs(self) -> tuple[str, ...]:
        """Name the convolutions that a Batch Norm may have been fused into and that are not recovered yet."""
        candidates = find_fused_convs(self.graph)
        return tuple(c.name for c in candidates if c.name + FUSED not in self._state.running)

    @property
    @override
    def dtype(self) -> torch.dtype:
        # The type of the largest weights.
        weights = (value.const_value for value in self.graph.graph.initializers.values())
        floats = [w for w in weights if w is not None and w.dtype in _DTYPES]
        return _DTYPES[max(floats, key=lambda w: w.size).dtype] if floats else torch.float32

    @property
    def opset(self) -> int:
        """Opset version of the standard operators."""
        return self.graph.opset_imports.get("", 0)

    @override
    def _make_norm_layers(self, state: PatchState) -> None:
        before = self._state
        if state.running is before.running and state.include_1x1 == before.include_1x1:
            return
        known = {conv.name + FUSED for conv in find_fused_convs(self.graph)} | {
            norm.module_name for norm in self._found.norm_layers if norm.needs_calibration
        }
        if unknown := [name for name in state.running if name not in known]:
            raise BnpatchError(f"{self.name} has no norm {unknown[0]!r} to calibrate", "calibrate it again")
        self._open_anew(state)
        self._state = replace(before, running=state.running, include_1x1=state.include_1x1)

    @override
    def _use(self, state: PatchState) -> None:
        weights = state.weights  # sessions take them as inputs when they run
        weighted = {name for name, alpha in weights.alphas.items() if alpha or weights.lambdas[name]}
        if pooled := [name for name in state.channels_per_group if name in weighted]:
            raise BnpatchError(
                f"the recipe pools channels at {pooled[0]!r}, of which an ONNX file knows nothing",
                "export the torch checkpoint with the recipe",
            )

    @override
    def with_gradients(self, x: Tensor) -> TorchModel | None:
        return as_torch(self, self._recovered, x)

    @override
    def _refuse_without_norm_layers(self) -> None:
        skipped = self.inventory().skipped_norms
        if any(norm.is_uncalibrated for norm in skipped):
            remedy = CALIBRATE
        elif self.fused_convs():
            remedy = "it was fused into the convolutions, most likely: add --recover-fused"
        elif skipped:
            remedy = f"its norms are skipped: {skipped[0].reason}"
        else:
            remedy = "it has neither norms nor convolutions with a bias other than 0: take another model"
        raise BnpatchError(f"{self.name} has no norm that could be patched", remedy)

    @override
    def facts(self) -> dict[str, NormFacts]:
        eps = {norm.module_name: norm.eps for norm in self._patchable}
        return {name: NormFacts(_as_tensors(part), eps[name]) for name, part in self._source().items()}

    def _source(self) -> dict[str, Moments[Any]]:
        """Return, by name of norm layer, its running statistics without lambda."""
        running = {name: as_arrays(part) for name, part in self._state.running.items()}
        return {
            norm.module_name: running.get(norm.module_name, Moments(norm.running_mean, norm.running_var))
            for norm in self._patchable
        }

    @override
    def statistics_in_use(self) -> dict[str, Moments[Any]]:
        state, source = self._state, self._source()
        # Recovered norms have their running statistics in the graph.
        running = {name: as_arrays(m) for name, m in state.running.items() if not name.endswith(FUSED)}
        return running | {
            name: mix(weight, as_arrays(state.re_estimated[name]), source[name])
            for name, weight in state.weights.lambdas.items()
            if weight
        }

    @override
    def predict(self, x: Tensor) -> Tensor:
        output = self.output_for(x)
        if self.weights.is_baseline(self.baseline_alphas()):
            (y,) = self.run(self._sessions.plain, [output.name], x)
        else:
            opened = self._sessions.weighted(self.weights)
            (y,) = self.run(opened.session, [output.name], x, self._feeds(opened))
        return output.read(torch.from_numpy(y))

    @override
    def ready_to_run(self, x: Tensor, threads: int | None = None) -> Callable[[], object]:
        from bnpatch.models.export import patched_graph  # imported here because it imports this module

        signature = self.signature
        if signature.batch not in (None, len(x)):
            raise BnpatchError(
                f"{self.name} takes {signature.batch} images at a time, not {len(x)}",
                f"set --batch-size {signature.batch}",
            )
        inputs = self._prepare((128 + 64 * x).clamp(0, 255).byte() if signature.dtype == np.uint8 else x)
        session = open_session(patched_graph(self)[0], self.device, threads)
        read = [self.output.name] if self.output else list(signature.outputs)
        run = partial(session.run, read, {signature.input: inputs})
        with naming_the_shape(self.name, inputs):
            run()
        return run

    @override
    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        operators = self.signature.outputs
        arrays = self.run(self._sessions.plain, list(operators), x)
        tensors = {name: torch.from_numpy(y) for name, y in zip(operators, arrays, strict=True)}
        return tensors, [name for name, operator in operators.items() if operator == "Sigmoid"]

    @override
    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        opened = self._sessions.weighted(self.weights, observe=True)
        output = self.output_for(x)
        names = [output.name, *_flat(opened.moments)]
        y, *moments = self.run(opened.session, names, x, self._feeds(opened))
        return output.read(torch.from_numpy(y)), _by_module(opened.moments, moments)

    @override
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        session, names = self._sessions.by_batch
        if not names:
            return {}  # for an empty list of outputs, onnxruntime would return all outputs
        moments = _by_module(names, self.run(session, _flat(names), x))
        return {module: pooled_rows(rows) for module, rows in moments.items()}

    def _feeds(self, opened: WeightedSession) -> dict[str, Array]:
        return opened.feeds(self.weights, self.statistics_in_use())

    def run(
        self, session: Any, outputs: list[str], x: Tensor, feeds: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """Run a session of this model on a batch, in portions if the graph's batch size is fixed.

        Args:
            session: a session of the graph, or of a graph that was made from it.
            outputs: names of the outputs to return; one axis of each is that of the batch, or it is of shape
                (1, ...) for one value per batch.
            x: see :meth:`predict`.
            feeds: values of further inputs.
        """
        inputs = self._prepare(x)
        with naming_the_shape(self.name, inputs):
            return run_in_portions(session, outputs, self.signature, inputs, feeds or {})

    @override
    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        shapes = _known_shapes(self._patchable)
        if len(shapes) == len(self.weights.alphas):
            return shapes
        # The graph leaves the size of the image open.
        size = list(self.preprocessing.input_size if example is None else example.shape[1:])
        if len(size) != len(self.signature.size):
            return shapes
        if self.signature.channels_last:
            size = [*size[1:], size[0]]
        graph = self._recovered.clone()
        images = next(value for value in graph.graph.inputs if value.name == self.signature.input)
        images.shape = ir.Shape([self.signature.batch, *size])
        names = {norm.module_name for norm in self._patchable}
        return _known_shapes([n for n in inventory(graph).norm_layers if n.module_name in names]) | shapes

    @override
    def watch_fused(self, example: Tensor) -> Watch | None:
        graph = self.graph.clone()
        convs = [conv for conv in find_fused_convs(graph) if conv.node.graph is graph.graph]
        names = [name for pair in observe(graph, convs) for name in pair]
        session = open_session(graph, self.device)

        def watch(x: Tensor) -> dict[str, Moments[Any]]:
            outputs = self.run(session, names, x)
            pairs = zip(convs, outputs[::2], outputs[1::2], strict=True)
            return {conv.name: Moments(mean, var) for conv, mean, var in pairs}

        return watch if convs else None

    @override
    def save(self, path: str | os.PathLike[str], recipe: Recipe, images: Tensor | None = None) -> bool:
        from bnpatch.models.export import export_onnx  # imported here because it imports this module

        with self.in_state(recipe.state):
            export_onnx(self, path, images=images)
        return True

    @override
    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        known = {*running, *self._state.running}
        there = (n for n in self._found.norm_layers if not n.needs_calibration or n.module_name in known)
        hashes = {norm.module_name: of_graph_norm(norm) for norm in there}
        for conv in find_fused_convs(self.graph):
            if conv.name + FUSED in known:  # hash the convolution, not the moments, which depend on data
                hashes[conv.name + FUSED] = fingerprint(conv.parameters)
        return hashes

    @override
    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()  # a graph is always in evaluation mode

    @override
    def unpatched_graph(self, example_input: Tensor | None = None) -> tuple[ir.Model, frozenset[str]]:
        graph = self.graph.clone()
        write_metadata(graph, self.preprocessing, self.class_names, self.chosen_output)
        return graph, frozenset(self.weights.alphas)

    def _prepare(self, x: Tensor) -> Array:
        takes_bytes = self.signature.dtype == np.uint8
        if not x.is_floating_point() and not takes_bytes:
            values = self.preprocessing.mean, self.preprocessing.std
            mean, std = (255 * torch.tensor(v).view(1, -1, 1, 1) for v in values)
            x = (x.float() - mean) / std
        if self.signature.channels_last and x.ndim == 4:
            x = x.movedim(1, -1)
        x = x.float() if x.dtype == torch.bfloat16 else x  # NumPy has no such type
        return np.ascontiguousarray(x.cpu().numpy().astype(self.signature.dtype))


def _known_shapes(norms: Iterable[OnnxNormLayer]) -> dict[str, tuple[int, ...]]:
    sizes = {norm.module_name: norm.dims[2:] for norm in norms}
    known = {name: tuple(n for n in dims if isinstance(n, int)) for name, dims in sizes.items()}
    return {name: spatial for name, spatial in known.items() if len(spatial) == len(sizes[name])}


def _flat(names: MomentNames) -> list[str]:
    return [name for pairs in names.values() for pair in pairs for name in pair]


def _by_module(names: MomentNames, arrays: Iterable[Array]) -> dict[str, Moments[Tensor]]:
    """Return the moments of all calls of each norm layer, (k * N, C); arrays are in the order of names."""
    rows = (torch.from_numpy(array).flatten(1) for array in arrays)
    return {
        module: joined([Moments(next(rows), next(rows)) for _ in pairs]) for module, pairs in names.items()
    }


def _as_tensors(moments: Moments[Any]) -> Moments[Tensor]:
    return Moments(*(torch.as_tensor(np.asarray(p, np.float32)) for p in (moments.mean, moments.var)))
