"""Which values are normalized together: one description for a family of layers.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020;
Batch Renormalization: Ioffe, 2017 (arXiv 1702.03275).
"""

import math
from dataclasses import dataclass, replace

from bnpatch.core.errors import BnpatchError, check_alpha


@dataclass(frozen=True)
class Renorm:
    """Batch Renormalization: a step normalizes by the running moments, within bounds.

    Attributes:
        r_max: the batch's standard deviation may be corrected by a factor between 1 / r_max and r_max.
        d_max: the batch's mean may be corrected by so many running standard deviations.
        warmup: steps over which both bounds grow from Batch Norm's (1 and 0). A layer that is trained from
            scratch needs some, since its running moments mean nothing at first.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 0


@dataclass(frozen=True)
class NormSpec:
    """A normalization layer by what it pools in training and by what it weighs at inference.

    Moments are pooled over the spatial positions, over ``channels_per_group`` consecutive channels and,
    in training, over ``examples_per_group`` examples of the batch.

    Attributes:
        channels_per_group: 1 for Batch, Ghost and Instance Norm.
        examples_per_group: None for the whole batch, as in Batch Norm.
        alpha: the weight of the example at inference, in [0, 1].
        renorm: bounds of Batch Renormalization, a relative of plain Batch Norm.

    Raises:
        BnpatchError: a group would be empty, or ``renorm`` is asked of another layer than Batch Norm.
    """

    channels_per_group: int = 1
    examples_per_group: int | None = None
    alpha: float = 0.0
    renorm: Renorm | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        for name, value in (("channel", self.channels_per_group), ("example", self.examples_per_group)):
            if value is not None and value < 1:
                raise BnpatchError(f"a group of {value} {name}s is empty", f"give 1 {name} or more")
        if self.renorm and (self.channels_per_group, self.examples_per_group) != (1, None):
            raise BnpatchError("Batch Renormalization has no groups", "leave out the groups or the renorm")

    @classmethod
    def batch(cls) -> "NormSpec":
        """Batch Norm."""
        return cls()

    @classmethod
    def ghost(cls, examples_per_group: int) -> "NormSpec":
        """Ghost Batch Norm (the paper's 3.2): Batch Norm in groups of the batch."""
        return cls(examples_per_group=examples_per_group)

    @classmethod
    def group(cls, channels_per_group: int) -> "NormSpec":
        """Group Norm, which is the same in training and at inference."""
        return cls(channels_per_group, examples_per_group=1, alpha=1.0)

    @classmethod
    def instance(cls) -> "NormSpec":
        """Instance Norm, which is the same in training and at inference."""
        return cls(examples_per_group=1, alpha=1.0)

    @classmethod
    def batch_group(cls, channels_per_group: int, examples_per_group: int | None = None) -> "NormSpec":
        """Batch/Group Norm (the paper's 3.4): groups of channels, pooled over examples as well."""
        return cls(channels_per_group, examples_per_group)

    @classmethod
    def batch_renorm(cls, r_max: float = 3.0, d_max: float = 5.0, warmup: int = 0) -> "NormSpec":
        """Batch Renormalization, which the paper's Table 1 compares with."""
        return cls(renorm=Renorm(r_max, d_max, warmup))

    def for_channels(self, num_channels: int) -> "NormSpec":
        """The same for a layer of so many channels.

        Networks differ in width from layer to layer. Where ``channels_per_group`` doesn't divide the
        channels, the greatest common divisor takes its place.
        """
        return replace(self, channels_per_group=math.gcd(num_channels, self.channels_per_group))

    def __str__(self) -> str:
        examples, channels = self.examples_per_group, self.channels_per_group
        if self.renorm:
            return "Batch Renorm"
        if channels == 1:
            names = {None: "Batch Norm", 1: "Instance Norm"}
            return names.get(examples, f"Ghost Batch Norm of {examples} examples")
        if examples == 1:
            return f"Group Norm of {channels} channels"
        return f"Batch/Group Norm of {channels} channels and {examples or 'all'} examples"
