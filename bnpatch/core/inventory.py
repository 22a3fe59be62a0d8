"""The result of an inventory: the norm layers of a model, in torch or ONNX, and the norms it skips."""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bnpatch.core.moments import Moments

#: A norm layer that was recovered from a fused Batch Norm has the name of the convolution and this suffix.
#: "Folded" is an earlier word for fused; it stays because recipes and patched files contain it.
FUSED = ".folded"

#: Why a norm is skipped that becomes a norm layer once it gets running statistics from data.
NEEDS_CALIBRATION = "has no running statistics of its own; they can be estimated on images"
#: Why a norm is skipped of which only y = scale * x + shift is left.
SCALE_AND_SHIFT = "a scale and a shift are all that is left of it: they don't tell the running statistics"
#: The remedy that messages give for what NEEDS_CALIBRATION says.
CALIBRATE = (
    "bnpatch tune-alpha, or bnpatch.calibrate(model, images) in Python, estimates the running statistics of "
    "Group Norm and the like on images"
)


class NormLayer(Protocol):
    """The attributes that the norm layers of torch modules and of ONNX graphs share.

    A norm layer is a place where a model normalizes by running statistics.
    """

    @property
    def name(self) -> str:
        """Dotted name of the module, the same in torch and in an export of it."""

    @property
    def kind(self) -> str:
        """Class name of the torch module, or type of the ONNX operator."""

    @property
    def num_channels(self) -> int:
        """C, the number of channels that the layer normalizes."""


NormLayerT_co = TypeVar("NormLayerT_co", bound=NormLayer, covariant=True)


@dataclass(frozen=True)
class SkippedNorm:
    """A normalization layer that bnpatch does not rewrite.

    Attributes:
        name: dotted name of the module, or name of the node.
        kind: class name of the torch module, or type of the ONNX operator.
        reason: why bnpatch skips it, for people.
        is_uncalibrated: running statistics from data would make it a norm layer.
    """

    name: str
    kind: str
    reason: str
    is_uncalibrated: bool = False


@dataclass(frozen=True)
class Inventory(Generic[NormLayerT_co]):
    """All normalization layers of a model, in the order of the model.

    Attributes:
        norm_layers: the layers that bnpatch can rewrite.
        skipped_norms: the layers that it can't, each with a reason.
    """

    norm_layers: tuple[NormLayerT_co, ...]
    skipped_norms: tuple[SkippedNorm, ...]


@dataclass(frozen=True)
class NormFacts:
    """What a norm layer has from the checkpoint.

    Attributes:
        source: the checkpoint's running mean and variance, each of shape (C,).
        eps: the layer adds it to variances.
    """

    source: Moments[Any]
    eps: float
