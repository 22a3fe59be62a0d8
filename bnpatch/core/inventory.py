"""What a survey of a model finds, whatever the model is made of."""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bnpatch.core.moments import Moments

#: What the name of a site that was recovered from a folded Batch Norm has after that of its convolution.
FOLDED = ".folded"

#: The reason of a norm that becomes a site with running moments from data.
NEEDS_CALIBRATION = "has no running moments of its own; they can be calibrated on images"
#: What to do about it.
CALIBRATE = "bnpatch.calibrate(model, images) takes the running moments of Group Norm and its kin from images"


class AnySite(Protocol):
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


SiteT_co = TypeVar("SiteT_co", bound=AnySite, covariant=True)


@dataclass(frozen=True)
class LeftAlone:
    """A normalization layer that bnpatch does not rewrite, and why."""

    name: str
    kind: str
    reason: str
    is_uncalibrated: bool = False  # running moments from data would make it a site


@dataclass(frozen=True)
class Survey(Generic[SiteT_co]):
    """All normalization layers of a model, in its order."""

    sites: tuple[SiteT_co, ...]
    left_alone: tuple[LeftAlone, ...]


@dataclass(frozen=True)
class SiteFacts:
    """What a site brings along from the checkpoint.

    Attributes:
        source: running mean and variance, (C,).
        eps: added to variances.
    """

    source: Moments[Any]
    eps: float
