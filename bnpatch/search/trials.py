"""The trials of a global search, with estimates of their scores on all examples from those so far."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from bnpatch.data.dataset import Indices
from bnpatch.evaluation.metrics import METRICS, Metric, Values
from bnpatch.search.config import Trial

BlockScores = Mapping[str, Values]

# The slope of a regression on few examples is uncertain, so it is shrunk as if there were this many more
# examples, with the slope 0.
_PRIOR_UNITS = 20
# The level of significance at which a trial is worse than another, and the fewest paired differences from
# which their variance can be estimated.
_LEVEL, _FEWEST_PAIRS = 0.05, 8


@dataclass(frozen=True)
class GlobalSearchConfig:
    """What a global search looks for, and what it may cost.

    Attributes:
        sizes: number of examples in each block; the blocks should be similar, as random parts are.
        metric: the metric to tune.
        space: lowest and highest value by name of parameter.
        start: the parameters to start from; of equally good trials the nearest to them goes on.
        first: parameters to try before the sampler proposes any.
        by_root: names of the parameters whose square root matters, so that small values are told apart.
        max_passes: budget of the whole study, in passes over all blocks. Below 2 only the start is scored.
        max_trials: budget of the whole study in trials, the start included.
        seed: seed of the sampler.
        groups: the group of each example of each block, of the shapes of the scores, if examples are not
            independent: the groups then are the units of standard errors. No group is in two blocks.
    """

    sizes: Sequence[int]
    metric: Metric
    space: Mapping[str, tuple[float, float]]
    start: Mapping[str, float]
    first: Sequence[Mapping[str, float]] = ()
    by_root: Collection[str] = ()
    max_passes: float = 3.0
    max_trials: int | None = None
    seed: int = 0
    groups: Sequence[Indices] | None = None

    def scaled(self, params: Mapping[str, float]) -> dict[str, float]:
        """Return the parameters on the scale that matters: some by their square root."""
        return {name: math.sqrt(v) if name in self.by_root else v for name, v in params.items()}

    def unscaled(self, scaled: Mapping[str, float]) -> dict[str, float]:
        """Return the inverse of :meth:`scaled`."""
        return {name: v**2 if name in self.by_root else v for name, v in scaled.items()}

    def scaled_space(self) -> dict[str, tuple[float, float]]:
        """Return lowest and highest value by name of parameter, on the scale that matters."""
        low, high = (self.scaled({n: ends[at] for n, ends in self.space.items()}) for at in (0, 1))
        return {name: (low[name], high[name]) for name in self.space}

    def distance(self, params: Mapping[str, float], others: Mapping[str, float]) -> float:
        """Return the sum of the distances of the parameters on their scale, as fractions of their ranges."""
        a, b = self.scaled(params), self.scaled(others)
        return sum(abs(a[n] - b[n]) / (high - low) for n, (low, high) in self.scaled_space().items())


@dataclass(frozen=True)
class StoredTrial:
    """A trial as it is stored in the study.

    Attributes:
        number: number in the order in which trials began; 0 is the start. A trial that was enqueued again
            keeps its number.
        params: values by name of parameter.
        round: round of successive halving in which the trial began.
        blocks: scores by name of metric, by number of finished block.
        state: COMPLETE (all blocks), PRUNED (it ended early), FAIL (no finite outputs, or a repetition), or
            RUNNING or WAITING where it has not ended.
        is_own: whether this process works on the trial.
        stored: the number that Optuna gave the trial.
    """

    number: int
    params: Mapping[str, float]
    round: int
    blocks: Mapping[int, BlockScores]
    state: TrialState
    is_own: bool = False
    stored: int = -1

    @property
    def is_running(self) -> bool:
        """Is the trial neither complete nor pruned nor failed?"""
        return not self.state.is_finished()

    @property
    def num_blocks(self) -> int:
        """The number of leading blocks that the trial was scored on, one after the other."""
        return len(self.blocks)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, its standard error, and the number of pairs."""

    value: float
    stderr: float
    pairs: int


