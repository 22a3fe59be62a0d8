"""A global search of parameters over blocks of examples, in which little is spent on what is bad.

The identity runs on all blocks first: it is what everything is compared with. Then trials climb a list of
candidates. On
the first rung given points are scored on a few blocks, which is enough to find the region. The best, and the
next best that lies apart from it, go on to the second rung, four times as many blocks; there a Gaussian
process proposes further points, as many as the budget takes. The best of this rung runs on all blocks, and
wins if it is better than the identity on all of them.

Whatever is compared is compared on the same examples, with the identity's scores as a control variate, and a
trial ends early as soon as another is better beyond doubt (Student's test of the paired differences, its
level shared among all looks).

The Gaussian process is Optuna's. It learns from trials that ended early, too: each is told at the score that
it would have on all blocks if it differed there from the leader as much as on the blocks that both have.
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

# How long to wait before looking again at what another process does.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Runner:
    """A trial of a global search.

    Attributes:
        number: in the order in which trials began; 0 is the identity.
        params: by name of parameter.
        blocks: how many leading blocks it was scored on.
        state: COMPLETE (all blocks), PRUNED (it ended early), FAIL (no finite outputs), or RUNNING where the
            global search was interrupted.
        means: over the examples of these blocks, by name of metric.
        changes: from the identity, as they would be on all examples, with standard errors, by name of metric.
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
        identity: what all are compared with.
        best: the best of those that were scored on all blocks.
        passes: examples scored over examples there are, by whatever process, in all runs of this study.
        interrupted: the user stopped the global search early.
    """

    runners: list[Runner]
    identity: Runner
    best: Runner
    passes: float
    interrupted: bool


def block_sizes(examples: int, most: int = 32, smallest: int = 8) -> list[int]:
    """Sizes of nearly equal blocks that suit a global search over so many examples."""
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

    What the study has already is not scored again: run it with the same arguments to go on after an
    interruption, or in several processes at once to share the work. With more than 18 passes every trial is
    scored on all blocks, as in a plain search, which ``max_trials`` bounds.

    Args:
        study: where the trials are kept; its direction is that of the metric.
        evaluate_blocks: from parameters and numbers of blocks to the scores of the examples of each, by name
            of metric, the same examples in the same order whatever the parameters; or to one score for a
            block as a whole.
        sizes: examples in each block; the blocks should look alike, as random parts do.
        metric: what to global search for. The other metrics that ``evaluate_blocks`` returns are kept beside
        it.
        space: lowest and highest value by name of parameter.
        identity: the parameters that change nothing; among equals what is nearest to them is best.
        first: points that are tried before the sampler has anything to go by.
        max_passes: budget of the whole study, in passes over all blocks. Below 2 only the identity is scored.
        max_trials: budget of the whole study in trials, the identity included.
        timeout: seconds after which nothing more is begun; the best so far still runs on all blocks.
        seed: of the sampler.
        on_trial: called when a trial ended, with how the global search stands.

    Raises:
        OutputsNotFiniteError: from ``evaluate_blocks``, for the identity.
        KeyboardInterrupt: before the identity was scored on all blocks; later it ends the global search in
        peace.
        BnpatchError: nothing bounds the global search, or the tuned metric is not a finite number.
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
    """Score some blocks; a trial without finite outputs fails."""
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
    """Ask a Gaussian process, which is told what each trial would score on all blocks.

    The process is made anew each time, seeded by how many trials there are, so that what it proposes follows
    from the trials alone.
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
