"""Metrics that score single examples, and means and comparisons of such scores with intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted
from bnpatch.evaluation.clusters import (
    FEW_GROUPS,
    Indices,
    by_group,
    clusters,
    effective_count,
    effective_groups,
)
from bnpatch.evaluation.clusters import Values as Values

ScoreFunction = Callable[[Tensor, Tensor], Tensor]

#: The 97.5th percentile of the normal distribution: half the width of a 95% interval in standard errors.
Z95 = float(ndtri(0.975))

#: Top-5 accuracy is 100% for any model with fewer classes than this.
FEWEST_FOR_TOP5 = 6

#: With fewer examples the interval of a change of cross-entropy is rough: docs/trust.md has its coverage.
ROUGH_BELOW = 300


@dataclass(frozen=True)
class Metric:
    """A function that gives every example one number, and how to read that number.

        margin = bnpatch.Metric("margin", lambda outputs, targets: outputs.amax(1) - outputs.mean(1))
        result = bnpatch.tune_alpha("model.pt", "val/", metric=margin)

    Attributes:
        name: the name that people see.
        score: maps (outputs of shape (N, ...), targets of shape (N, ...)) to a tensor of scores, (N,).
        higher_is_better: whether a higher score is better.
        is_rate: whether scores are 0 or 1, so that people read their mean as a percentage.
        is_positive: whether scores are never below 0, so that the intervals that people see are not either.
    """

    name: str
    score: ScoreFunction
    higher_is_better: bool = True
    is_rate: bool = False
    is_positive: bool = False

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1; a change of the score times this is a gain."""
        return 1 if self.higher_is_better else -1

    @property
    def of_classes(self) -> bool:
        """Whether it is one of :data:`METRICS`, which need class indices as targets."""
        return METRICS.get(self.name) is self

    @property
    def reads_classes(self) -> bool:
        """Whether it takes logits (N, K) of classes; a metric of the user's own takes the outputs."""
        return self in (*METRICS.values(), CONFIDENCE, PREDICTION)

    def better(self, a: float, b: float) -> bool:
        """Tell whether the score ``a`` is strictly better than ``b``."""
        return a > b if self.higher_is_better else a < b

    def clip(self, mean: float) -> float:
        """Return the possible mean that is nearest to ``mean``, for the ends of intervals that people see."""
        lowest = 0.0 if self.is_rate or self.is_positive else -math.inf
        return min(max(mean, lowest), 1.0 if self.is_rate else math.inf)

    def format(self, value: float, signed: bool = False) -> str:
        """Format a value for people: a rate in percent (in points if signed), others with 4 decimals."""
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.2f}{'' if signed else '%'}" if self.is_rate else f"{value:{sign}.4f}"


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float()


def _among_five(logits: Tensor, targets: Tensor) -> Tensor:
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (top == targets[:, None]).any(1).float()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, targets, reduction="none")


def _confidence(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.float() if logits.dtype.itemsize < 4 else logits).softmax(1).amax(1)


def _prediction(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(1).float()


def no_scores(outputs: Tensor, targets: Tensor) -> Tensor:
    """Raise an error; this is the score function of a metric that only sets of examples have."""
    raise BnpatchError("this has no scores of single examples", "choose another metric")


ACCURACY = Metric("accuracy", _correct, is_rate=True)
CROSS_ENTROPY = Metric("cross-entropy", _cross_entropy, higher_is_better=False, is_positive=True)
TOP5 = Metric("top5", _among_five, is_rate=True)
CONFIDENCE = Metric("confidence", _confidence)  #: probability of the chosen class; not to be tuned for
PREDICTION = Metric("prediction", _prediction)  #: the chosen class itself; not to be tuned for
#: A metric of sets of examples, see :mod:`bnpatch.evaluation.confidence`; not to be tuned for.
CALIBRATION_ERROR = Metric("calibration error", no_scores, higher_is_better=False, is_rate=True)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (ACCURACY, CROSS_ENTROPY, TOP5)}


