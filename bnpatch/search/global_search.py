"""A global search for parameters by successive halving over blocks of examples, with a Gaussian process.

The identity is scored on all blocks first, because everything is compared with it. Then successive halving
scores trials on its rungs. On the first rung given points are scored on a few blocks, which is enough to find
the good region. The best point, and the next best that is not close to it, go on to the second rung, which
has four times as many blocks. There a Gaussian process proposes further points until the budget is spent. The
best trial of this rung is scored on all blocks, and is the result if it beats the identity there.

Trials are always compared on the same examples, with the identity's scores as a control variate. A trial ends
early as soon as another is significantly better (Student's t-test of the paired differences, with the level
divided by the number of tests).

The Gaussian process is Optuna's. It also learns from trials that ended early, by extrapolated scores: on all
blocks, a trial is assumed to differ from the leader as much as on the blocks that both have.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.evaluation.metrics import Metric, Values
from bnpatch.search.halving import Begin, End, Evaluate, Schedule, Wait
from bnpatch.search.standings import Difference, Rules, Standings, done
from bnpatch.search.storages import quiet
from bnpatch.search.studies import StoredTrial, Study, as_stored

EvaluateBlocks = Callable[[Mapping[str, float], range], Sequence[Mapping[str, Values]]]

# Seconds between two looks at the trials of another process.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Runner:
    """A trial of a global search.

    Attributes:
        number: number in the order in which trials began; 0 is the identity.
        params: values by name of parameter.
        blocks: number of leading blocks that the trial was scored on.
        state: COMPLETE (all blocks), PRUNED (it ended early), FAIL (no finite outputs), or RUNNING where the
            global search was interrupted.
        means: means over the examples of these blocks, by name of metric.
        changes: changes from the identity, extrapolated to all examples, by name of metric.
    """

    number: int
    params: Mapping[str, float]
    blocks: int
    state: TrialState
    means: Mapping[str, float]
    changes: Mapping[str, Difference]


@dataclass(frozen=True)
class GlobalSearchResult:
    """What a global search found.

    Attributes:
        runners: all trials, the identity first.
        identity: the trial that all others are compared with.
        best: the best of the trials that were scored on all blocks.
        passes: passes over the examples, of all processes and all runs of this study.
        interrupted: whether the user stopped the global search early.
    """

    runners: list[Runner]
    identity: Runner
    best: Runner
    passes: float
    interrupted: bool


def block_sizes(examples: int, most: int = 32, smallest: int = 8) -> list[int]:
    """Sizes of nearly equal blocks that suit a global search over ``examples`` examples."""
    count = max(1, min(most, examples // smallest))
    return [len(part) for part in np.array_split(np.arange(examples), count)]


def global_search(
    study: Study,
    evaluate_blocks: EvaluateBlocks,
    sizes: Sequence[int],
    *,
    metric: Metric,
    space: Mapping[str, tuple[float, float]],
    identity: Mapping[str, float],
    first: Sequence[Mapping[str, float]] = (),
    max_passes: float = 3.0,
    max_trials: int | None = None,
    timeout: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Runner, GlobalSearchResult], None] = lambda runner, standing: None,
) -> GlobalSearchResult:
    """Find the parameters that score best, in few passes over the examples.

    Scores that the study already has are not computed again: call this with the same arguments to continue
    after an interruption, or in several processes at once to share the work. With more than 18 passes every
    trial is scored on all blocks, without halving, and ``max_trials`` should limit the search.

    Args:
        study: where the trials are kept; its direction is that of the metric.
        evaluate_blocks: takes parameters and numbers of blocks. It returns, for each block by name of metric,
            the scores of its examples, which are the same in the same order whatever the parameters; or one
            score for the block as a whole.
        sizes: number of examples in each block; the blocks should be similar, as random parts are.
        metric: the metric to tune. Other metrics that ``evaluate_blocks`` returns are stored, too.
        space: lowest and highest value by name of parameter.
        identity: the parameters that change nothing; of equally good points the nearest to them is the best.
        first: points to try before the sampler proposes any.
        max_passes: budget of the whole study, in passes over all blocks. Below 2 only the identity is scored.
        max_trials: budget of the whole study in trials, the identity included.
        timeout: seconds after which no trial is started; the best so far is still scored on all blocks.
        seed: seed of the sampler.
        on_trial: called with each trial that ended, and with the result so far.

    Raises:
        OutputsNotFiniteError: ``evaluate_blocks`` raised it for the identity.
        KeyboardInterrupt: the user interrupted before the identity was scored on all blocks; after that, an
            interrupt ends the search, and the result so far is returned.
        BnpatchError: nothing limits the global search, or the tuned metric is not a finite number.
    """
    if max_trials is None and not np.isfinite(max_passes):
        raise BnpatchError("nothing bounds the search", "bound its passes or its trials")
    rules = Rules(sizes, metric, space, identity, first, max_passes, max_trials)
    schedule = Schedule(rules)
    started = time.monotonic()
    interrupted = False
    try:
        while True:
            standings = Standings(rules, study.trials())
            hurry = timeout is not None and time.monotonic() - started >= timeout
            match schedule.next(standings, hurry):
                case None:
                    break
                case Wait():
                    time.sleep(_POLL_SECONDS)
                case Begin(rung, params):
                    study.add(params or _propose(standings, seed), space, rung)
                case Evaluate(trial, blocks):
                    study.claim(trial)
                    _score(study, standings, trial, blocks, evaluate_blocks)
                case End(trial, state):
                    _end(study, standings, trial, state)
                    if done(trial):
                        result = _result(Standings(rules, study.trials()), interrupted)
                        on_trial(next(r for r in result.runners if r.number == trial.number), result)
    except KeyboardInterrupt:
        origin = Standings(rules, study.trials()).origin
        if origin is None or done(origin) < len(sizes):
            raise
        interrupted = True
    finally:
        study.release()
    return _result(Standings(rules, study.trials()), interrupted)


def _score(
    study: Study, standings: Standings, trial: StoredTrial, blocks: range, evaluate_blocks: EvaluateBlocks
) -> None:
    """Score some blocks of a trial; the trial fails if outputs are not finite."""
    metric = standings.rules.metric.name
    try:
        scored = evaluate_blocks(trial.params, blocks)
    except OutputsNotFiniteError:
        study.finish(trial.number, TrialState.FAIL)
        if trial.params == standings.rules.identity:
            raise  # the model itself is broken, not these parameters
        return
    for block, scores in zip(blocks, scored, strict=True):
        if not np.isfinite(scores[metric]).all():
            study.finish(trial.number, TrialState.FAIL)
            raise BnpatchError(f"{metric} is not a finite number", "look at the metric and the data")
        rounded = {name: as_stored(values) for name, values in scores.items()}
        trial = replace(trial, blocks={**trial.blocks, block: rounded})
        study.record(trial.number, block, rounded, standings.mean(trial))


def _end(study: Study, standings: Standings, trial: StoredTrial, state: TrialState) -> None:
    if not done(trial):  # it was never scored: another process began the same, or the global search is over
        study.finish(trial.number, TrialState.FAIL)
        return
    means = {name: standings.mean(trial, name) for name in trial.blocks[0]}
    study.finish(trial.number, state, means[standings.rules.metric.name], means)


def _propose(standings: Standings, seed: int) -> dict[str, float]:
    """Ask a Gaussian process for a point, after telling it the extrapolated score of each trial.

    The process is made anew each time, with a seed that depends on the number of trials, so that its proposal
    depends on the trials alone.
    """
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high) for name, (low, high) in standings.rules.space.items()
    }
    with quiet():
        told = optuna.create_study(
            direction="maximize" if standings.rules.metric.higher_is_better else "minimize",
            sampler=optuna.samplers.GPSampler(seed=seed + len(standings.trials), n_startup_trials=1),
        )
        scores = standings.extrapolated()
        for trial in standings.trials:
            params = dict(trial.params)
            if trial.number in scores:
                value = scores[trial.number]
                told.add_trial(create_trial(params=params, distributions=space, value=value))
            elif trial.running:
                state = TrialState.RUNNING
                told.add_trial(create_trial(state=state, params=params, distributions=space))
        return told.ask(space).params


def _result(standings: Standings, interrupted: bool) -> GlobalSearchResult:
    origin = standings.origin
    assert origin is not None
    blocks = len(standings.rules.sizes)
    runners = {t.number: _runner(standings, t) for t in standings.trials}
    whole = [t for t in standings.trials if t.state == TrialState.COMPLETE and done(t) == blocks]
    best = min(whole or [origin], key=lambda t: standings.rank(t, done(t)))
    passes = standings.spent / sum(standings.rules.sizes)
    return GlobalSearchResult(
        list(runners.values()), runners[origin.number], runners[best.number], passes, interrupted
    )


def _runner(standings: Standings, trial: StoredTrial) -> Runner:
    names = list(trial.blocks.get(0, ()))
    return Runner(
        trial.number,
        trial.params,
        done(trial),
        trial.state,
        {name: standings.mean(trial, name) for name in names},
        {name: standings.change(trial, metric=name) for name in names},
    )
