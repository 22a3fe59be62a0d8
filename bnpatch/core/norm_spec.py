"""A description of a normalization layer: which values it normalizes together in training.

One class, :class:`NormSpec`, covers Batch, Ghost, Group, Instance and Batch/Group Norm.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020;
Batch Renormalization: Ioffe, 2017 (arXiv 1702.03275).
"""

import math
from dataclasses import dataclass, replace

from bnpatch.core.errors import BnpatchError, check_weight


@dataclass(frozen=True)
class Renorm:
    """Settings of Batch Renormalization: a training step normalizes by the running statistics, within bounds.

    Attributes:
        r_max: the layer corrects the batch's standard deviation by a factor between 1 / r_max and r_max.
        d_max: the layer corrects the batch's mean by at most this many running standard deviations.
        warmup: number of steps over which both bounds grow from those of Batch Norm (1 and 0). A layer that
            is trained from scratch needs a warmup, because its first running statistics are meaningless.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 0


@dataclass(frozen=True)
class NormSpec:
    """Describes a normalization layer: what it pools in training, and its alpha at inference.

    The layer pools moments over the spatial positions, over ``channels_per_group`` consecutive channels and,
    in training, over ``examples_per_group`` examples of the batch. The class methods make the known kinds:

        >>> str(NormSpec.ghost(16))
        'Ghost Batch Norm of 16 examples'
        >>> str(NormSpec.batch_renorm(warmup=1000))
        'Batch Renorm'

    Attributes:
        channels_per_group: 1 for Batch, Ghost and Instance Norm.
        examples_per_group: None for the whole batch, as in Batch Norm.
        alpha: the weight of the example at inference, in [0, 1].
        renorm: settings of Batch Renormalization, or None. Only plain Batch Norm can have them.

    Raises:
        BnpatchError: a group would be empty, or ``renorm`` is combined with groups.
        InvalidWeightError: alpha is not in [0, 1].
    """

    channels_per_group: int = 1
    examples_per_group: int | None = None
    alpha: float = 0.0
    renorm: Renorm | None = None

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)
        for name, value in (("channel", self.channels_per_group), ("example", self.examples_per_group)):
            if value is not None and value < 1:
                raise BnpatchError(f"a group of {value} {name}s is empty", f"give 1 {name} or more")
        if self.renorm and (self.channels_per_group, self.examples_per_group) != (1, None):
            raise BnpatchError("Batch Renormalization has no groups", "leave out the groups or the renorm")

    @classmethod
    def batch(cls) -> "NormSpec":
        """Describe Batch Norm."""
        return cls()

    @classmethod
    def ghost(cls, examples_per_group: int) -> "NormSpec":
        """Describe Ghost Batch Norm (section 3.2 of the paper): Batch Norm on parts of the batch."""
        return cls(examples_per_group=examples_per_group)

    @classmethod
    def group(cls, channels_per_group: int) -> "NormSpec":
        """Describe Group Norm, which computes the same in training and at inference."""
        return cls(channels_per_group, examples_per_group=1, alpha=1.0)

    @classmethod
    def instance(cls) -> "NormSpec":
        """Describe Instance Norm, which computes the same in training and at inference."""
        return cls(examples_per_group=1, alpha=1.0)

    @classmethod
    def batch_group(cls, channels_per_group: int, examples_per_group: int | None = None) -> "NormSpec":
        """Describe Batch/Group Norm (section 3.4 of the paper): it pools groups of channels and examples."""
        return cls(channels_per_group, examples_per_group)

    @classmethod
    def batch_renorm(cls, r_max: float = 3.0, d_max: float = 5.0, warmup: int = 0) -> "NormSpec":
        """Describe Batch Renormalization, a baseline in Table 1 of the paper."""
        return cls(renorm=Renorm(r_max, d_max, warmup))

    def for_channels(self, num_channels: int) -> "NormSpec":
        """Return this spec for a layer of ``num_channels`` channels.

        The layers of a network differ in width. If ``channels_per_group`` does not divide the number of
        channels, the greatest common divisor of the two replaces it.
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
