"""The formula of bnpatch: the moments (mean and variance) of pooled and of mixed distributions.

The two functions use only the operators ``+ - *`` and ``.mean(axes, keepdims=True)`` of their arguments.
The same code therefore works on torch tensors, NumPy arrays and values of an ONNX graph.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Values = TypeVar("Values")


@dataclass(frozen=True)
class Moments(Generic[Values]):
    """The mean and the biased variance of a distribution, two values of the same shape.

    The variance is biased: a sum of squares divided by the count, never by count - 1.

    Attributes:
        mean: the mean.
        var: the biased variance, in the square of the mean's unit.
    """

    mean: Values
    var: Values


def pool(parts: Moments[Any], axes: int | tuple[int, ...]) -> Moments[Any]:
    """Compute the moments of the union of equally weighted parts, which lie along ``axes``.

    By the law of total variance, the variance of the union is the mean of the variances plus the variance
    of the means. Two parts with means 0 and 2 and variance 1 each have the mean 1 and the variance 2:

        >>> pool(Moments(np.array([0.0, 2.0]), np.array([1.0, 1.0])), axes=0)
        Moments(mean=array([1.]), var=array([2.]))

    Args:
        parts: moments of the parts, of any shape.
        axes: the axes to pool over.

    Returns:
        The pooled moments, of the shape of ``parts`` with size 1 at ``axes``.
    """
    mean = parts.mean.mean(axes, keepdims=True)
    between = parts.mean - mean
    return Moments(mean, (parts.var + between * between).mean(axes, keepdims=True))


def mix(alpha: Any, example: Moments[Any], running: Moments[Any]) -> Moments[Any]:
    """Mix two distributions: weight ``alpha`` for ``example``, weight ``1 - alpha`` for ``running``.

    This is Eq. 3 of the paper. The paper computes the variance as ``E[x^2] - mean^2`` with both expectations
    mixed. The arrangement here is equal, but it never subtracts two large numbers, so it loses no digits and
    never gets negative. Its last term is the variance between the two means.

        >>> mix(0.5, Moments(2.0, 1.0), Moments(0.0, 1.0))
        Moments(mean=1.0, var=2.0)

    Args:
        alpha: the weight of the example, in [0, 1]; a number, or a value that broadcasts.
        example: moments of one example.
        running: running averages, of a shape that broadcasts with that of ``example``.

    Returns:
        The moments of the mixture, of the broadcast shape.
    """
    between = example.mean - running.mean
    return Moments(
        mean=running.mean + alpha * between,
        var=alpha * example.var + (1 - alpha) * running.var + alpha * (1 - alpha) * (between * between),
    )
