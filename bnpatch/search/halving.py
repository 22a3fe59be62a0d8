"""What a global search does next: a function of what its trials have scored so far, and of nothing else.

So a global search that was killed goes on as if it had not been, and processes that share a study share the
work.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from bnpatch.search.standings import Rules, Standings, done
from bnpatch.search.studies import StoredTrial

#: Rungs of a global search: the part of the exploration's budget that one trial on it takes, and how many
#: come up from the rung below. Given points begin on the first, what the sampler proposes on the last.
RUNGS: tuple[tuple[float, int], ...] = ((1 / 16, 0), (1 / 4, 2))
# Fewer examples than these don't tell where the good region is.
_LEAST = 24
# A trial is dropped where another is better at this level, shared among the looks.
_LEVEL = 0.05
# Fewer differences say nothing about their spread.
_FEWEST = 8
# With fewer examples in a batch most of the time goes into everything but the examples.
_BATCH = 64
# How far apart trials must lie to show a slope, as part of the range.
_APART = 0.02
# A sampler that proposes what was tried before, so often, has found what it can on a rung.
_REPEATS = 2


@dataclass(frozen=True)
class Evaluate:
    """Score the next blocks of a trial: as many as make a batch that is worth its while."""

    trial: StoredTrial
    blocks: range


@dataclass(frozen=True)
class Begin:
    """Begin a trial: with these parameters, or with what the sampler proposes."""

    rung: int
    params: Mapping[str, float] | None = None


@dataclass(frozen=True)
class End:
    """End a trial, as complete, or as dropped."""

    trial: StoredTrial
    state: TrialState


@dataclass(frozen=True)
class Wait:
    """Nothing can be done before another process has finished what it is at."""


Step = Evaluate | Begin | End | Wait


class Schedule:
    """The rungs of a global search, and who is on them."""

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
        """Are trials cut short? Not where the budget takes all blocks on the first rung."""
        return self.targets[0] < len(self.ends)

    def next(self, standings: Standings, hurry: bool = False) -> Step | None:
        """What to do now; None where the global search is over.

        Args:
            standings: all trials of the study.
            hurry: begin nothing more; only finish the best.
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
        """Bring the best of the rung below up to this one, then let others begin here."""
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
        """The best, and the next best that lie apart from it: close by they would not show a slope."""
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
        """Run the best of those that came furthest on all blocks, and end the others."""
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
        """Did another process bring its best home meanwhile, on the budget that this one would need?"""
        home = any(
            t is not standings.origin and t.state == TrialState.COMPLETE and done(t) == len(self.ends)
            for t in standings.trials
        )
        rest = sum(self.rules.sizes[done(trial) :])
        return home and standings.spent + rest > self.rules.max_passes * self.total

    def _hopeless(self, trial: StoredTrial, standings: Standings) -> bool:
        """Is another trial better on the same examples, beyond doubt?"""
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
        """Is there budget for this, and for what the winner then still needs?"""
        reserve = self.total - int(self.ends[target - 1])
        return standings.spent + cost + reserve <= self.rules.max_passes * self.total

    def _onward(self, trial: StoredTrial) -> Step:
        return Wait() if trial.busy else self._evaluate(trial, len(self.ends))

    def _evaluate(self, trial: StoredTrial, target: int) -> Evaluate:
        """The next blocks of a trial that has some to go to the target."""
        first = done(trial)
        before = int(self.ends[first - 1]) if first else 0
        enough = int(np.searchsorted(self.ends, before + _BATCH)) + 1
        return Evaluate(trial, range(first, min(target, enough)))

    def _blocks_with(self, examples: float) -> int:
        """How many leading blocks have that many examples; all where there are fewer."""
        return min(len(self.ends), int(np.searchsorted(self.ends, examples - 0.5)) + 1)
