"""The torch backend: a torch module that can be patched and run."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn
from typing_extensions import override

from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError, first_line
from bnpatch.core.inventory import Inventory, NormFacts, SkippedNorm
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.patch import PatchState
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.backend import Watch
from bnpatch.models.base import Model
from bnpatch.models.fingerprints import of_module
from bnpatch.models.outputs import Sigmoids, tensors_of
from bnpatch.models.torch_export import unpatched_graph
from bnpatch.models.torch_file import save_checkpoint
from bnpatch.models.torch_state import buffers_of, make_learnable, state_of, with_norm_layers, with_state
from bnpatch.nn import hooks
from bnpatch.nn.fused_conv import find_fused_convs
from bnpatch.nn.places import swap
from bnpatch.nn.surgery import TorchNormLayer, inventory, patch, patched_layers, uncalibrated, unpatch
from bnpatch.nn.tracing import functional_norms

# How many input values a CPU of up to seven threads takes at a time: those of four images of 224 pixels.
# Sixty-four at a time took three times as long (EfficientNet-Lite0).
_CPU_VALUES = 4 * 3 * 224 * 224


@dataclass
class TorchModel(Model[TorchNormLayer]):
    """Runs and patches a torch module. :func:`bnpatch.load` makes one.

    Attributes:
        module: the module; patches change it in place.
        amp: compute in half precision where autocast allows it (bfloat16 if gradients are computed).
        train_batch_size: examples per training step and device, or None if the checkpoint does not say it.

    :class:`~bnpatch.models.base.Model` has the other attributes.
    """

    suffix: ClassVar[str] = ".pt"
    norm_cost: ClassVar[int] = 400_000

    module: nn.Module
    _: KW_ONLY
    amp: bool = False
    train_batch_size: int | None = None

    def __post_init__(self) -> None:
        make_learnable(self.module.to(self.device))
        self._normalization: tuple[Preprocessing, Tensor, Tensor] | None = None
        # By id of moments: the moments, and their copy on the device.
        self._statistics: dict[int, tuple[Moments[Any], Moments[Tensor]]] = {}
        self._state = state_of(self.inventory().norm_layers, self._state)

    @property
    @override
    def dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def adopt(self, module: nn.Module) -> None:
        """Take another module in the place of the present one, or the same after its layers were changed."""
        self.module = module.to(self.device)
        self._state = state_of(self.inventory().norm_layers, PatchState(include_1x1=self._state.include_1x1))

    @override
    def inventory(self) -> Inventory[TorchNormLayer]:
        return inventory(self.module)

    @override
    def uncalibrated(self) -> tuple[str, ...]:
        return tuple(uncalibrated(self.module))

    @override
    def baseline_alphas(self) -> dict[str, float]:
        return {norm.name: norm.baseline_alpha for norm in self.inventory().norm_layers}

    @override
    def set_state(self, state: PatchState) -> None:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not get gradients later
            super().set_state(state)

    @override
    def with_gradients(self, x: Tensor) -> "TorchModel":
        return self

    @override
    def _refuse_without_norm_layers(self) -> None:
        patch(self.module)  # raises, with the reasons

    @override
    def _make_norm_layers(self, state: PatchState) -> None:
        self.module = with_norm_layers(self.module, self._state.running, state.running, self._on_device)

    @override
    def _use(self, state: PatchState) -> None:
        if state.weights.alphas:
            self.module = with_state(self.module, state, self._on_device)

    def source(self, norm: TorchNormLayer) -> Moments[Tensor]:
        """Return a norm layer's running statistics without lambda: from data if it has some, else its own."""
        if norm.name in self._state.running:
            return self._on_device(self._state.running[norm.name])
        return buffers_of(norm)

    def re_estimated(self, norm: TorchNormLayer) -> Moments[Tensor]:
        """Return the re-estimated statistics of a norm layer, on the device."""
        return self._on_device(self._state.re_estimated[norm.name])

    def _on_device(self, moments: Moments[Any]) -> Moments[Tensor]:
        known = self._statistics.get(id(moments))
        if known is None or known[0] is not moments:
            parts = (torch.as_tensor(part, dtype=torch.float32) for part in (moments.mean, moments.var))
            known = moments, Moments(*(part.to(self.device) for part in parts))
            self._statistics[id(moments)] = known
        return known[1]

    @override
    def statistics_in_use(self) -> dict[str, Moments[Tensor]]:
        layers = patched_layers(self.module).items()
        return {name: layer.running for name, layer in layers if layer.running is not None}

    @override
    def weights_in_use(self) -> dict[str, ExampleWeight]:
        return {name: layer.example_weight for name, layer in patched_layers(self.module).items()}

    @override
    def facts(self) -> dict[str, NormFacts]:
        return {
            norm.name: NormFacts(self.source(norm), float(norm.module.eps))  # type: ignore[arg-type]
            for norm in self.inventory().norm_layers
        }

    def fused_convs(self, example: Tensor | None = None) -> tuple[str, ...]:
        """Name the convolutions that a Batch Norm may have been fused into, found by running one input.

        Args:
            example: an input (1, ...); by default a blank image.
        """
        with self.evaluating():
            return find_fused_convs(self.module, lambda: self._run_one(example))

    def functional_norms(self) -> tuple[SkippedNorm, ...]:
        """List the norms that are function calls in a forward, found by running one blank image."""
        with self.evaluating():
            return functional_norms(self.module, self._run_one)

    @override
    def watch_fused(self, example: Tensor) -> Watch | None:
        names = self.fused_convs(example)

        @torch.inference_mode()
        def watch(x: Tensor) -> dict[str, Moments[Tensor]]:
            seen = hooks.SeenMoments()
            with hooks.at_outputs({name: self.module.get_submodule(name) for name in names}, seen.add):
                self._returned(x)
            return seen.joined()

        return watch if names else None

    @override
    def efficient_batch(self, batch_size: int, x: Tensor) -> int:
        if self.device.type != "cpu":
            return batch_size
        # Feature maps of many large images fit no cache, and their memory is asked of the operating system
        # again for each layer.
        most = _CPU_VALUES * max(1, torch.get_num_threads() // 4) // max(1, x[:1].numel())
        return max(1, min(batch_size, most))

    @override
    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @override
    def ready_to_run(self, x: Tensor, threads: int | None = None) -> Callable[[], object]:
        x = x.to(self.device)
        self.output_for(x)  # so that it is not timed

        def run() -> None:
            self.predict(x)
            if self.device.type != "cpu":  # predict returns before the device has finished
                torch.accelerator.synchronize(self.device)

        return run

    @override
    def forward(self, x: Tensor) -> Tensor:
        output = self.output_for(x)
        tensors = self._returned(x)
        if output.name not in tensors:
            raise BnpatchError(f"{self.name} returned no {output.name} this time", "wrap it so that it does")
        return output.read(tensors[output.name])

    def classes_of(self, returned: Any) -> Tensor:
        """Return the logits (N, K) of the classes in what the module returned for a batch in training.

        Some models return auxiliary outputs after the main one then, and the main one alone at inference.
        """
        output, tensors = self.output_for(self._blank()), tensors_of(returned)
        return self.as_classes(output.read(tensors.get(output.name, next(iter(tensors.values())))))

    def _returned(self, x: Tensor) -> dict[str, Tensor]:
        """Run a batch, and return all tensors that the module returns, by name."""
        y = self._run(x)
        tensors = tensors_of(y)
        if not tensors:
            raise BnpatchError(
                f"the model returns a {type(y).__name__}", "wrap it so that it returns a tensor"
            )
        return tensors

    def output_names(self, example: Tensor) -> list[str]:
        """Return the names that the outputs have in an export."""
        with self.evaluating(), torch.inference_mode():
            return [name or "output" for name in self._returned(example[:1])]

    @override
    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        try:
            with Sigmoids() as sigmoids:
                tensors = self._returned(x)
        except BnpatchError:  # compiled code may refuse to run within such a mode
            return self._returned(x), ()
        return tensors, {name for name, y in tensors.items() if y in sigmoids}

    def _run_one(self, example: Tensor | None = None) -> None:
        with self.evaluating(), torch.inference_mode():
            self._returned(self._blank() if example is None else example)

    def _run(self, x: Tensor) -> Any:
        x = x.to(self.device, non_blocking=True)
        if not x.is_floating_point():
            mean, std = self._mean_and_std()
            x = (x.float() - mean) / std
        x = x.to(self.dtype if any(True for _ in self.module.parameters()) else x.dtype)
        # Gradients use bfloat16, because they would underflow in float16 without a scaled loss.
        dtype = torch.bfloat16 if torch.is_grad_enabled() else None
        with torch.autocast(self.device.type, dtype, enabled=self.amp):
            try:
                return self.module(x)
            # torch's functions and the checks of a model raise these for an input of another shape.
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise NotEnoughMemoryError(self.device, len(x)) from error
                raise BnpatchError(
                    f"{self.name} does not take an input of shape {tuple(x.shape)}: {first_line(error)}",
                    "set --img-size, or give inputs (example_input in Python) of the shape that it takes",
                ) from error

    @override
    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        seen = hooks.SeenMoments()
        norms = {norm.name: norm.module for norm in self.inventory().norm_layers}
        norms |= uncalibrated(self.module)
        self.output_for(x)  # before the hooks are there, because it runs inputs of its own
        with torch.inference_mode(not gradients), hooks.at_inputs(norms, seen.add):
            outputs = self.forward(x)
        return outputs, seen.joined()

    @override
    @torch.inference_mode()
    def first_moments(self, x: Tensor, names: Collection[str]) -> tuple[str, Moments[Tensor]] | None:
        norms = {norm.name: norm.module for norm in self.inventory().norm_layers if norm.name in names}
        reached = hooks.first_input(norms, lambda: self._run(x))
        return None if reached is None else (reached[0], hooks.accurate_moments(reached[1]))

    @override
    @torch.inference_mode()
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        seen = hooks.SeenMoments()

        def normalize_by(name: str, x: Tensor) -> None:
            if not x.shape[0]:
                return
            parts = seen.add(name, x)
            if (layer := layers[name]).baseline_alpha == 0:
                layer.running = hooks.pooled_rows(parts)

        with self.in_state(self.baseline()):
            layers = patched_layers(self.module)
            with hooks.at_inputs(layers, normalize_by):
                self._returned(x)
        return {name: hooks.pooled_rows(moments) for name, moments in seen.joined().items()}

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and std for bytes, on the device; they are cached until the preprocessing changes."""
        if self._normalization is None or self._normalization[0] is not self.preprocessing:
            values = (self.preprocessing.mean, self.preprocessing.std)
            mean, std = ((255 * torch.tensor(v)).view(1, -1, 1, 1).to(self.device) for v in values)
            self._normalization = (self.preprocessing, mean, std)
        return self._normalization[1:]

    @override
    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        layers = {norm_layer.name: norm_layer.module for norm_layer in self.inventory().norm_layers}
        with hooks.at_inputs(layers, lambda name, x: shapes.setdefault(name, tuple(x.shape[2:]))):
            self._run_one(example)
        return shapes

    @override
    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        return of_module(self.module, running)

    @contextmanager
    def unpatched(self) -> Iterator[nn.Module]:
        """Yield the module without its patch; when the context ends, it is patched again."""
        layers = patched_layers(self.module).values()
        origins = [layer.as_origin() for layer in layers]
        self.module = swap(self.module, {id(a): b for a, b in zip(layers, origins, strict=True)})
        try:
            yield self.module
        finally:
            self.module = swap(self.module, {id(b): a for a, b in zip(layers, origins, strict=True)})

    @override
    def unpatched_graph(self, example_input: Tensor | None = None) -> tuple[ir.Model, frozenset[str]]:
        if example_input is None:
            example_input = torch.zeros(2, *self.preprocessing.input_size)
        return unpatched_graph(self, example_input)

    @override
    def evaluating(self) -> AbstractContextManager[None]:
        return hooks.in_evaluation_mode(self.module)

    @override
    @contextmanager
    def borrowed(self) -> Iterator[None]:
        patched = patched_layers(self.module)
        try:
            with super().borrowed():
                yield
        finally:
            self.module = unpatch(self.module, where=lambda norm: norm.name not in patched)

    @override
    def save(self, path: str | os.PathLike[str], recipe: Recipe, images: Tensor | None = None) -> bool:
        return save_checkpoint(self, path, recipe)
