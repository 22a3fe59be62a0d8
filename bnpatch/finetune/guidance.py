"""Guidance: which of the paper's four techniques suit a model's norms and its training batch.

It depends on a few numbers and not on the model itself. The batch sizes are from Summers & Dinneen 2020,
section 3.4 and Fig. 5.
"""

from dataclasses import dataclass
from typing import Literal

Fit = Literal["yes", "with care", "no"]

#: Ghost Batch Norm is safe from the first batch size on; below the second, Batch/Group Norm is better.
_GHOST, _BATCH_GROUP = 16, 4
#: Below this batch size Batch/Group Norm is worth comparing.
_SMALL = 8


@dataclass(frozen=True)
class Technique:
    """One of the paper's four techniques, with advice.

    Attributes:
        name: name of the technique.
        fits: whether it should be used.
        reason: reason for this advice, as text for users.
    """

    name: str
    fits: Fit
    reason: str


def techniques(batch_size: int, num_norms: int, num_unnormalized: int | None) -> tuple[Technique, ...]:
    """Give advice about the four techniques for a model.

    Args:
        batch_size: examples per training step and device, B.
        num_norms: number of norms in the model that could be converted.
        num_unnormalized: number of these with no other norm between them and the output, see
            :func:`bnpatch.nn.tracing.unnormalized_norms`; None where that is unknown.
    """
    weighing = Technique(
        "example weighing",
        "yes",
        "needs no training: tune-alpha finds the weight, and says if nothing is gained",
    )
    return (weighing, _ghost(batch_size), _decay(num_norms, num_unnormalized), _batch_group(batch_size))


def _ghost(batch_size: int) -> Technique:
    name = "Ghost Batch Norm"
    if batch_size >= _GHOST:
        return Technique(
            name, "yes", f"a batch of {batch_size} divides into groups that still have good moments"
        )
    if batch_size >= _BATCH_GROUP:
        return Technique(
            name, "with care", f"groups of a batch of {batch_size} are small: compare with the whole batch"
        )
    return Technique(name, "no", f"a batch of {batch_size} has nothing left to divide")


def _decay(num_norms: int, num_unnormalized: int | None) -> Technique:
    name = "weight decay on scales and shifts"
    if num_unnormalized is None:
        return Technique(name, "with care", "it is unknown which scales reach the output past no other norm")
    if num_unnormalized == 0:
        return Technique(name, "no", "another norm divides out every scale before the output")
    return Technique(
        name,
        "yes",
        f"it can act at {num_unnormalized} of {num_norms} norm layers: no other norm is behind them",
    )


def _batch_group(batch_size: int) -> Technique:
    name = "Batch/Group Norm"
    if batch_size < _BATCH_GROUP:
        return Technique(
            name, "yes", f"moments of {batch_size} examples are too noisy: groups of channels share theirs"
        )
    if batch_size < _SMALL:
        return Technique(name, "with care", f"a batch of {batch_size} is small: compare it with Batch Norm")
    return Technique(name, "no", f"a batch of {batch_size} has moments good enough channel by channel")
