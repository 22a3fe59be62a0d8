"""The formula of bnpatch: the moments (mean and variance) of pooled and of mixed distributions.

The functions use only the operators ``+ - * / **``, ``.mean(axes, keepdims=True)``, ``.clip(low, high)`` and
the natural logarithm of their arguments. The same code therefore works on torch tensors, NumPy arrays and
values of an ONNX graph.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020.
:func:`weight_by_distance` is an extension that the paper does not have.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

Values = TypeVar("Values")

#: A distance counts as at least this; an example with the running statistics has the distance 0.
SMALLEST_DISTANCE = 1e-4

#: A distance counts as at most this, so that its powers between -4 and 4 are numbers of float32.
LARGEST_DISTANCE = 1e9

# Added to variances whose quotient is taken. It is below rounding unless both variance and eps are 0.
_TINY = 1e-30


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
    between, rest = example.mean - running.mean, 1 - alpha
    return Moments(
        mean=running.mean + alpha * between,
        var=alpha * example.var + rest * running.var + alpha * rest * (between * between),
    )


def weight_by_distance(alpha: Any, slope: Any, example: Moments[Any], running: Moments[Any], eps: Any) -> Any:
    """Compute a weight per example that depends on how far its moments are from the running ones.

    The distance of an example is the mean over its channels of

        D = 1/2 [(mean - running mean)^2 / (running var + eps) + ln^2((var + eps) / (running var + eps))]

    and its weight is ``sigmoid(logit(alpha) + slope ln(D + 1e-4))``: ``alpha`` is the weight of an example at
    distance 1, and with a positive slope an example that is farther away has a larger weight
    (:func:`weight_at`).

        >>> examples = Moments(np.array([[0.0], [6.0]]), np.ones((2, 1)))  # one near, one far
        >>> running = Moments(np.zeros(1), np.ones(1))
        >>> weight_by_distance(0.1, 0.5, examples, running, eps=0.0).round(3)
        array([[0.001],
               [0.32 ]])

    Args:
        alpha: the weight of an example at distance 1, in [0, 1]; a number, or a value that broadcasts.
        slope: how much the logit of the weight grows with the logarithm of the distance, in [-4, 4]. For the
            number 0 nothing is computed, and the result is ``alpha`` itself.
        example: moments of each example, of shape (N, C, ...).
        running: running statistics, of a shape that broadcasts with that of ``example``.
        eps: what the layer adds to a variance.

    Returns:
        The weights, of shape (N, 1, ...).
    """
    if isinstance(slope, (int, float)) and slope == 0:
        return alpha
    return weight_at(distance(example, running, eps), alpha, slope)


def distance(example: Moments[Any], running: Moments[Any], eps: Any) -> Any:
    """Compute how far the moments of examples are from the running ones, see :func:`weight_by_distance`.

    Args:
        example: moments of each example, of shape (N, C, ...).
        running: running statistics, of a shape that broadcasts with that of ``example``.
        eps: what the layer adds to a variance.

    Returns:
        The distances, of shape (N, 1, ...).
    """
    between = example.mean - running.mean
    total = running.var + (eps + _TINY)
    log_ratio = _log((example.var + (eps + _TINY)) / total)
    return 0.5 * (between * between / total + log_ratio * log_ratio).mean(1, keepdims=True)


def weight_at(distance: Any, alpha: Any, slope: Any) -> Any:
    """Compute the weight of an example at a distance, see :func:`weight_by_distance`.

        >>> weight_at(np.array([0.0, 1.0, 9.0]), alpha=0.1, slope=0.5).round(3)
        array([0.001, 0.1  , 0.25 ])

    With ``r = (D + 1e-4)^slope`` the function computes ``alpha r / (1 - alpha + alpha r)``. This is equal to
    the sigmoid, but has no infinities and no rounding where it matters, because ``r`` is positive and finite
    and ``(1 - alpha) + alpha`` rounds to 1. The weight is ``alpha`` for ``slope = 0``, 0 for ``alpha = 0``
    and 1 for ``alpha = 1``, bit for bit. It lies in [0, 1], and small weights are as accurate as any.

    Args:
        distance: the distance D, 0 or more; above :data:`LARGEST_DISTANCE` it counts as that.
        alpha: the weight at distance 1, in [0, 1]; a number, or a value that broadcasts.
        slope: how much the logit of the weight grows with the logarithm of the distance, in [-4, 4].

    Returns:
        The weights, of the broadcast shape.
    """
    far = alpha * (distance.clip(0.0, LARGEST_DISTANCE) + SMALLEST_DISTANCE) ** slope
    return far / (1 - alpha + far)


def _log(values: Any) -> Any:
    return values.log() if hasattr(values, "log") else np.log(values)
