"""What the search, the evaluation and the data need of a model, whatever it is made of."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from bnpatch.core.inventory import AnyNormLayer, Inventory, NormFacts
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.architecture import Architecture


class Patchable(Protocol):
    """A model that can be patched and asked for predictions: a TorchModel or an OnnxModel."""

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    class_order: str
    device: torch.device
    include_1x1: bool

    @property
    def arch(self) -> Architecture | None:
        """How to build the model again, where that has a name."""

    def inventory(self) -> Inventory[AnyNormLayer]:
        """The norm layers, and the norms that are skipped."""

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of norm layer."""

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all norm layers or by name."""

    def setting(self) -> PatchWeights:
        """Both weights of every norm layer."""

    def set(self, setting: PatchWeights) -> None:
        """Set weights by name of norm layer."""

    def retarget(self, targets: Mapping[str, Moments[Any]]) -> None:
        """Give the moments of the data at hand, by name of norm layer, that lambda is the weight of.

        Norm layers that are not named keep theirs.
        """

    def targets(self) -> Mapping[str, Moments[Any]]:
        """What :meth:`retarget` was given last."""

    def calibrate(self, moments: Mapping[str, Moments[Any]]) -> None:
        """Give running moments to norms that have none: from now on they are norm layers, at their
        identity.
        """

    def uncalibrated(self) -> tuple[str, ...]:
        """Norms that would be norm layers if they had running moments."""

    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Outputs for a batch, and the moments of each example at the input of each norm layer, (N, C)."""

    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """The moments of a batch at the input of each norm layer, (C,), Batch Norm normalizing by those."""

    def predict(self, x: Tensor) -> Tensor:
        """Outputs for a batch: bytes are images, floats are inputs as they are."""

    def num_outputs(self, example: Tensor | None = None) -> int:
        """K, the number of classes, found by running an example, or a blank image."""

    def identities(self) -> dict[str, float]:
        """The alpha by name of norm layer at which the model computes what it did."""

    def facts(self) -> dict[str, NormFacts]:
        """What each norm layer brings along, by name."""

    def running(self) -> Mapping[str, Moments[Any]]:
        """Running mean and variance (C,) that a norm layer normalizes by now, where not those it came
        with.
        """

    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Spatial shape of each site's input by name, as far as it is known."""

    def recipe(self) -> Recipe:
        """The weights that the model has now."""

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each norm layer, by name."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which the model is in evaluation mode; its weights may be read, not changed."""

    def borrowed(self) -> AbstractContextManager[None]:
        """As :meth:`evaluating`, and the weights may be changed: they are as before when the context ends."""
