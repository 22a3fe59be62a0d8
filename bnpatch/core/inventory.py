"""What an inventory of a model finds, whatever the model is made of."""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bnpatch.core.moments import Moments

#: What the name of a norm layer that was recovered from a fused Batch Norm has after that of its convolution.
FUSED = ".folded"

#: The reason of a norm that becomes a norm layer with running moments from data.
NEEDS_CALIBRATION = "has no running moments of its own; they can be calibrated on images"
#: What to do about it.
CALIBRATE = "bnpatch.calibrate(model, images) takes the running moments of Group Norm and its kin from images"


class AnyNormLayer(Protocol):
    """A place where a model normalizes by running moments."""

    @property
    def name(self) -> str:
        """Dotted name of the module, the same in torch and in an export of it."""

    @property
    def kind(self) -> str:
        """Class name of the layer, or type of the operator."""

    @property
    def num_channels(self) -> int:
        """C, the number of channels that are normalized."""


NormLayerT_co = TypeVar("NormLayerT_co", bound=AnyNormLayer, covariant=True)


@dataclass(frozen=True)
class SkippedNorm:
    """A normalization layer that bnpatch does not rewrite, and why."""

    name: str
    kind: str
    reason: str
    is_uncalibrated: bool = False  # running moments from data would make it a norm layer


@dataclass(frozen=True)
class Inventory(Generic[NormLayerT_co]):
    """All normalization layers of a model, in its order."""

    norm_layers: tuple[NormLayerT_co, ...]
    skipped_norms: tuple[SkippedNorm, ...]


@dataclass(frozen=True)
class NormFacts:
    """What a norm layer brings along from the checkpoint.

    Attributes:
        source: running mean and variance, (C,).
        eps: added to variances.
    """

    source: Moments[Any]
    eps: float
