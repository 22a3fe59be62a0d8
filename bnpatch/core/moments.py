"""The formula of bnpatch: the moments (mean and variance) of pooled and of mixed distributions.

The functions use only the operators ``+ - * / **``, ``.mean(axes, keepdims=True)``, ``.clip(low, high)``, the
natural logarithm and its inverse. The same code therefore works on torch tensors, NumPy arrays and values of
an ONNX graph.

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020.
:class:`ExampleWeight` has two numbers that the paper does not have.
"""

import math
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

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


class ExampleWeight(NamedTuple):
    """How much an example counts at a norm layer: three numbers, tensors or values of a graph.

    The distance of an example from the running statistics is the mean over its channels of

        D = 1/2 [(mean - running mean)^2 / (running var + eps) + ln^2((var + eps) / (running var + eps))]

    Its mean has the weight ``sigmoid(logit(alpha) + slope ln(D + 1e-4))``, and its variance
    ``sigmoid(logit(alpha) + slope ln(D + 1e-4) + var_offset)``. At alpha 0 and 1 both are alpha.

    Attributes:
        alpha: the weight of an example at distance 1, in [0, 1]; without a slope, at any distance.
        slope: how much the logit of the weight grows with the logarithm of the distance, in [-4, 4]. With a
            positive slope, an example that is farther away has a larger weight. For the number 0 nothing is
            computed.
        var_offset: by how much the logit of the variance's weight exceeds that of the mean's, in [-8, 8]. For
            the number 0 nothing is computed, because both have the same weight.
    """

    alpha: Any
    slope: Any = 0.0
    var_offset: Any = 0.0

    @classmethod
    def of(cls, weight: Any) -> "ExampleWeight":
        """Return ``weight`` itself, or the same weight at any distance if it is an alpha alone."""
        return weight if isinstance(weight, ExampleWeight) else cls(weight)

    def at(self, distance: Any) -> tuple["Share", "Share"]:
        """Compute the weight of the mean and that of the variance of an example.

            >>> mean, var = ExampleWeight(0.1, slope=0.5, var_offset=2.0).at(np.array([0.0, 1.0, 9.0]))
            >>> mean.example.round(3), var.example.round(3)
            (array([0.001, 0.1  , 0.25 ]), array([0.008, 0.451, 0.711]))

        Args:
            distance: the distance D, 0 or more; above :data:`LARGEST_DISTANCE` it counts as that. Without a
                slope it does not matter.
        """
        share = Share(self.alpha, 1 - self.alpha)
        if not is_zero(self.slope):
            is_number = isinstance(distance, float)
            near = min(distance, LARGEST_DISTANCE) if is_number else distance.clip(None, LARGEST_DISTANCE)
            share = share.with_odds((near + SMALLEST_DISTANCE) ** self.slope)
        return share, share if is_zero(self.var_offset) else share.with_odds(_exp(self.var_offset))


class Share(NamedTuple):
    """The weight of an example, and the rest, which is that of the running statistics."""

    example: Any
    rest: Any

    def with_odds(self, factor: Any) -> "Share":
        """Multiply the odds, the weight over the rest, by a positive finite factor.

        This adds the logarithm of the factor to the logit of the weight, and needs no logit, which is
        infinite at 0 and 1: a weight of 0 stays 0, and a weight of 1 stays 1. A factor of 1 returns alpha and
        ``1 - alpha`` bit for bit, because their sum rounds to 1.
        """
        far = self.example * factor
        total = self.rest + far
        return Share(far / total, self.rest / total)

    def of(self, example: Any, running: Any) -> Any:
        """Return the sum of both values, each multiplied by its weight."""
        return self.example * example + self.rest * running


class Mixture(NamedTuple):
    """What an example is normalized by.

    Attributes:
        weight: the weight of the example's mean: alpha itself, or one per example, of shape (N, 1, ...).
        var_weight: that of the example's variance.
        mean: the mean of the mixture.
        total: the variance of the mixture, with eps.
    """

    weight: Any
    var_weight: Any
    mean: Any
    total: Any


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
    share = Share(alpha, 1 - alpha)
    return _mixed(share, share, example, running, example.mean - running.mean)


