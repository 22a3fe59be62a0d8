"""Successive halving: the next step of a global search, as a function of its trials and their scores alone.

Trials are scored in rounds, each of which has more examples than the one before; the best trials of a round
are promoted to the next, and the others pruned. Because nothing else decides what comes next, a search that
was killed continues as if it had not been, and processes can share a study.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials

#: For each round: the fraction of the exploration budget that one trial may take, and how many trials are
#: promoted to it from the round before. Given points begin in the first round, and proposals in the last.
ROUNDS: tuple[tuple[float, int], ...] = ((1 / 16, 0), (1 / 4, 2))
# A round has at least this many examples, or a quarter of all: fewer don't show where the good region is.
_FEWEST_EXAMPLES = 24
# Blocks are scored together up to this many examples, because smaller batches are inefficient.
_BATCH = 64
# Trials that are promoted must be at least this far apart, as a fraction of the range, to show a slope.
_APART = 0.02
# No more trials are proposed once the sampler has repeated earlier points this often.
_REPEATS = 2


@dataclass(frozen=True)
class Evaluate:
    """Score the next blocks of a trial, as many as make an efficient batch."""

    trial: StoredTrial
    blocks: range


@dataclass(frozen=True)
class Begin:
    """Begin a trial with these parameters; with a proposal of the sampler if None."""

    round: int
    params: Mapping[str, float] | None = None


@dataclass(frozen=True)
class End:
    """End a trial as complete or pruned, or as failed where it repeats another."""

    trial: StoredTrial
    state: TrialState


@dataclass(frozen=True)
class Wait:
    """Wait for another process, whose scores are needed to decide the next step."""


Step = Evaluate | Begin | End | Wait


class SuccessiveHalving:
    """Decides the next step of a global search."""

    def __init__(self, config: GlobalSearchConfig) -> None:
        self.config = config
        self._ends = np.cumsum(config.sizes)  # number of examples in the leading blocks
        self._total = int(self._ends[-1])
        exploration = max(0.0, config.max_passes - 2) * self._total
        fewest = min(_FEWEST_EXAMPLES, self._total / 4)
        self._round_blocks = [self._blocks_with(max(share * exploration, fewest)) for share, _ in ROUNDS]

    def next_step(self, trials: Trials, finish: bool = False) -> Step | None:
        """Return the next step; None where the global search is over.

        Args:
            trials: all trials of the study.
            finish: begin no more trials; only score the best on all blocks.
        """
        for trial in trials.running:
            if trial.is_own and trials.is_repeated(trial):
                return End(trial, TrialState.FAIL)
            if trial.is_own and trial.num_blocks == len(self._ends):
                return End(trial, TrialState.COMPLETE)
        start = trials.start
        if start is None:
            return Begin(0, self.config.start)
        if start.is_running:
            return self._evaluate(start, len(self._ends))
        if self.config.max_passes >= 2 and not finish:
            for round_ in range(len(ROUNDS)):
                step = self._promote(round_, trials) or self._in_round(round_, trials)
                if step is not None:
                    return step
        return self._last_round(trials)

    def _promote(self, round_: int, trials: Trials) -> End | None:
        """Prune a trial that was scored in the round before and is not among the best there."""
        if round_ == 0 or self._round_blocks[round_ - 1] == self._round_blocks[round_]:
            return None
        before = self._round_blocks[round_ - 1]
        scored = [t for t in trials.running if t.round < round_ and t.num_blocks >= before]
        ranked = sorted(scored, key=lambda t: trials.rank(t, before))
        # The best, and the next that are not close to it and so show a slope.
        apart = [t for t in ranked[1:] if self.config.distance(t.params, ranked[0].params) >= _APART]
        promoted = [*ranked[:1], *apart][: ROUNDS[round_][1]]
        return next((End(t, TrialState.PRUNED) for t in scored if t.is_own and t not in promoted), None)

    def _in_round(self, round_: int, trials: Trials) -> Step | None:
        """Score the trials of a round, and prune those that are significantly worse; then begin new ones."""
        blocks, others_run = self._round_blocks[round_], False
        for trial in trials.running:
            if trial.round > round_ or trial.num_blocks >= blocks:
                continue
            is_worse = self._is_worse(trial, trials)
            cost = sum(self.config.sizes[trial.num_blocks : blocks])
            if not is_worse and not self._affords(cost, blocks, trials):
                continue
            if trial.is_own:
                return End(trial, TrialState.PRUNED) if is_worse else self._evaluate(trial, blocks)
            others_run = True
        return self._begin(round_, trials) or (Wait() if others_run else None)

    def _begin(self, round_: int, trials: Trials) -> Begin | None:
        """Begin a trial in a round, as far as the budget allows: a given point, or a proposal."""
        config, blocks = self.config, self._round_blocks[round_]
        begun = sum(t.state != TrialState.FAIL for t in trials.trials)
        if config.max_trials is not None and begun >= config.max_trials:
            return None
        if not self._affords(int(self._ends[blocks - 1]), blocks, trials):
            return None
        if round_ == 0:
            tried = [t.params for t in trials.trials]
            given = next((params for params in config.first if params not in tried), None)
            if given is not None:
                return Begin(round_, given)
        repeated = sum(t.round == round_ and trials.is_repeated(t) for t in trials.trials)
        return Begin(round_) if round_ == len(ROUNDS) - 1 and repeated < _REPEATS else None

    def _last_round(self, trials: Trials) -> Step | None:
        """Score the best of the trials with most blocks on all blocks, and prune the others."""
        running = trials.running
        if not running:
            return None
        most = max(t.num_blocks for t in running)
        furthest = [t for t in running if t.num_blocks == most]
        best = min(furthest, key=lambda t: trials.rank(t, most)) if most else furthest[0]
        lost = next((t for t in running if t.is_own and t is not best), None)
        if lost is not None:
            return End(lost, TrialState.PRUNED)
        is_lost = not most or self._is_worse(best, trials) or self._is_beyond_budget(best, trials)
        return (
            End(best, TrialState.PRUNED) if best.is_own and is_lost else self._evaluate(best, len(self._ends))
        )

    def _is_beyond_budget(self, trial: StoredTrial, trials: Trials) -> bool:
        """Tell whether another process has already spent the budget for this trial on its own best one."""
        others = [t for t in trials.trials if t.state == TrialState.COMPLETE and t is not trials.start]
        rest = sum(self.config.sizes[trial.num_blocks :])
        return bool(others) and trials.spent + rest > self.config.max_passes * self._total

    def _is_worse(self, trial: StoredTrial, trials: Trials) -> bool:
        """Tell whether a trial is significantly worse than another; never if the budget is for all blocks."""
        return self._round_blocks[0] < len(self._ends) and trials.is_significantly_worse(trial)

    def _affords(self, cost: int, blocks: int, trials: Trials) -> bool:
        """Tell whether the budget allows this cost, and after it the other blocks of the best trial."""
        reserve = self._total - int(self._ends[blocks - 1])
        return trials.spent + cost + reserve <= self.config.max_passes * self._total

    def _evaluate(self, trial: StoredTrial, blocks: int) -> Evaluate | Wait:
        """Score the next of the leading ``blocks`` of a trial; wait if another process does that."""
        if not trial.is_own:
            return Wait()
        first = trial.num_blocks
        before = int(self._ends[first - 1]) if first else 0
        enough = int(np.searchsorted(self._ends, before + _BATCH)) + 1
        return Evaluate(trial, range(first, min(blocks, enough)))

    def _blocks_with(self, examples: float) -> int:
        """Return the number of leading blocks that have ``examples`` examples, or all if there are fewer."""
        return min(len(self._ends), int(np.searchsorted(self._ends, examples - 0.5)) + 1)
