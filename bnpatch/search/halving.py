"""Successive halving: the next step of a global search, as a function of its trials and their scores alone.

So a global search that was killed continues as if it had not been, and processes can share a study.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from bnpatch.search.standings import Rules, Standings, done
from bnpatch.search.studies import StoredTrial

#: Rungs of successive halving: the fraction of the exploration budget that one trial takes to reach it, and
#: how many trials move up from the rung below. Given points begin on the first rung, proposals on the last.
RUNGS: tuple[tuple[float, int], ...] = ((1 / 16, 0), (1 / 4, 2))
# A rung has at least this many examples, or a quarter of all: fewer don't show where the good region is.
_LEAST = 24
# A trial is pruned if another is better at this significance level, divided by the number of tests.
_LEVEL = 0.05
# The test needs at least this many paired differences to estimate their variance.
_FEWEST = 8
# Blocks are scored together up to this many examples, because smaller batches are inefficient.
_BATCH = 64
# Trials that move up must be at least this far apart, as a fraction of the range, to show a slope.
_APART = 0.02
# A rung takes no more proposals once the sampler has repeated earlier points this often.
_REPEATS = 2


@dataclass(frozen=True)
class Evaluate:
    """Score the next blocks of a trial, as many as make an efficient batch."""

    trial: StoredTrial
    blocks: range


@dataclass(frozen=True)
class Begin:
    """Begin a trial with these parameters; with a proposal of the sampler if None."""

    rung: int
    params: Mapping[str, float] | None = None


@dataclass(frozen=True)
class End:
    """End a trial as complete, pruned or failed."""

    trial: StoredTrial
    state: TrialState


@dataclass(frozen=True)
class Wait:
    """Wait for another process, whose scores are needed to decide the next step."""


Step = Evaluate | Begin | End | Wait


class Schedule:
    """Decides the next step of a global search by successive halving."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.ends = np.cumsum(rules.sizes)
        self.total = int(self.ends[-1])
        exploration = max(0.0, rules.max_passes - 2) * self.total
        self.targets = [
            self._blocks_with(max(share * exploration, min(_LEAST, self.total / 4))) for share, _ in RUNGS
        ]

    @property
    def racing(self) -> bool:
        """Are rungs smaller than all blocks? Not where the budget suffices for all on the first rung."""
        return self.targets[0] < len(self.ends)

    def next(self, standings: Standings, hurry: bool = False) -> Step | None:
        """The next step; None where the global search is over.

        Args:
            standings: all trials of the study.
            hurry: begin no more trials; only finish the best.
        """
        free = [t for t in standings.trials if t.running and not t.busy]
        for trial in free:
            if standings.is_twin(trial):
                return End(trial, TrialState.FAIL)
            if done(trial) == len(self.ends):
                return End(trial, TrialState.COMPLETE)
        origin = standings.origin
        if origin is None:
            return Begin(0, self.rules.identity)
        if origin.running:
            return self._onward(origin)
        if self.rules.max_passes >= 2 and not hurry:
            for rung in range(len(RUNGS)):
                if (step := self._on_rung(rung, standings)) is not None:
                    return step
        return self._finish(standings)

    def _on_rung(self, rung: int, standings: Standings) -> Step | None:
        """Score the best trials of the rung below on this rung, then begin new trials on it."""
        target = self.targets[rung]
        racing = [t for t in standings.trials if t.running]
        if rung and self.targets[rung - 1] < target:
            below = self.targets[rung - 1]
            arrived = [t for t in racing if t.rung < rung and done(t) >= below]
            kept = self._kept(
                sorted(arrived, key=lambda t: standings.rank(t, below)), RUNGS[rung][1], standings
            )
            for trial in arrived:
                if trial not in kept and not trial.busy:
                    return End(trial, TrialState.PRUNED)
        waiting = False
        for trial in racing:
            if trial.rung > rung or done(trial) >= target:
                continue
            hopeless = self._hopeless(trial, standings)
            rest = sum(self.rules.sizes[done(trial) : target])
            if not hopeless and not self._affords(rest, target, standings):
                continue
            if not trial.busy:
                return End(trial, TrialState.PRUNED) if hopeless else self._evaluate(trial, target)
            waiting = True
        return self._begin(rung, standings) or (Wait() if waiting else None)

    def _kept(self, ranked: list[StoredTrial], count: int, standings: Standings) -> list[StoredTrial]:
        """The best trials: the first, and the next that are not close to it and so show a slope."""
        kept = ranked[:1]
        apart = [t for t in ranked[1:] if standings.distance(t.params, kept[0].params) >= _APART]
        return (kept + apart)[:count]

    def _begin(self, rung: int, standings: Standings) -> Begin | None:
        rules, trials = self.rules, standings.trials
        if (
            rules.max_trials is not None
            and sum(t.state != TrialState.FAIL for t in trials) >= rules.max_trials
        ):
            return None
        target = self.targets[rung]
        if not self._affords(int(self.ends[target - 1]), target, standings):
            return None
        tried = [t.params for t in trials]
        if rung == 0 and (given := next((p for p in rules.first if p not in tried), None)) is not None:
            return Begin(rung, given)
        repeated = sum(t.rung == rung and standings.is_twin(t) for t in trials)
        return Begin(rung) if rung == len(RUNGS) - 1 and repeated < _REPEATS else None

    def _finish(self, standings: Standings) -> Step | None:
        """Score the best of the trials with most blocks on all blocks, and prune the others."""
        racing = [t for t in standings.trials if t.running]
        if not racing:
            return None
        furthest = max(map(done, racing))
        best = min(
            (t for t in racing if done(t) == furthest),
            key=lambda t: standings.rank(t, furthest) if furthest else (0.0, 0.0, t.number),
        )
        for trial in racing:
            if trial is not best and not trial.busy:
                return End(trial, TrialState.PRUNED)
        if not best.busy and (
            not furthest or self._hopeless(best, standings) or self._comes_too_late(best, standings)
        ):
            return End(best, TrialState.PRUNED)
        return self._onward(best)

    def _comes_too_late(self, trial: StoredTrial, standings: Standings) -> bool:
        """Has another process finished its best trial, so that the budget no longer allows this one?"""
        home = any(
            t is not standings.origin and t.state == TrialState.COMPLETE and done(t) == len(self.ends)
            for t in standings.trials
        )
        rest = sum(self.rules.sizes[done(trial) :])
        return home and standings.spent + rest > self.rules.max_passes * self.total

    def _hopeless(self, trial: StoredTrial, standings: Standings) -> bool:
        """Is another trial significantly better on the same examples?"""
        blocks = done(trial)
        rivals = [
            t for t in standings.trials if t is not trial and t.state != TrialState.FAIL and done(t) >= blocks
        ]
        if not blocks or not rivals or not self.racing:
            return False
        rival = min(rivals, key=lambda t: standings.rank(t, blocks))
        difference = standings.difference(trial, rival)
        if difference.units < _FEWEST:
            return False
        from scipy.stats import t as student  # slow to import

        bound = student.isf(_LEVEL / len(self.ends), difference.units - 1) * difference.stderr
        return bool(standings.sign * difference.value > bound)

    def _affords(self, cost: int, target: int, standings: Standings) -> bool:
        """Does the budget allow this cost, and after it the remaining blocks of the best trial?"""
        reserve = self.total - int(self.ends[target - 1])
        return standings.spent + cost + reserve <= self.rules.max_passes * self.total

    def _onward(self, trial: StoredTrial) -> Step:
        return Wait() if trial.busy else self._evaluate(trial, len(self.ends))

    def _evaluate(self, trial: StoredTrial, target: int) -> Evaluate:
        """Evaluate the next blocks of a trial that has not reached the target."""
        first = done(trial)
        before = int(self.ends[first - 1]) if first else 0
        enough = int(np.searchsorted(self.ends, before + _BATCH)) + 1
        return Evaluate(trial, range(first, min(target, enough)))

    def _blocks_with(self, examples: float) -> int:
        """The number of leading blocks that have ``examples`` examples; all blocks if there are fewer."""
        return min(len(self.ends), int(np.searchsorted(self.ends, examples - 0.5)) + 1)