@dataclass(frozen=True)
class Trials:
    """The trials of a global search, with estimates of their scores on all examples.

    Attributes:
        config: what the search looks for.
        trials: all trials, the start first.
        interrupted: whether the user stopped the search early.
    """

    config: GlobalSearchConfig
    trials: Sequence[StoredTrial]
    interrupted: bool = False

    @property
    def start(self) -> StoredTrial | None:
        """The trial of the parameters to start from; None before it began."""
        return next((t for t in self._not_failed if t.params == self.config.start), None)

    @property
    def running(self) -> list[StoredTrial]:
        """The trials that have not ended, of all processes."""
        return [t for t in self.trials if t.is_running]

    @property
    def best(self) -> StoredTrial:
        """The trial that Optuna calls best: of those on all blocks, the first that no other beats."""
        complete = [t for t in self.trials if t.state == TrialState.COMPLETE]
        best = min(complete, key=lambda t: (-self.sign * self.mean(t), t.stored), default=self.start)
        assert best is not None  # a search begins with the start
        return best

    @property
    def spent(self) -> int:
        """Number of examples that all processes have scored."""
        return sum(self.config.sizes[block] for trial in self.trials for block in trial.blocks)

    @property
    def passes(self) -> float:
        """Passes over the examples, of all processes and all runs of the study."""
        return self.spent / sum(self.config.sizes)

    @property
    def sign(self) -> int:
        """1 where higher is better, otherwise -1."""
        return self.config.metric.sign

    def mean(self, trial: StoredTrial, metric: str | None = None, blocks: int | None = None) -> float:
        """Return the mean of a metric over the leading blocks; by default over all blocks of the trial."""
        values, weights = self._scores(trial, trial.num_blocks if blocks is None else blocks, metric)
        return float(np.average(values, weights=weights))

    def difference(self, trial: StoredTrial, other: StoredTrial) -> Difference:
        """Return the difference of a trial from another, on the leading blocks that both have."""
        blocks = min(trial.num_blocks, other.num_blocks)
        (a, weights), (b, _) = self._scores(trial, blocks), self._scores(other, blocks)
        return Difference(float(np.average(a - b, weights=weights)), _stderr(a - b, weights), len(a))

    def is_significantly_worse(self, trial: StoredTrial) -> bool:
        """Tell whether another trial is significantly better on the same examples.

        Student's t-test of the paired differences, with the level divided by the number of tests.
        """
        blocks = trial.num_blocks
        rivals = [t for t in self._not_failed if t is not trial and t.num_blocks >= blocks]
        if not blocks or not rivals:
            return False
        difference = self.difference(trial, min(rivals, key=lambda t: self.rank(t, blocks)))
        if difference.pairs < _FEWEST_PAIRS:
            return False
        from scipy.stats import t as student  # slow to import

        bound = student.isf(_LEVEL / len(self.config.sizes), difference.pairs - 1) * difference.stderr
        return bool(-self.sign * difference.value > bound)

    def estimate(self, trial: StoredTrial, blocks: int | None = None, metric: str | None = None) -> float:
        """Estimate the mean of a metric on all blocks from the leading ones that the trial has."""
        start = self.start
        if start is None or start.num_blocks < len(self.config.sizes):
            return self.mean(trial, metric, blocks)
        return self.mean(start, metric) + self.change(trial, blocks, metric).value

    def change(self, trial: StoredTrial, blocks: int | None = None, metric: str | None = None) -> Difference:
        """Estimate the change from the start to a trial on all blocks from its leading ones.

        The start is a control variate: its scores on all blocks show whether the leading blocks are easier
        than the others, and a regression corrects the trial's change for that.

        Args:
            trial: a trial with scores on leading blocks; the start must have scores on all blocks.
            blocks: number of leading blocks to use; by default all that the trial has.
            metric: name of the metric; by default the tuned one.
        """
        start = self.start
        assert start is not None
        blocks = trial.num_blocks if blocks is None else blocks
        values, weights = self._scores(trial, blocks, metric)
        base, _ = self._scores(start, blocks, metric)
        change, here = values - base, float(np.average(base, weights=weights))
        if blocks == len(self.config.sizes):
            return Difference(float(np.average(change, weights=weights)), _stderr(change, weights), len(base))
        whole, all_weights = self._scores(start, len(self.config.sizes), metric)
        covariance = float(np.average((base - here) * change, weights=weights))
        variance = float(np.average((base - here) ** 2, weights=weights))
        slope = covariance / variance * len(base) / (len(base) + _PRIOR_UNITS) if variance > 0 else 0.0
        easier = float(np.average(whole, weights=all_weights)) - here
        value = float(np.average(change, weights=weights)) + slope * easier
        rest = _stderr(change - slope * base, weights)  # the residual of the regression
        return Difference(value, math.hypot(rest, slope * _stderr(whole, all_weights)), len(base))

    def extrapolated(self) -> dict[int, float]:
        """Return scores of the trials extrapolated to all blocks, by number.

        A trial with fewer blocks than the furthest is assumed to differ from it on the missing blocks as it
        does on those that it has. A failed trial gets the worst score of all.
        """
        scored = [t for t in self._not_failed if t.num_blocks]
        start = self.start
        others = [t for t in scored if t is not start] or scored
        if not others:
            return {}
        most = max(t.num_blocks for t in others)
        leader = min((t for t in others if t.num_blocks == most), key=lambda t: self.rank(t, most))
        level = self.estimate(leader, most)
        scores = {}
        for trial in scored:
            blocks = min(trial.num_blocks, most)
            scores[trial.number] = level + self.estimate(trial, blocks) - self.estimate(leader, blocks)
        worst = min(scores.values(), key=lambda score: self.sign * score)
        known = [t.params for t in scored]
        failed = (t for t in self.trials if t.state == TrialState.FAIL and t.params not in known)
        return scores | {trial.number: worst for trial in failed}

    def rank(self, trial: StoredTrial, blocks: int) -> tuple[float, float, int]:
        """Return a sort key, best first: the estimate, then the distance from the start, then the number."""
        away = self.config.distance(trial.params, self.config.start)
        return -self.sign * self.estimate(trial, blocks), away, trial.number

    def is_repeated(self, trial: StoredTrial) -> bool:
        """Tell whether an older trial has the same parameters.

        That happens when two processes begin trials at the same moment, or when the sampler repeats a point.
        """
        return any(t.number < trial.number and t.params == trial.params for t in self._not_failed)

    @property
    def _not_failed(self) -> list[StoredTrial]:
        return [t for t in self.trials if t.state != TrialState.FAIL]

    def _scores(self, trial: StoredTrial, blocks: int, metric: str | None = None) -> tuple[Values, Values]:
        """Return scores of the leading blocks, and their weights: each block is weighted by its examples.

        Where examples come in groups, there is one score per group, weighted by the examples of the group.
        """
        values = [trial.blocks[block][metric or self.config.metric.name] for block in range(blocks)]
        if self.config.groups is not None:
            numbers = [np.unique(part, return_inverse=True)[1] for part in self.config.groups[:blocks]]
            sizes = [np.bincount(part) for part in numbers]
            means = [
                np.bincount(part, v) / size for part, v, size in zip(numbers, values, sizes, strict=True)
            ]
            return np.concatenate(means), np.concatenate(sizes).astype(np.float64)
        weights = [
            np.full(len(v), size / max(1, len(v))) for v, size in zip(values, self.config.sizes, strict=False)
        ]
        return np.concatenate(values), np.concatenate(weights)


def as_trial(candidate: str, trial: StoredTrial, trials: Trials) -> Trial:
    """Convert a trial of a global search, with its scores extrapolated to all examples."""

    def score(metric: str) -> float:
        # A rate that is extrapolated from few examples may lie outside [0, 1].
        value, is_rate = trials.estimate(trial, metric=metric), metric in METRICS and METRICS[metric].is_rate
        return min(1.0, max(0.0, value)) if is_rate else value

    return Trial(
        candidate,
        trial.number,
        {"weight" if name in ("alpha", "lambda") else name: v for name, v in trial.params.items()},
        {metric: score(metric) for metric in trial.blocks[0]},
        {metric: trials.change(trial, metric=metric).stderr for metric in trial.blocks[0]},
        sum(trials.config.sizes[: trial.num_blocks]),
    )


def _stderr(values: Values, weights: Values) -> float:
    """Return the standard error of a weighted mean."""
    n = len(values)
    if n < 2:
        return math.inf
    mean = np.average(values, weights=weights)
    variance = float(np.sum((weights * (values - mean)) ** 2)) / float(np.sum(weights)) ** 2
    return math.sqrt(variance * n / (n - 1))
