"""A model that can be patched and asked for predictions, whatever it is made of."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnpatch import recipe as recipes
from bnpatch.architecture import Architecture
from bnpatch.errors import BnpatchError, first_line
from bnpatch.files import atomic_path
from bnpatch.nn.norm import ExampleWeighedNorm
from bnpatch.nn.surgery import Site, patch, survey, unpatch
from bnpatch.preprocessing import Preprocessing
from bnpatch.recipe import Recipe, SiteRecipe
from bnpatch.sites import AnySite, Survey


class Patchable(Protocol):
    """What the search, the evaluation and the data need of a model."""

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    class_order: str
    device: torch.device

    @property
    def arch(self) -> Architecture | None:
        """How to build the model again, where that has a name."""

    def survey(self) -> Survey[AnySite]:
        """The sites, and the norms that are left alone."""

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of site."""

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all sites or by name."""

    def predict(self, x: Tensor) -> Tensor:
        """Outputs for a batch: bytes are images, floats are inputs as they are."""

    def num_outputs(self, example: Tensor | None = None) -> int:
        """K, the number of classes, found by running an example, or a blank image."""

    def recipe(self) -> Recipe:
        """The weights that the model has now."""

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each site, by name."""

    def borrowed(self) -> AbstractContextManager[None]:
        """A context in which the model may be changed: it is as before when the context ends."""


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
        amp: compute in the device's half precision where autocast thinks it safe.
        notes: what a person should know about how it was loaded.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    arch: Architecture | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module.to(self.device)
        self._num_outputs: int | None = None
        self._returns_probabilities = False
        self._normalization: tuple[Preprocessing, Tensor, Tensor] | None = None

    def survey(self) -> Survey[Site]:
        """See :func:`bnpatch.survey`."""
        return survey(self.module)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """See :func:`bnpatch.patch`."""
        self.module = patch(self.module, alpha)

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of site; 0 where a site isn't patched."""
        return {site.name: site.alpha for site in self.survey().sites}

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
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
        with torch.autocast(self.device.type, enabled=self.amp):
            try:
                y = self.module(x)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise BnpatchError(
                        f"{self.device} has not enough memory for a batch of {len(x)}", "lower --batch-size"
                    ) from error
                raise BnpatchError(
                    f"{self.name} does not take an input of shape {tuple(x.shape)}: {first_line(error)}",
                    "set --img-size, or look at the data",
                ) from error
        y = output_tensor(y)
        return (
            y.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self._returns_probabilities else y
        )

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
        with self.borrowed():
            return self.predict(
                torch.zeros(1, *self.preprocessing.input_size) if example is None else example
            )

    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """Spatial shape of each site's input by name, found by running one blank image.

        A site that the image doesn't reach is missing.
        """
        shapes: dict[str, tuple[int, ...]] = {}

        def noting(name: str) -> Any:
            def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                shapes.setdefault(name, tuple(args[0].shape[2:]))

            return note

        handles = [site.module.register_forward_pre_hook(noting(site.name)) for site in self.survey().sites]
        try:
            self._run_one()
        finally:
            for handle in handles:
                handle.remove()
        return shapes

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each site, by name; patching does not change it."""
        return {site.name: _fingerprint(site) for site in self.survey().sites}

    def recipe(self, provenance: Mapping[str, Any] | None = None) -> Recipe:
        """The weights that the model has now, as a recipe."""
        hashes = self.fingerprints()
        sites = (
            SiteRecipe(s.name, s.kind, s.alpha, hashes[s.name], channels_per_group=s.channels_per_group)
            for s in self.survey().sites
        )
        return Recipe(tuple(sites), dict(provenance or {}))

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model; names the first site that differs.
        """
        recipe.check_fits(self.fingerprints())
        self.set_alphas(recipe.alphas)
        groups = {site.name: site.channels_per_group for site in recipe.sites}
        for site in self.survey().sites:
            if isinstance(site.module, ExampleWeighedNorm):
                site.module.channels_per_group = groups.get(site.name, 1)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """In evaluation mode while the context lasts; then every mode and every alpha is as before."""
        modes = [(module, module.training) for module in self.module.modules()]
        alphas = {
            site.name: site.module.alpha
            for site in self.survey().sites
            if isinstance(site.module, ExampleWeighedNorm)
        }
        self.module.eval()
        try:
            yield
        finally:
            self.module = unpatch(self.module, where=lambda site: site.name not in alphas)
            for site in self.survey().sites:
                if site.name in alphas and isinstance(site.module, ExampleWeighedNorm):
                    site.module.alpha = alphas[site.name]
            for module, mode in modes:
                module.training = mode

    def save(self, path: str | os.PathLike[str], recipe: Recipe) -> None:
        """Write a checkpoint that :func:`bnpatch.load` and ``bnpatch evaluate`` take as it is.

        Where building the architecture by its name does not give this model again, the module itself is
        pickled; such a file loads with ``--unsafe-load`` only.
        """
        content: dict[str, Any] = {
            "class_names": list(self.class_names) if self.class_names else None,
            "bnpatch": {"recipe": recipe.to_json(), "preprocessing": self.preprocessing.to_json()},
        }
        if self.arch is not None and self._is_built_by(self.arch):
            content["arch"] = str(self.arch)
            content["state_dict"] = self.module.state_dict()
        else:
            content["model"] = self.module
        buffer = io.BytesIO()
        torch.save(content, buffer)  # torch's own file writer hides what the disk said
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def _is_built_by(self, arch: Architecture) -> bool:
        """Does the architecture, built by its name, compute the same with these weights?"""
        twin = replace(self, module=arch.build(), device=torch.device("cpu"), amp=False)
        try:
            twin.module.load_state_dict(self.module.state_dict(), strict=False)
            twin.apply(self.recipe())
            x = torch.rand(2, *self.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
            with self.borrowed(), twin.borrowed():
                own, other = self.predict(x).float().cpu(), twin.predict(x).float().cpu()
        except (BnpatchError, RuntimeError):
            return False
        return own.shape == other.shape and torch.allclose(
            own, other, rtol=1e-2, atol=1e-2 * own.abs().max().item()
        )


def pick_device(name: str = "auto") -> torch.device:
    """Resolve a device name; "auto" is the accelerator if there is one.

    Raises:
        BnpatchError: no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BnpatchError(
            f"there is no device {name!r} here", "leave out --device to have one chosen"
        ) from error
    return device


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


def _fingerprint(site: Site) -> str:
    weight, bias, mean, var = site.parameters()
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return recipes.fingerprint(t.detach().float().cpu().numpy() for t in (weight, bias, mean, var))