def as_metric(metric: str | Metric | ScoreFunction, also: Iterable[str] = ()) -> Metric:
    """Return the metric of this name; a function becomes a metric for which higher is better.

    Args:
        metric: a name in :data:`METRICS`, a function as :attr:`Metric.score`, or a metric.
        also: further names that the caller accepts, for the error message.

    Raises:
        BnpatchError: the name is not known.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return Metric(getattr(metric, "__name__", "score"), metric)
    if metric not in METRICS:
        raise BnpatchError(f"there is no metric {metric!r}", f"choose one of {', '.join([*METRICS, *also])}")
    return METRICS[metric]


def worth_showing(metrics: Sequence[Metric], num_classes: int) -> list[Metric]:
    """Leave out top-5 accuracy where there are so few classes that it is 100% for any model.

    >>> [metric.name for metric in worth_showing([ACCURACY, TOP5], num_classes=5)]
    ['accuracy']
    """
    return [metric for metric in metrics if metric.name != TOP5.name or num_classes >= FEWEST_FOR_TOP5]


def score(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Score a batch; return a tensor of shape (N,) on the device of the outputs.

    Raises:
        BnpatchError: the metric didn't return one number per example.
    """
    values = metric.score(outputs, targets)
    if not isinstance(values, Tensor) or values.shape != (len(targets),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise BnpatchError(
            f"the metric {metric.name!r} returned {got} for {counted(len(targets), 'example')}",
            "it must return a tensor with one number per example",
        )
    return values.detach()


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its 95% confidence interval.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        symmetric_reach: half the width before a correction for skewness; None if there was no correction.
    """

    value: float
    low: float
    high: float
    symmetric_reach: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def reach(self) -> float:
        """Half the width of the interval before a correction for skewness: a number of standard errors."""
        return (self.high - self.low) / 2 if self.symmetric_reach is None else self.symmetric_reach

    def to_json(self) -> dict[str, float | None]:
        """Return plain JSON values; None for an infinite one."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Outcome(Enum):
    """What a comparison shows."""

    GAIN = "gain"
    LOSS = "loss"
    NO_CHANGE = "no significant change"


@dataclass(frozen=True)
class Comparison:
    """A metric on the same examples without and with a patch.

    Attributes:
        metric: the metric.
        before: its mean without the patch.
        after: its mean with the patch.
        change: the mean change. It is computed pair by pair, so its interval is narrower than those of
            ``before`` and ``after`` suggest.
        is_rough: whether the intervals contain the truth in less than 95% of cases: there are few groups, or
            so few examples that the rare ones that decide a mean cross-entropy may all be missing.
    """

    metric: Metric
    before: Estimate
    after: Estimate
    change: Estimate
    is_rough: bool = False

    @property
    def outcome(self) -> Outcome:
        """A gain, a loss, or neither if the interval of the change contains 0."""
        if not self.change.excludes_zero:
            return Outcome.NO_CHANGE
        return Outcome.GAIN if self.metric.better(self.after.value, self.before.value) else Outcome.LOSS

    @property
    def verdict(self) -> str:
        """The outcome in words, for people."""
        return self.outcome.value

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; None for an infinite bound, which a single example gives."""
        estimates = {"before": self.before, "after": self.after, "change": self.change}
        return {name: estimate.to_json() for name, estimate in estimates.items()} | {"verdict": self.verdict}


def mean_estimate(scores: Values, groups: Indices | None = None) -> Estimate:
    """Return the mean of scores (N,), with Wilson's interval if all are 0 or 1, else with Hall's.

    Args:
        scores: scores of the examples, (N,).
        groups: the group of each example, (N,), if some are not independent: the groups then are the units.
    """
    numbers = clusters(groups)
    if not np.isin(scores, (0, 1)).all():
        return skewness_corrected(scores if numbers is None else by_group(scores, numbers))
    p = float(np.mean(scores))
    if numbers is not None:
        return _wilson(p, effective_count(scores, numbers), effective_groups(numbers))
    from scipy.stats import binomtest  # imported here because it is slow to import

    ends = binomtest(int(np.sum(scores)), len(scores)).proportion_ci(0.95, method="wilson")
    return Estimate(p, min(p, float(ends.low)), max(p, float(ends.high)))


def _wilson(p: float, n: float, units: float) -> Estimate:
    """Return Wilson's interval of a rate among n effective examples, with Student's t of the groups."""
    if units < 2:
        return Estimate(p, -math.inf, math.inf)
    z = _quantile(units)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def paired_difference(before: Values, after: Values, groups: Indices | None = None) -> Estimate:
    """Return the mean change from ``before`` to ``after``, scores (N,) of the same examples in one order.

    For 0/1 scores, the interval is that of Bonett & Price (2012), which keeps its coverage even if only a few
    examples change. For other scores it is Hall's, see :func:`skewness_corrected`. Where examples come in
    groups (N,), the groups are the units: Hall's interval is of one value per group, and that of Bonett &
    Price of the effective number of examples, see :mod:`bnpatch.evaluation.clusters`.

    >>> before, after = np.zeros(100), np.repeat([0.0, 1.0], [90, 10])
    >>> copies = np.repeat(np.arange(20), 5)
    >>> paired_difference(before, after).excludes_zero, paired_difference(before, after, copies).excludes_zero
    (True, False)
    """
    changes, numbers = after - before, clusters(groups)
    if not np.isin(np.concatenate([before, after]), (0, 1)).all():
        return skewness_corrected(changes if numbers is None else by_group(changes, numbers))
    return paired_rates(before, after, groups)


def paired_rates(
    before: Values, after: Values, groups: Indices | None = None, *, level: float = 0.975
) -> Estimate:
    """Return the mean change of 0/1 scores (N,) with the interval of Bonett & Price.

    Args:
        before: scores without the change, (N,).
        after: scores of the same examples with it, (N,).
        groups: the group of each example, (N,), if some are not independent.
        level: confidence of each end for itself: 0.975 for a 95% interval, 0.95 for a one-sided test.
    """
    changes, numbers = after - before, clusters(groups)
    if numbers is None:
        return _bonett_price(changes, float(len(changes)), float(ndtri(level)))
    units = effective_groups(numbers)
    if units < 2:
        return Estimate(float(np.mean(changes)), -math.inf, math.inf)
    return _bonett_price(changes, effective_count(changes, numbers), _quantile(units, level))


def _bonett_price(changes: Values, n: float, quantile: float) -> Estimate:
    """Return the mean change, with the interval that ``n`` independent examples would give."""
    share = n / len(changes)
    up, down = ((np.sum(changes == way) * share + 1) / (n + 2) for way in (1, -1))
    half = quantile * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    centre = float(up - down)
    return Estimate(float(np.mean(changes)), max(-1.0, centre - half), min(1.0, centre + half))


def paired(metric: Metric, before: Values, after: Values, groups: Indices | None = None) -> Comparison:
    """Compare scores (N,) of the same examples in the same order, pair by pair; they may come in groups."""
    change = paired_difference(before, after, groups)
    units = len(before) if groups is None else len(np.unique(groups))
    is_rough = (metric.name == CROSS_ENTROPY.name and units < ROUGH_BELOW) or (
        groups is not None and units < FEW_GROUPS
    )
    return Comparison(metric, mean_estimate(before, groups), mean_estimate(after, groups), change, is_rough)


def student(values: Values) -> Estimate:
    """Return the mean with Student's interval, which is infinite for a single value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, -math.inf, math.inf)
    from scipy.stats import sem  # imported here because it is slow to import

    half = _quantile(n) * float(sem(values))
    return Estimate(mean, mean - half, mean + half)


def skewness_corrected(values: Values) -> Estimate:
    """Return the mean of values (N,) with an interval that is longer on the side of their longer tail.

    The interval inverts the monotone cubic transformation of the t statistic by Hall ("On the removal of
    skewness by transformation", JRSS B 54, 1992), with Student's quantiles instead of the normal ones. Where
    Student's interval reaches farther, its end is taken: with heavy tails the skewness of a sample is mostly
    noise, and Hall's interval alone then holds the truth too seldom. For symmetric values the result is
    Student's interval, and so it is for one value or equal ones.
    """
    plain = student(values)
    n, deviation = len(values), float(np.std(values))
    if n < 2 or not 0 < deviation < math.inf:
        return plain
    skewness = float(np.mean(((values - plain.value) / deviation) ** 3))
    standard_error, t = deviation / math.sqrt(n - 1), _quantile(n)
    a = skewness / (3 * math.sqrt(n))
    low, high = (plain.value - standard_error * _inverse_cubic(x, a) for x in (t, -t))
    return Estimate(plain.value, min(low, plain.low), max(high, plain.high), plain.reach)


def _quantile(n: float, level: float = 0.975) -> float:
    """Return a quantile of Student's t for n values."""
    from scipy.stats import t  # imported here because it is slow to import

    return float(t.ppf(level, n - 1))


def _inverse_cubic(x: float, a: float) -> float:
    """Return the t with ``t + a t^2 + a^2 t^3 / 3 + a / 2 = x``.

    That is ``(cbrt(1 + 3 a (x - a / 2)) - 1) / a``, here without the loss of digits near a = 0.
    """
    distance = 3 * (x - a / 2)
    root = float(np.cbrt(1 + a * distance))
    return distance / (root * root + root + 1)
