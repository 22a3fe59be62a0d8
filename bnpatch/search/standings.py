"""Comparison of the trials of a global search, by the examples that they were scored on so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from optuna.trial import TrialState

from bnpatch.evaluation.metrics import Metric, Values
from bnpatch.search.studies import StoredTrial

# The slope of a regression on few examples is uncertain: it is shrunk as if so many more had shown none.
_PRIOR_UNITS = 20


@dataclass(frozen=True)
class Rules:
    """Parameters, budget and metric of a global search.

    Attributes:
        sizes: number of examples in each block.
        metric: the tuned one.
        space: lowest and highest value by name of parameter.
        identity: the parameters that change nothing.
        first: parameters that are tried before any proposal.
        max_passes: budget of all trials together, in passes over all blocks.
        max_trials: budget in trials, the identity included.
    """

    sizes: Sequence[int]
    metric: Metric
    space: Mapping[str, tuple[float, float]]
    identity: Mapping[str, float]
    first: Sequence[Mapping[str, float]] = ()
    max_passes: float = 3.0
    max_trials: int | None = None


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, its standard error, and the number of pairs."""

    value: float
    stderr: float
    units: int


@dataclass(frozen=True)
class Standings:
    """The trials of a study, with estimates and comparisons of their scores."""

    rules: Rules
    trials: Sequence[StoredTrial]
    origin: StoredTrial | None = field(init=False)

    def __post_init__(self) -> None:
        same = (t for t in self.trials if t.params == self.rules.identity and t.state != TrialState.FAIL)
        object.__setattr__(self, "origin", next(same, None))

    @property
    def spent(self) -> int:
        """Number of examples that all processes have scored."""
        return sum(self.rules.sizes[block] for trial in self.trials for block in trial.blocks)

    def mean(self, trial: StoredTrial, metric: str | None = None, blocks: int | None = None) -> float:
        """The mean of a metric over the leading blocks; by default over all blocks of the trial."""
        values, weights = self._units(trial, done(trial) if blocks is None else blocks, metric)
        return float(np.average(values, weights=weights))

    def difference(self, trial: StoredTrial, other: StoredTrial) -> Difference:
        """The difference of a trial from another, on the leading blocks that both have."""
        blocks = min(done(trial), done(other))
        (a, weights), (b, _) = self._units(trial, blocks), self._units(other, blocks)
        return Difference(float(np.average(a - b, weights=weights)), _error(a - b, weights), len(a))

    def estimate(self, trial: StoredTrial, blocks: int) -> float:
        """Estimate the score of a trial on all blocks from its leading ones."""
        if self.origin is None or done(self.origin) < len(self.rules.sizes):
            return self.mean(trial, blocks=blocks)
        return self.mean(self.origin) + self.change(trial, blocks).value

    def change(self, trial: StoredTrial, blocks: int | None = None, metric: str | None = None) -> Difference:
        """Estimate the change from the identity to a trial on all blocks from its leading ones.

        The identity is a control variate: its scores on all blocks show whether the leading blocks are easier
        than the others, and a regression corrects the trial's change for that.

        Args:
            trial: a trial with scores on leading blocks; the identity must have scores on all blocks.
            blocks: number of leading blocks to use; by default all that the trial has.
            metric: name of the metric; by default the tuned one.
        """
        assert self.origin is not None
        blocks = done(trial) if blocks is None else blocks
        (values, weights), (base, _) = (
            self._units(trial, blocks, metric),
            self._units(self.origin, blocks, metric),
        )
        change, here = values - base, float(np.average(base, weights=weights))
        if blocks == len(self.rules.sizes):
            return Difference(float(np.average(change, weights=weights)), _error(change, weights), len(base))
        whole, all_weights = self._units(self.origin, len(self.rules.sizes), metric)
        covariance = float(np.average((base - here) * change, weights=weights))
        variance = float(np.average((base - here) ** 2, weights=weights))
        slope = covariance / variance * len(base) / (len(base) + _PRIOR_UNITS) if variance > 0 else 0.0
        easier = float(np.average(whole, weights=all_weights)) - here
        value = float(np.average(change, weights=weights)) + slope * easier
        rest = _error(change - slope * base, weights)  # the residual of the regression
        return Difference(value, math.hypot(rest, slope * _error(whole, all_weights)), len(base))

    def extrapolated(self) -> dict[int, float]:
        """Scores of the trials extrapolated to all blocks, by number.

        A trial with fewer blocks than the leader is assumed to differ from it on the missing blocks as it
        does on those that it has. A failed trial gets the worst score of all.
        """
        scored = [t for t in self.trials if done(t) and t.state != TrialState.FAIL]
        candidates = [t for t in scored if t is not self.origin] or scored
        if not candidates:
            return {}
        most = max(map(done, candidates))
        leader = min((t for t in candidates if done(t) == most), key=lambda t: self.rank(t, most))
        level = self.estimate(leader, most)
        scores = {}
        for trial in scored:
            blocks = min(done(trial), most)
            scores[trial.number] = level + self.estimate(trial, blocks) - self.estimate(leader, blocks)
        worst = max(scores.values(), key=lambda score: self.sign * score)
        known = [t.params for t in scored]
        failed = (t for t in self.trials if t.state == TrialState.FAIL and t.params not in known)
        return scores | {trial.number: worst for trial in failed}

    @property
    def sign(self) -> float:
        """1 where lower is better, otherwise -1."""
        return -1.0 if self.rules.metric.higher_is_better else 1.0

    def rank(self, trial: StoredTrial, blocks: int) -> tuple[float, float, int]:
        """A sort key, best first: the estimate, then the distance from the identity, then the number."""
        away = self.distance(trial.params, self.rules.identity)
        return self.sign * self.estimate(trial, blocks), away, trial.number

    def distance(self, params: Mapping[str, float], others: Mapping[str, float]) -> float:
        """The sum of the distances of the parameters, each as a fraction of its range."""
        return sum(
            abs(params[name] - others[name]) / (high - low) for name, (low, high) in self.rules.space.items()
        )

    def is_twin(self, trial: StoredTrial) -> bool:
        """Does an older trial have the same parameters?

        That happens when two processes begin trials at the same moment, or when the sampler repeats a point.
        """
        return any(
            t.number < trial.number and t.params == trial.params and t.state != TrialState.FAIL
            for t in self.trials
        )

    def _units(self, trial: StoredTrial, blocks: int, metric: str | None = None) -> tuple[Values, Values]:
        """Scores of the leading blocks, and their weights: each block is weighted by its examples."""
        values = [trial.blocks[block][metric or self.rules.metric.name] for block in range(blocks)]
        weights = [
            np.full(len(v), size / max(1, len(v))) for v, size in zip(values, self.rules.sizes, strict=False)
        ]
        return np.concatenate(values), np.concatenate(weights)


def _error(values: Values, weights: Values) -> float:
    """The standard error of a weighted mean."""
    n = len(values)
    if n < 2:
        return math.inf
    mean = np.average(values, weights=weights)
    variance = float(np.sum((weights * (values - mean)) ** 2)) / float(np.sum(weights)) ** 2
    return math.sqrt(variance * n / (n - 1))


def done(trial: StoredTrial) -> int:
    """The number of leading blocks that a trial was scored on."""
    count = 0
    while count in trial.blocks:
        count += 1
    return count
