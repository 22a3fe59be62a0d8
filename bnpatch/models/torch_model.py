"""A torch model that can be patched and asked for predictions."""

import io
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core import recipe as recipes
from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError, first_line
from bnpatch.core.inventory import FUSED, Inventory, NormFacts, SkippedNorm
from bnpatch.core.io import atomic_path
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import NormRecipe, Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.architecture import Architecture
from bnpatch.nn.fused_conv import VirtualNorm, find_fused_convs, is_convolution, recover
from bnpatch.nn.hooks import accurate_moments, at_inputs, at_outputs, in_evaluation_mode, joined, pooled_rows
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import NormLayer, calibrated, inventory, patch, swap, uncalibrated, unpatch
from bnpatch.nn.tracing import functional_norms


@dataclass
class TorchModel:
    """A torch module with what is needed to feed it.

    Attributes:
        module: the model; patched in place.
        name: what it is called in tables and files.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, where known.
        class_order: how its training script sorted class folders, "plain" (1, 10, 2) or "natural".
        arch: how to build it again; None where only the module itself can be stored.
        device: where it computes.
        amp: compute in the device's half precision where autocast thinks it safe; in bfloat16 where
            gradients are taken.
        include_1x1: weigh also where an example has one value per channel.
        notes: what a person should know about how it was loaded.
        train_batch_size: examples per training step and device, where the checkpoint says it.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    arch: Architecture | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: bool = False
    include_1x1: bool = False
    notes: list[str] = field(default_factory=list)
    train_batch_size: int | None = None
    # By name of norm layer; fields, so that they go along where dataclasses.replace makes another of this
    # model.
    _calibrated: dict[str, Moments[Tensor]] = field(default_factory=dict, repr=False)
    _targets: dict[str, Moments[Tensor]] = field(default_factory=dict, repr=False)
    _lambdas: dict[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.module.to(self.device)
        self._calibrated, self._targets = (
            {name: self._on_device(moments) for name, moments in known.items()}
            for known in (self._calibrated, self._targets)
        )
        self._lambdas = dict(self._lambdas)
        self._take_over_running()
        self._num_outputs: int | None = None
        self._returns_probabilities = False
        self._normalization: tuple[Preprocessing, Tensor, Tensor] | None = None

    def _take_over_running(self) -> None:
        """Account for running moments that the module came with, from another TorchModel of it."""
        for norm_layer in self.inventory().norm_layers:
            if norm_layer.kind == VirtualNorm.__name__:
                _, _, mean, var = norm_layer.parameters()
                assert mean is not None  # it has buffers
                assert var is not None
                self._calibrated.setdefault(norm_layer.name, Moments(mean, var))
            if norm_layer.name in self._lambdas or norm_layer.name in self._calibrated:
                continue
            if (
                isinstance(norm_layer.module, ExampleWeightedNorm)
                and (running := norm_layer.module.running) is not None
            ):
                if norm_layer.parameters()[2] is None:
                    self._calibrated[norm_layer.name] = running
                else:  # nobody knows what they were mixed from
                    self._targets[norm_layer.name], self._lambdas[norm_layer.name] = running, 1.0

    def inventory(self) -> Inventory[NormLayer]:
        """See :func:`bnpatch.inventory`."""
        return inventory(self.module)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """See :func:`bnpatch.patch`."""
        self.module = patch(self.module, alpha, include_1x1=self.include_1x1)

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of norm layer; 0 where a norm layer isn't patched."""
        return {norm_layer.name: norm_layer.alpha for norm_layer in self.inventory().norm_layers}

    def setting(self) -> PatchWeights:
        """Both weights of every norm layer."""
        alphas = self.alphas()
        return PatchWeights(alphas, {name: self._lambdas.get(name, 0.0) for name in alphas})

    def set(self, setting: PatchWeights) -> None:
        """Set weights by name of norm layer.

        Raises:
            BnpatchError: there is no norm layer of a name, or lambda is to weigh what wasn't given.
            InvalidAlphaError: a weight is not in [0, 1].
        """
        setting.check_lambdas({norm_layer.name for norm_layer in self.inventory().norm_layers}, self._targets)
        self.set_alphas(setting.alphas)
        self._lambdas.update((name, float(weight)) for name, weight in setting.lambdas.items())
        self._mix(setting.lambdas)

    def _mix(self, names: Container[str]) -> None:
        """Give the layers named the running moments that their lambda asks for."""
        for norm_layer in self.inventory().norm_layers:
            if norm_layer.name in names and isinstance(layer := norm_layer.module, ExampleWeightedNorm):
                weight = self._lambdas.get(norm_layer.name, 0.0)
                # None for the buffers, which a norm layer that was recovered has, too
                source = self._calibrated.get(norm_layer.name) if norm_layer.parameters()[2] is None else None
                layer.running = (
                    mix(weight, self.target(norm_layer), self.source(norm_layer)) if weight else source
                )

    def source(self, norm_layer: NormLayer) -> Moments[Tensor]:
        """The running moments that a norm layer came with, those of the checkpoint as a rule."""
        if norm_layer.name in self._calibrated:
            return self._calibrated[norm_layer.name]
        _, _, mean, var = norm_layer.parameters()
        assert mean is not None  # a norm layer has them, or was calibrated
        assert var is not None
        return Moments(mean.detach(), var.detach())

    def running(self) -> dict[str, Moments[Tensor]]:
        """Running mean and variance (C,) that a norm layer normalizes by now, where not those of its
        buffers.
        """
        layers = (
            (s.name, s.module)
            for s in self.inventory().norm_layers
            if isinstance(s.module, ExampleWeightedNorm)
        )
        return {name: layer.running for name, layer in layers if layer.running is not None}

    def facts(self) -> dict[str, NormFacts]:
        """What each norm layer brings along, by name."""
        return {s.name: NormFacts(self.source(s), float(s.module.eps)) for s in self.inventory().norm_layers}  # type: ignore[arg-type]

    def target(self, norm_layer: NormLayer) -> Moments[Tensor]:
        """The moments of the data at hand at a norm layer, see :meth:`retarget`."""
        return self._targets[norm_layer.name]

    def retarget(self, targets: Mapping[str, Moments[Any]]) -> None:
        """Give the moments of the data at hand, (C,) by name of norm layer, that lambda is the weight of.

        Norm layers that are not named keep theirs.
        """
        self._targets.update((name, self._on_device(moments)) for name, moments in targets.items())
        self._mix({name for name in targets if self._lambdas.get(name)})

    def targets(self) -> Mapping[str, Moments[Any]]:
        """What :meth:`retarget` was given last."""
        return self._targets

    def calibrate(self, moments: Mapping[str, Moments[Any]]) -> None:
        """Give running moments (C,) to norms that have none, by name: from now on they are norm layers.

        They are at their identity; Group Norm that was calibrated before gets other moments and keeps its
        weights. The name of a convolution + FOLDED stands for the Batch Norm that was fused into it.

        Raises:
            BnpatchError: a name is no such norm or convolution.
        """
        found = {name: self._on_device(part) for name, part in moments.items()}
        fused = {name.removesuffix(FUSED): part for name, part in found.items() if self._is_fused(name)}
        known = self._calibrated.keys() | {name + FUSED for name in fused}
        self.module = calibrated(self.module, {n: part for n, part in found.items() if n not in known})
        recover(self.module, fused)
        self._calibrated.update(found)
        self._mix(found)

    def uncalibrated(self) -> tuple[str, ...]:
        """Norms that would be norm layers if they had running moments: Group Norm, for one."""
        return tuple(uncalibrated(self.module))

    def recovered(self) -> dict[str, Moments[Any]]:
        """Mean and variance (C,) of norm layers that were recovered from a fused Batch Norm, by name."""
        names = [
            norm_layer.name
            for norm_layer in self.inventory().norm_layers
            if norm_layer.kind == VirtualNorm.__name__
        ]
        moments = {name: _to_numpy(self._calibrated[name]) for name in names}
        return {name: part for name, part in moments.items() if part is not None}

    def _is_fused(self, name: str) -> bool:
        return name.endswith(FUSED) and is_convolution(self.module, name.removesuffix(FUSED))

    def fused_convs(self, example: Tensor | None = None) -> tuple[str, ...]:
        """Convolutions that a Batch Norm may have been fused into, found by running one input.

        Args:
            example: an input (1, ...); by default a blank image.
        """
        with self.evaluating():
            return find_fused_convs(self.module, lambda: self._run_one(example))

    def functional_norms(self) -> tuple[SkippedNorm, ...]:
        """Norms that are calls in a forward, found by running one blank image."""
        with self.evaluating():
            return functional_norms(self.module, self._run_one)

    @torch.inference_mode()
    def observe_outputs(self, names: Iterable[str], x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch, and return the moments (N, C) of each example at the output of modules, by name."""
        seen: dict[str, list[Moments[Tensor]]] = {}
        modules = {name: self.module.get_submodule(name) for name in names}
        with at_outputs(modules, lambda name, y: seen.setdefault(name, []).append(accurate_moments(y))):
            self.forward(x)
        return {name: joined(parts) for name, parts in seen.items()}

    def _on_device(self, moments: Moments[Any]) -> Moments[Tensor]:
        # Not by way of NumPy, as they may be on the device already.
        parts = (torch.as_tensor(part, dtype=torch.float32) for part in (moments.mean, moments.var))
        return Moments(*(part.to(self.device) for part in parts))

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        """Run a batch, see :meth:`forward`; without gradients."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs (N, ...).

        Returns:
            Outputs (N, K), or of whatever shape the model has, on its device.

        Raises:
            BnpatchError: the model does not take this input, or returns something without an output tensor.
        """
        x = x.to(self.device, non_blocking=True)
        if not x.is_floating_point():
            mean, std = self._mean_and_std()
            x = (x.float() - mean) / std
        x = x.to(next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype))
        # The gradients of weights underflow in float16, whose range is what a loss is usually scaled for.
        dtype = torch.bfloat16 if torch.is_grad_enabled() else None
        with torch.autocast(self.device.type, dtype, enabled=self.amp):
            try:
                y = self.module(x)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise NotEnoughMemoryError(self.device, len(x)) from error
                raise BnpatchError(
                    f"{self.name} does not take an input of shape {tuple(x.shape)}: {first_line(error)}",
                    "set --img-size, or look at the data",
                ) from error
        y = output_tensor(y)
        return (
            y.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self._returns_probabilities else y
        )

    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Run a batch as :meth:`forward` does.

        Args:
            x: as for :meth:`forward`.
            gradients: let gradients flow through what is returned.

        Returns:
            The outputs, and by name of norm layer, or of norm that is to be calibrated, the moments (N, C) of
            each example at its input; where a module is used k times, of each use, (k * N, C).
        """
        seen: dict[str, list[Moments[Tensor]]] = {}
        norms = {
            norm_layer.name: norm_layer.module for norm_layer in self.inventory().norm_layers
        } | uncalibrated(self.module)
        watch = at_inputs(norms, lambda name, x: seen.setdefault(name, []).append(accurate_moments(x)))
        with torch.inference_mode(not gradients), watch:
            outputs = self.forward(x)
        return outputs, {name: joined(parts) for name, parts in seen.items()}

    @torch.inference_mode()
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch as in training: Batch Norm normalizes by the moments of the batch.

        Group Norm does what it always does. The model is left as it is.

        Returns:
            Moments (C,) of the whole batch at the input of each norm layer, by name; those of all uses
            together where a module is used several times. A norm layer that the batch does not reach is
            missing.
        """
        seen: dict[str, list[Moments[Tensor]]] = {}

        def normalize_by(name: str, x: Tensor) -> None:
            if not x.shape[0]:
                return
            parts = accurate_moments(x)
            seen.setdefault(name, []).append(parts)
            if (layer := layers[name]).identity == 0:
                layer.running = pooled_rows(parts)

        with self.borrowed():
            self.set_alphas(self.identities())
            layers = {
                norm_layer.name: norm_layer.module
                for norm_layer in self.inventory().norm_layers
                if isinstance(norm_layer.module, ExampleWeightedNorm)
            }
            with at_inputs(layers, normalize_by):
                self.forward(x)
        return {name: pooled_rows(joined(parts)) for name, parts in seen.items()}

    def identities(self) -> dict[str, float]:
        """The alpha by name of norm layer at which the model computes what it did before any patch."""
        return {norm_layer.name: norm_layer.identity for norm_layer in self.inventory().norm_layers}

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of bytes, on the device; made again only when the preprocessing changes."""
        if self._normalization is None or self._normalization[0] is not self.preprocessing:
            values = (self.preprocessing.mean, self.preprocessing.std)
            mean, std = ((255 * torch.tensor(v)).view(1, -1, 1, 1).to(self.device) for v in values)
            self._normalization = (self.preprocessing, mean, std)
        return self._normalization[1:]

    def num_outputs(self, example: Tensor | None = None) -> int:
        """K, the number of classes, found by running one input.

        Args:
            example: an input (1, ...); by default a blank image.

        Raises:
            BnpatchError: the output for one input isn't one number per class.
        """
        if self._num_outputs is None:
            y = self._run_one(example)
            if y.ndim != 2:
                raise BnpatchError(
                    f"{self.name} returns {tuple(y.shape)} for one image, not one number per class",
                    "give a classifier",
                )
            self._num_outputs = y.shape[1]
            # Logits that are not negative and sum to 1 are no coincidence: the model ends with a softmax.
            self._returns_probabilities = bool((y >= 0).all() and (y.sum(1) - 1).abs().max() < 1e-3)
        return self._num_outputs

    def _run_one(self, example: Tensor | None = None) -> Tensor:
        with self.evaluating():
            return self.predict(
                torch.zeros(1, *self.preprocessing.input_size) if example is None else example
            )

    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Spatial shape of each site's input by name, found by running one input.

        A norm layer that the input doesn't reach is missing.

        Args:
            example: an input (1, ...); by default a blank image.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        layers = {norm_layer.name: norm_layer.module for norm_layer in self.inventory().norm_layers}
        with at_inputs(layers, lambda name, x: shapes.setdefault(name, tuple(x.shape[2:]))):
            self._run_one(example)
        return shapes

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each norm layer, by name; patching does not change it."""
        return {norm_layer.name: self._fingerprint(norm_layer) for norm_layer in self.inventory().norm_layers}

    def _fingerprint(self, norm_layer: NormLayer) -> str:
        if norm_layer.kind == VirtualNorm.__name__:  # of what the model has, not of what the data gave
            return self._fingerprint_fused(norm_layer.name)
        return _fingerprint(norm_layer.num_channels, norm_layer.parameters())

    def _fingerprint_fused(self, name: str) -> str:
        convolution: Any = self.module.get_submodule(name.removesuffix(FUSED))
        parts = (convolution.weight, convolution.bias)
        return recipes.fingerprint(part.detach().float().cpu().numpy() for part in parts)

    def recipe(self, provenance: Mapping[str, Any] | None = None) -> Recipe:
        """The weights that the model has now, as a recipe."""
        hashes, norm_layers = self.fingerprints(), []
        for norm_layer in self.inventory().norm_layers:
            weight = self._lambdas.get(norm_layer.name, 0.0)
            target = self._targets[norm_layer.name] if weight else None
            moments = (_to_numpy(target), _to_numpy(self._calibrated.get(norm_layer.name)))
            pooled = (
                norm_layer.channels_per_group if norm_layer.identity == 0 else 1
            )  # Group Norm knows its own
            weights = (norm_layer.alpha, hashes[norm_layer.name], weight)
            norm_layers.append(NormRecipe(norm_layer.name, norm_layer.kind, *weights, *moments, pooled))
        return Recipe(tuple(norm_layers), dict(provenance or {}), self.include_1x1)

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model; names the first norm layer that differs.
        """
        found = {
            norm_layer.name: norm_layer.calibrated
            for norm_layer in recipe.norm_layers
            if norm_layer.calibrated is not None
        }
        waiting = {
            n: _fingerprint_uncalibrated(m) for n, m in uncalibrated(self.module).items() if n in found
        }
        waiting |= {name: self._fingerprint_fused(name) for name in found if self._is_fused(name)}
        recipe.check_fits(self.fingerprints() | waiting)
        self.calibrate(found)
        self.include_1x1 = recipe.include_1x1
        self.retarget(
            {
                norm_layer.name: norm_layer.target
                for norm_layer in recipe.norm_layers
                if norm_layer.target is not None
            }
        )
        self.set(recipe.setting)
        groups = {norm_layer.name: norm_layer.channels_per_group for norm_layer in recipe.norm_layers}
        for norm_layer in self.inventory().norm_layers:
            if isinstance(norm_layer.module, ExampleWeightedNorm) and norm_layer.identity == 0:
                norm_layer.module.channels_per_group = groups[norm_layer.name]

    @contextmanager
    def unpatched(self) -> Iterator[nn.Module]:
        """The module as it was before any patch; it is patched again when the context ends."""
        layers = [s.module for s in self.inventory().norm_layers if isinstance(s.module, ExampleWeightedNorm)]
        origins = [layer.as_origin() for layer in layers]
        self.module = swap(self.module, {id(a): b for a, b in zip(layers, origins, strict=True)})
        try:
            yield self.module
        finally:
            self.module = swap(self.module, {id(b): a for a, b in zip(layers, origins, strict=True)})

    def evaluating(self) -> AbstractContextManager[None]:
        """In evaluation mode while the context lasts; then every mode is as before."""
        return in_evaluation_mode(self.module)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """In evaluation mode while the context lasts; then every mode and every weight is as before."""
        before = {
            norm_layer.name: (norm_layer.module.alpha, norm_layer.module.running)
            for norm_layer in self.inventory().norm_layers
            if isinstance(norm_layer.module, ExampleWeightedNorm)
        }
        lambdas, targets, found = dict(self._lambdas), dict(self._targets), dict(self._calibrated)
        try:
            with self.evaluating():
                yield
        finally:
            self.module = unpatch(self.module, where=lambda norm_layer: norm_layer.name not in before)
            for norm_layer in self.inventory().norm_layers:
                if norm_layer.name in before and isinstance(norm_layer.module, ExampleWeightedNorm):
                    norm_layer.module.alpha, norm_layer.module.running = before[norm_layer.name]
            self._lambdas, self._targets = lambdas, targets
            there = before.keys() | self.recovered().keys()
            self._calibrated = {n: m for n, m in (self._calibrated | found).items() if n in there}

    def save(self, path: str | os.PathLike[str], recipe: Recipe) -> bool:
        """Write a checkpoint that :func:`bnpatch.load` and ``bnpatch evaluate`` take.

        Returns:
            Whether they take it as it is. Where building the architecture by its name does not give this
            model again, the module itself is pickled; such a file loads with ``--unsafe-load`` only.
        """
        content: dict[str, Any] = {
            "class_names": list(self.class_names) if self.class_names else None,
            "bnpatch": {"recipe": recipe.to_json(), "preprocessing": self.preprocessing.to_json()},
        }
        by_name = self.arch is not None and self._is_built_by(self.arch)
        if by_name:
            content["arch"] = str(self.arch)
            content["state_dict"] = self.module.state_dict()
        else:
            content["model"] = self.module
        buffer = io.BytesIO()
        torch.save(content, buffer)  # torch's own file writer hides what the disk said
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        return by_name

    def _is_built_by(self, arch: Architecture) -> bool:
        """Does the architecture, built by its name, compute the same with these weights?"""
        plain: dict[str, Any] = {"_calibrated": {}, "_targets": {}, "_lambdas": {}}
        twin = replace(self, module=arch.build(), device=torch.device("cpu"), amp=False, **plain)
        try:
            twin.module.load_state_dict(self.module.state_dict(), strict=False)
            twin.apply(self.recipe())
            x = torch.rand(2, *self.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
            with self.evaluating(), twin.evaluating():
                own, other = self.predict(x).float().cpu(), twin.predict(x).float().cpu()
        except (BnpatchError, RuntimeError):
            return False
        return own.shape == other.shape and torch.allclose(
            own, other, rtol=1e-2, atol=1e-2 * own.abs().max().item()
        )


def output_tensor(y: Any) -> Tensor:
    """The tensor among what a model returns; (N, K, 1, 1) is (N, K)."""
    if isinstance(y, Mapping):
        y = next((y[key] for key in ("logits", "out", "output") if key in y), next(iter(y.values()), None))
    elif isinstance(y, (tuple, list)) and y:
        y = y[0]
    elif not isinstance(y, Tensor):
        y = getattr(y, "logits", y)
    if not isinstance(y, Tensor):
        raise BnpatchError(f"the model returns a {type(y).__name__}", "wrap it so that it returns a tensor")
    return y.flatten(1) if y.ndim == 4 and y.shape[2:] == (1, 1) else y


def _fingerprint(num_channels: int, parameters: Iterable[Tensor | None]) -> str:
    """A hash of gamma, beta, running mean and variance; of what changes nothing where one is missing."""
    zeros = torch.zeros(num_channels)
    defaults = (zeros + 1, zeros, zeros, zeros + 1)
    parts = (default if p is None else p for p, default in zip(parameters, defaults, strict=True))
    return recipes.fingerprint(part.detach().float().cpu().numpy() for part in parts)


def _fingerprint_uncalibrated(norm: Any) -> str:
    num_channels = getattr(norm, "num_channels", None) or norm.num_features  # Group Norm, Batch Norm
    return _fingerprint(num_channels, (norm.weight, norm.bias, None, None))


def _to_numpy(moments: Moments[Tensor] | None) -> Moments[Any] | None:
    return None if moments is None else Moments(*(m.cpu().numpy() for m in (moments.mean, moments.var)))