def mix_example(weight: ExampleWeight, example: Moments[Any], running: Moments[Any], eps: Any) -> Mixture:
    """Mix the moments of examples with the running ones, each by its own weight.

    With the weights a of the variance and b of the mean, the variance is that of :func:`mix` where a = b:

        mean = running mean + b (mean - running mean)
        var  = a var + (1 - a) running var + b (1 - b) (mean - running mean)^2

        >>> examples = Moments(np.array([[0.0], [6.0]]), np.ones((2, 1)))  # one near, one far
        >>> running = Moments(np.zeros(1), np.ones(1))
        >>> mix_example(ExampleWeight(0.1, slope=0.5), examples, running, eps=0.0).weight.round(3)
        array([[0.001],
               [0.32 ]])

    Args:
        weight: how much an example counts.
        example: moments of each example, of shape (N, C, ...).
        running: running statistics, of a shape that broadcasts with that of ``example``.
        eps: what the layer adds to a variance.

    Returns:
        The weights, and the moments of the mixtures, of the broadcast shape.
    """
    eps = eps + _TINY
    total, running_total = example.var + eps, running.var + eps
    between = example.mean - running.mean
    far = None if is_zero(weight.slope) else _distance(between, total, running_total)
    mean, var = weight.at(far)
    moments = _mixed(mean, var, Moments(example.mean, total), Moments(running.mean, running_total), between)
    return Mixture(mean.example, var.example, moments.mean, moments.var)


def distance(example: Moments[Any], running: Moments[Any], eps: Any) -> Any:
    """Compute how far the moments of examples are from the running ones, see :class:`ExampleWeight`.

    Args:
        example: moments of each example, of shape (N, C, ...).
        running: running statistics, of a shape that broadcasts with that of ``example``.
        eps: what the layer adds to a variance.

    Returns:
        The distances, of shape (N, 1, ...).
    """
    eps = eps + _TINY
    far = _distance(example.mean - running.mean, example.var + eps, running.var + eps)
    return np.full_like(example.mean[:, :1], far) if isinstance(far, float) else far


def _mixed(
    mean: Share, var: Share, example: Moments[Any], running: Moments[Any], between: Any
) -> Moments[Any]:
    """Mix moments, by the weights of mean and variance; ``between`` is the difference of the two means.

    The variances may include eps, and then that of the mixture does, because the weights add up to 1.
    """
    toward = mean.example * between
    return Moments(running.mean + toward, var.of(example.var, running.var) + mean.rest * (toward * between))


def _distance(between: Any, total: Any, running_total: Any) -> Any:
    """Compute the distance from the difference of the means, and the variances with eps.

    For an array of one example it is a number, with which Python computes ten times as fast as NumPy.
    """
    log_ratio = _log(total / running_total)
    if isinstance(between, np.ndarray) and len(between) == 1:
        twice = np.vdot(between, between / running_total) + np.vdot(log_ratio, log_ratio)
        return float(twice) * (0.5 / between.size)
    return _half_mean(between * between / running_total + log_ratio * log_ratio)


def _half_mean(terms: Any) -> Any:
    """Compute half of the mean over axis 1, which stays with size 1."""
    if hasattr(terms, "sum"):  # for few numbers it is faster than the mean
        return terms.sum(1, keepdims=True) * (0.5 / terms.shape[1])
    return terms.mean(1, keepdims=True) * 0.5


def is_zero(number: Any) -> bool:
    """Tell whether this is the number 0, and not a tensor or a value of a graph."""
    return isinstance(number, (int, float)) and number == 0


def _log(values: Any) -> Any:
    return values.log() if hasattr(values, "log") else np.log(values)


def _exp(value: Any) -> Any:
    if hasattr(value, "exp"):
        return value.exp()
    return math.exp(value) if isinstance(value, (int, float)) else np.exp(value)
