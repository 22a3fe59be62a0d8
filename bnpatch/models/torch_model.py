"""The torch backend: a torch module that can be patched and run."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError, first_line
from bnpatch.core.inventory import FUSED, Inventory, NormFacts, SkippedNorm
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.architecture import Architecture
from bnpatch.models.base import Model, Watch
from bnpatch.models.fingerprints import is_fused, of_module
from bnpatch.models.outputs import Output, Sigmoids, tensors_of
from bnpatch.models.torch_export import patched_graph
from bnpatch.models.torch_file import save_checkpoint
from bnpatch.models.torch_state import buffers_of, state_of
from bnpatch.nn.fused_conv import find_fused_convs, forget, recover
from bnpatch.nn.hooks import accurate_moments, at_inputs, at_outputs, in_evaluation_mode, joined, pooled_rows
from bnpatch.nn.surgery import (
    TorchNormLayer,
    calibrated,
    inventory,
    patch,
    patched_layers,
    swap,
    uncalibrated,
    unpatch,
)
from bnpatch.nn.tracing import functional_norms
from bnpatch.onnx.rewrite import AlphaInputs

# How many input values a CPU of up to seven threads takes at a time: those of four images of 224 pixels.
# Sixty-four at a time took three times as long (EfficientNet-Lite0).
_CPU_VALUES = 4 * 3 * 224 * 224


@dataclass
class TorchModel(Model[TorchNormLayer]):
    """Runs and patches a torch module. :func:`bnpatch.load` makes one.

    Attributes:
        module: the module; patches change it in place.
        name: the name of the model in tables and files.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, or None if they are not known.
        class_order: how its training script sorted class folders, "plain" (1, 10, 2) or "natural".
        arch: the architecture, to build the module again; None if only the module itself can be stored.
        device: the device that computes.
        amp: compute in half precision where autocast allows it (bfloat16 if gradients are computed).
        notes: what a person should know about how it was loaded.
        train_batch_size: examples per training step and device, or None if the checkpoint does not say it.
        output: see :class:`~bnpatch.models.base.Model`, as for ``wanted_output``.
        state: see :class:`~bnpatch.models.base.Model`. The first state has the weights of the module, which
            may be patched already, and from ``_state`` what a module does not have.
    """

    has_gradients: ClassVar[bool] = True
    suffix: ClassVar[str] = ".pt"
    norm_cost: ClassVar[int] = 400_000

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    arch: Architecture | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: bool = False
    notes: list[str] = field(default_factory=list)
    train_batch_size: int | None = None
    output: Output | None = None
    wanted_output: str | None = None
    # A field, so that it goes along where dataclasses.replace makes another of this model.
    _state: PatchState = field(default_factory=PatchState, repr=False)

    def __post_init__(self) -> None:
        self.module.to(self.device)
        self._normalization: tuple[Preprocessing, Tensor, Tensor] | None = None
        # By id of moments: the moments, and their copy on the device.
        self._statistics: dict[int, tuple[Moments[Any], Moments[Tensor]]] = {}
        self._state = state_of(self.inventory().norm_layers, self._state)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def adopt(self, module: nn.Module) -> None:
        """Take another module in the place of the present one, or the same after its layers were changed."""
        self.module = module.to(self.device)
        self._state = state_of(self.inventory().norm_layers, PatchState(include_1x1=self._state.include_1x1))

    def inventory(self) -> Inventory[TorchNormLayer]:
        """See :func:`bnpatch.inventory`."""
        return inventory(self.module)

    def uncalibrated(self) -> tuple[str, ...]:
        """Name the norms that become norm layers once they have running statistics, such as Group Norm."""
        return tuple(uncalibrated(self.module))

    def baseline_alphas(self) -> dict[str, float]:
        """Return, by name of norm layer, the alpha at which it computes what it did before any patch."""
        return {norm.name: norm.baseline_alpha for norm in self.inventory().norm_layers}

    def set_state(self, state: PatchState) -> None:
        """See :meth:`bnpatch.models.base.Model.set_state`."""
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not get gradients later
            super().set_state(state)

    def _refuse_without_norm_layers(self) -> None:
        patch(self.module)  # raises, with the reasons

    def _make_norm_layers(self, state: PatchState) -> None:
        before = self._state.running
        if state.running is before:
            return
        gone, new = before.keys() - state.running.keys(), state.running.keys() - before.keys()
        waiting = {name for name in new if not is_fused(self.module, name)}
        self.module = calibrated(self.module, {n: self._on_device(state.running[n]) for n in waiting})
        for name, moments in state.running.items():
            if is_fused(self.module, name) and moments is not before.get(name):
                recover(self.module, {name.removesuffix(FUSED): self._on_device(moments)})
        self.module = unpatch(self.module, where=lambda norm: norm.name in gone)
        for name in gone:
            if is_fused(self.module, name):
                forget(self.module, name.removesuffix(FUSED))

    def _use(self, state: PatchState) -> None:
        if not state.weights.alphas:
            return
        weights = state.weights
        self.module = patch(self.module, weights.alphas, include_1x1=state.include_1x1, slope=weights.slopes)
        for norm in self.inventory().norm_layers:
            layer = norm.patched
            assert layer is not None  # patch() has just made it one
            if norm.baseline_alpha == 0:
                layer.channels_per_group = state.channels_per_group.get(norm.name, 1)
            weight = weights.lambdas[norm.name]
            source = None  # stands for the buffers, which a recovered norm layer has, too
            if norm.parameters()[2] is None:
                source = self._on_device(state.running[norm.name])
            if weight:
                target = self._on_device(state.target[norm.name])
                source = mix(weight, target, source or buffers_of(norm))
            layer.running = source

    def source(self, norm: TorchNormLayer) -> Moments[Tensor]:
        """Return a norm layer's running statistics without lambda: from data if it has some, else its own."""
        if norm.name in self._state.running:
            return self._on_device(self._state.running[norm.name])
        return buffers_of(norm)

    def target(self, norm: TorchNormLayer) -> Moments[Tensor]:
        """Return the re-estimated statistics of a norm layer, on the device."""
        return self._on_device(self._state.target[norm.name])

    def _on_device(self, moments: Moments[Any]) -> Moments[Tensor]:
        known = self._statistics.get(id(moments))
        if known is None or known[0] is not moments:
            parts = (torch.as_tensor(part, dtype=torch.float32) for part in (moments.mean, moments.var))
            known = moments, Moments(*(part.to(self.device) for part in parts))
            self._statistics[id(moments)] = known
        return known[1]

    def statistics_in_use(self) -> dict[str, Moments[Tensor]]:
        """Return, by name, the mean and variance (C,) in use where they are not those in the buffers."""
        layers = patched_layers(self.module).items()
        return {name: layer.running for name, layer in layers if layer.running is not None}

    def alphas_in_use(self) -> dict[str, float | Tensor]:
        """Return the weight of the example by name of norm layer; a learned one is the tensor itself."""
        return {name: layer.alpha for name, layer in patched_layers(self.module).items()}

    def slopes_in_use(self) -> dict[str, float | Tensor]:
        """Return the slope by name of norm layer; a learned one is the tensor itself."""
        return {name: layer.slope for name, layer in patched_layers(self.module).items()}

    def facts(self) -> dict[str, NormFacts]:
        """Return, by name of norm layer, what the layer has from the checkpoint."""
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

    def watch_fused(self, example: Tensor) -> Watch | None:
        """See :meth:`bnpatch.models.base.Model.watch_fused`."""
        names = self.fused_convs(example)
        return (lambda x: self.observe_outputs(names, x)) if names else None

    @torch.inference_mode()
    def observe_outputs(self, names: Iterable[str], x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch, and return by name the moments (N, C) of each example at the output of modules."""
        seen: dict[str, list[Moments[Tensor]]] = {}
        modules = {name: self.module.get_submodule(name) for name in names}
        with at_outputs(modules, lambda name, y: seen.setdefault(name, []).append(accurate_moments(y))):
            self._returned(x)
        return {name: joined(parts) for name, parts in seen.items()}

    def efficient_batch(self, batch_size: int, x: Tensor) -> int:
        """Return how many examples like those of a batch ``x`` to run at a time, at most ``batch_size``.

        On a CPU, feature maps of many large images fit no cache, and their memory is asked of the operating
        system again for each layer.
        """
        if self.device.type != "cpu":
            return batch_size
        most = _CPU_VALUES * max(1, torch.get_num_threads() // 4) // max(1, x[:1].numel())
        return max(1, min(batch_size, most))

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        """Run a batch as :meth:`forward` does, without gradients."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs (N, ...).

        Returns:
            Logits (N, K), or outputs of another shape if the model has them, on its device.

        Raises:
            BnpatchError: the model does not take this input, returns no tensor, or several of which none is
                chosen.
        """
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

    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        try:
            with Sigmoids() as sigmoids:
                tensors = self._returned(x)
        except BnpatchError:  # compiled code may refuse to run within such a mode
            return self._returned(x), ()
        return tensors, {name for name, y in tensors.items() if y in sigmoids}

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
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise NotEnoughMemoryError(self.device, len(x)) from error
                raise BnpatchError(
                    f"{self.name} does not take an input of shape {tuple(x.shape)}: {first_line(error)}",
                    "set --img-size, or give inputs (example_input in Python) of the shape that it takes",
                ) from error

    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Run a batch as :meth:`forward` does.

        Args:
            x: as for :meth:`forward`.
            gradients: let gradients flow through the results.

        Returns:
            The outputs; and by name of norm layer or uncalibrated norm, the moments (N, C) of each example at
            its input. If a module is called k times, they are of shape (k * N, C).
        """
        seen: dict[str, list[Moments[Tensor]]] = {}
        norms = {
            norm_layer.name: norm_layer.module for norm_layer in self.inventory().norm_layers
        } | uncalibrated(self.module)
        self.output_for(x)  # before the hooks are there, because it runs inputs of its own
        watch = at_inputs(norms, lambda name, x: seen.setdefault(name, []).append(accurate_moments(x)))
        with torch.inference_mode(not gradients), watch:
            outputs = self.forward(x)
        return outputs, {name: joined(parts) for name, parts in seen.items()}

    @torch.inference_mode()
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch as in training: Batch Norm normalizes by the moments of the batch.

        Group Norm computes what it always does. The model is left as it was.

        Returns:
            By name of norm layer, the moments (C,) of the whole batch at its input, pooled over all calls if
            a module is called several times. Norm layers that the batch does not reach are missing.
        """
        seen: dict[str, list[Moments[Tensor]]] = {}

        def normalize_by(name: str, x: Tensor) -> None:
            if not x.shape[0]:
                return
            parts = accurate_moments(x)
            seen.setdefault(name, []).append(parts)
            if (layer := layers[name]).baseline_alpha == 0:
                layer.running = pooled_rows(parts)

        with self.in_state(replace(self.state, weights=PatchWeights())):
            layers = patched_layers(self.module)
            with at_inputs(layers, normalize_by):
                self._returned(x)
        return {name: pooled_rows(joined(parts)) for name, parts in seen.items()}

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and std for bytes, on the device; they are cached until the preprocessing changes."""
        if self._normalization is None or self._normalization[0] is not self.preprocessing:
            values = (self.preprocessing.mean, self.preprocessing.std)
            mean, std = ((255 * torch.tensor(v)).view(1, -1, 1, 1).to(self.device) for v in values)
            self._normalization = (self.preprocessing, mean, std)
        return self._normalization[1:]

    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Return the spatial shape of each norm layer's input by name, found by running one input.

        A norm layer that the input doesn't reach is missing.

        Args:
            example: an input (1, ...); by default a blank image.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        layers = {norm_layer.name: norm_layer.module for norm_layer in self.inventory().norm_layers}
        with at_inputs(layers, lambda name, x: shapes.setdefault(name, tuple(x.shape[2:]))):
            self._run_one(example)
        return shapes

    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        """Return a hash of the parameters of each norm layer, by name; a patch does not change it.

        Args:
            running: names of further norms to include, which have no running statistics yet.
        """
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

    def rewritten(
        self, alpha_inputs: AlphaInputs | None = None, example_input: Tensor | None = None
    ) -> tuple[ir.Model, tuple[str, ...]]:
        """See :meth:`bnpatch.models.base.Model.rewritten`."""
        if example_input is None:
            example_input = torch.zeros(2, *self.preprocessing.input_size)
        return patched_graph(self, example_input, alpha_inputs)

    def evaluating(self) -> AbstractContextManager[None]:
        """Put the module in evaluation mode; when the context ends, restore every mode."""
        return in_evaluation_mode(self.module)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Put the model in evaluation mode; when the context ends, restore every mode, layer and weight."""
        patched = patched_layers(self.module)
        try:
            with super().borrowed():
                yield
        finally:
            self.module = unpatch(self.module, where=lambda norm: norm.name not in patched)

    def save(self, path: str | os.PathLike[str], recipe: Recipe) -> bool:
        """Write a checkpoint for :func:`bnpatch.load` and ``bnpatch evaluate``.

        Returns:
            Whether the file loads without ``--unsafe-load``. It does not if the architecture, built by its
            name, does not give this model again, because the module itself is pickled then.
        """
        return save_checkpoint(self, path, recipe)
