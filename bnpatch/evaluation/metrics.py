"""Scores of single examples, and what may be concluded from them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from bnpatch.core.errors import BnpatchError

Values = npt.NDArray[np.float64]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]

#: The 97.5th percentile of the normal distribution: a 95% interval reaches so many standard errors each way.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Metric:
    """One number per example.

    Attributes:
        name: as shown to people.
        score: (outputs of shape (N, ...), targets of shape (N, ...)) to scores of shape (N,).
        higher_is_better: which way is better.
        is_rate: scores are 0 or 1, so that their mean reads as a percentage.
    """

    name: str
    score: ScoreFunction
    higher_is_better: bool = True
    is_rate: bool = False

    @property
    def sign(self) -> int:
        """1 where more is better, else -1: a change times this is a gain."""
        return 1 if self.higher_is_better else -1

    @property
    def of_classes(self) -> bool:
        """Is it one of :data:`METRICS`, which compare answers with classes?"""
        return METRICS.get(self.name) is self

    def better(self, a: float, b: float) -> bool:
        """Is ``a`` strictly better than ``b``?"""
        return a > b if self.higher_is_better else a < b

    def format(self, value: float, signed: bool = False) -> str:
        """Write a value for people: a rate in percent (points where signed), others plainly."""
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
    """What a metric that is of sets of examples has for its score."""
    raise BnpatchError("this has no scores of single examples", "choose another metric")


ACCURACY = Metric("accuracy", _correct, is_rate=True)
CROSS_ENTROPY = Metric("cross-entropy", _cross_entropy, higher_is_better=False)
TOP5 = Metric("top5", _among_five, is_rate=True)
CONFIDENCE = Metric("confidence", _confidence)  #: of the answer; for calibration, not to be tuned
PREDICTION = Metric("prediction", _prediction)  #: the answer itself; for the verdict, likewise
#: Of sets of examples, see :mod:`bnpatch.evaluation.confidence`; not to be tuned either
CALIBRATION_ERROR = Metric("calibration error", no_scores, higher_is_better=False, is_rate=True)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (ACCURACY, CROSS_ENTROPY, TOP5)}


def as_metric(metric: str | Metric | ScoreFunction, also: Iterable[str] = ()) -> Metric:
    """Resolve a name; a callable becomes a metric of which more is better.

    Args:
        metric: a name of :data:`METRICS`, or a function.
        also: further names that the caller knows, for the error's sake.

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


def score(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Scores of shape (N,) of a batch, on its device.

    Raises:
        BnpatchError: the metric didn't return one number per example.
    """
    values = metric.score(outputs, targets)
    if not isinstance(values, Tensor) or values.shape != (len(targets),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise BnpatchError(
            f"the metric {metric.name!r} returned {got} for {len(targets)} examples",
            "it must return a tensor with one number per example",
        )
    return values.detach()


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Does the interval lie to one side of 0?"""
        return self.low > 0 or self.high < 0

    @property
    def reach(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def to_json(self) -> dict[str, float | None]:
        """Plain values; None for what is infinite."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class Comparison:
    """A metric on the same examples without and with a patch.

    ``change`` is of the same examples, pair by pair, which is sharper than the other two intervals suggest.
    """

    metric: Metric
    before: Estimate
    after: Estimate
    change: Estimate

    @property
    def verdict(self) -> str:
        """Either gain, loss, or no significant change, where the interval of the change contains 0."""
        if not self.change.excludes_zero:
            return "no significant change"
        return "gain" if self.metric.better(self.after.value, self.before.value) else "loss"

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for a bound that is infinite, as of a single example."""
        estimates = {"before": self.before, "after": self.after, "change": self.change}
        return {name: estimate.to_json() for name, estimate in estimates.items()} | {"verdict": self.verdict}


def mean_estimate(scores: Values) -> Estimate:
    """The mean of per-example scores: Wilson's interval for rates, Student's otherwise."""
    n = len(scores)
    if not np.isin(scores, (0, 1)).all():
        return student(scores)
    z, p = Z95, float(np.mean(scores))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, min(p, centre - half), max(p, centre + half))


def paired_difference(before: Values, after: Values) -> Estimate:
    """The mean change from ``before`` to ``after``, scores of the same examples in the same order.

    For 0/1 scores, whose changes are few and lie at -1 and 1, the interval of Bonett & Price (2012),
    which keeps its coverage where few examples flip; Student's otherwise.
    """
    changes = after - before
    if not np.isin(np.concatenate([before, after]), (0, 1)).all():
        return student(changes)
    n = len(changes)
    up, down = ((np.sum(changes == way) + 1) / (n + 2) for way in (1, -1))
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    centre = float(up - down)
    return Estimate(float(np.mean(changes)), max(-1.0, centre - half), min(1.0, centre + half))


def paired(metric: Metric, before: Values, after: Values) -> Comparison:
    """Compare scores of the same examples in the same order, pair by pair."""
    change = paired_difference(before, after)
    return Comparison(metric, mean_estimate(before), mean_estimate(after), change)


def student(values: Values) -> Estimate:
    """The mean with Student's interval, which is infinite for a single value."""
    from scipy.stats import t  # slow to import

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)
