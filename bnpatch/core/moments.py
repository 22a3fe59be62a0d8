"""The formula of bnpatch, written once: moments of pooled and of mixed distributions.

Nothing is imported for the arithmetic, so the same two functions serve every kind of value that has
the operators ``+ - *`` and ``.mean(axes, keepdims=True)``: torch tensors, NumPy arrays, graph values.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Values = TypeVar("Values")


@dataclass(frozen=True)
class Moments(Generic[Values]):
    """Mean and biased variance (divided by the count, never by count - 1) of a distribution."""

    mean: Values
    var: Values


def pool(parts: Moments[Any], axes: int | tuple[int, ...]) -> Moments[Any]:
    """Moments of the union of equally weighted parts, which lie along ``axes``.

    The law of total variance: the mean of the variances plus the variance of the means.

    Args:
        parts: moments of the parts, any shape.
        axes: the axes to pool over; they are kept with size 1.
    """
    mean = parts.mean.mean(axes, keepdims=True)
    between = parts.mean - mean
    return Moments(mean, (parts.var + between * between).mean(axes, keepdims=True))


def mix(alpha: Any, example: Moments[Any], running: Moments[Any]) -> Moments[Any]:
    """Moments of a mixture that draws from ``example`` with weight alpha, else from ``running``.

    This is Eq. 3 of the paper, ``E[x^2] - mean^2`` with both expectations mixed, arranged so that it
    never cancels and never goes negative. The last term is the variance between the two means.

    Args:
        alpha: the weight of the example, in [0, 1]; a number or anything that broadcasts.
        example: moments of the example at hand.
        running: the running averages, of a shape that broadcasts with the example's.
    """
    between = example.mean - running.mean
    return Moments(
        mean=running.mean + alpha * between,
        var=alpha * example.var + (1 - alpha) * running.var + alpha * (1 - alpha) * (between * between),
    )
