"""A global search for parameters by successive halving over blocks of examples, with a Gaussian process.

The parameters to start from are scored on all blocks first, because all others are compared with them. Then
trials are scored in rounds. In the first round given points are scored on a few blocks, which is enough to
find the good region. The best point, and the next best that is not close to it, are promoted to the second
round, which has four times as many blocks. There a Gaussian process proposes further points until the budget
is spent. The best trial of this round is scored on all blocks, and is the result if it beats the start there.

Trials are always compared on the same examples, with the scores of the start as a control variate. A trial is
pruned as soon as another is significantly better.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.evaluation.metrics import Values
from bnpatch.search.halving import Begin, End, Evaluate, SuccessiveHalving, Wait
from bnpatch.search.storages import quiet
from bnpatch.search.studies import Study, as_stored
from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials

EvaluateBlocks = Callable[[Mapping[str, float], range], Sequence[Mapping[str, Values]]]
OnTrial = Callable[[StoredTrial, Trials], None]

# Seconds between two looks at the trials of another process.
_POLL_SECONDS = 0.2


def global_search(
    study: Study,
    evaluate_blocks: EvaluateBlocks,
    config: GlobalSearchConfig,
    *,
    timeout: float | None = None,
    on_trial: OnTrial = lambda trial, so_far: None,
) -> Trials:
    """Find the parameters that score best, in few passes over the examples.

    Scores that the study already has are not computed again: call this with the same arguments to continue
    after an interruption, or in several processes at once to share the work. With more than 18 passes every
    trial is scored on all blocks, without halving, and ``max_trials`` should limit the search.

    Args:
        study: where the trials are kept; its direction is that of the metric.
        evaluate_blocks: takes parameters and numbers of blocks. It returns, for each block by name of metric,
            the scores of its examples, which are the same in the same order whatever the parameters; or one
            score for the block as a whole.
        config: what to look for, and the budget.
        timeout: seconds after which no trial is started; the best so far is still scored on all blocks.
        on_trial: called with each trial that ended, and with all trials so far.

    Returns:
        The trials of the study; the best of them is the result.

    Raises:
        OutputsNotFiniteError: ``evaluate_blocks`` raised it for the start.
        KeyboardInterrupt: the user interrupted before the start was scored on all blocks; after that, an
            interrupt ends the search, and the result so far is returned.
        BnpatchError: nothing limits the global search, or the tuned metric is not a finite number.
    """
    if config.max_trials is None and not np.isfinite(config.max_passes):
        raise BnpatchError("nothing bounds the search", "set --trials, or a finite --max-passes")
    try:
        with study.at_work():
            _search(study, evaluate_blocks, config, timeout, on_trial)
    except KeyboardInterrupt:  # the user wants the best so far
        start = Trials(config, study.trials()).start
        if start is None or start.num_blocks < len(config.sizes):
            raise
        return Trials(config, study.trials(), interrupted=True)
    return Trials(config, study.trials())


def _search(
    study: Study,
    evaluate_blocks: EvaluateBlocks,
    config: GlobalSearchConfig,
    timeout: float | None,
    on_trial: OnTrial,
) -> None:
    """Take one step after the other until the search is over."""
    halving, started = SuccessiveHalving(config), time.monotonic()
    while True:
        trials = Trials(config, study.trials())
        if any(not trial.is_own for trial in trials.running):
            study.take_over()
            trials = Trials(config, study.trials())
        is_late = timeout is not None and time.monotonic() - started >= timeout
        match halving.next_step(trials, finish=is_late):
            case None:
                return
            case Wait():
                time.sleep(_POLL_SECONDS)
            case Begin(round, params):
                study.begin(params or _propose(trials), config.space, round)
            case Evaluate(trial, blocks):
                _score(study, trials, trial, blocks, evaluate_blocks)
            case End(trial, state):
                _end(study, trials, trial, state)
                if trial.blocks:
                    trials = Trials(config, study.trials())
                    on_trial(next(t for t in trials.trials if t.stored == trial.stored), trials)


def _score(
    study: Study, trials: Trials, trial: StoredTrial, blocks: range, evaluate_blocks: EvaluateBlocks
) -> None:
    """Score some blocks of a trial; the trial fails if outputs are not finite."""
    config, tuned = trials.config, trials.config.metric.name
    try:
        scored = evaluate_blocks(trial.params, blocks)
    except OutputsNotFiniteError:
        if trial.params == config.start:
            raise  # the model itself is broken, not these parameters
        study.fail(trial, "outputs are not finite")
        return
    if not all(np.isfinite(scores[tuned]).all() for scores in scored):
        raise BnpatchError(f"{tuned} is not a finite number", "look at the metric and the data")
    rounded = [{name: as_stored(values) for name, values in scores.items()} for scores in scored]
    trial = replace(trial, blocks={**trial.blocks, **dict(zip(blocks, rounded, strict=True))})
    study.record(trial, sum(config.sizes[: trial.num_blocks]), trials.mean(trial))


def _end(study: Study, trials: Trials, trial: StoredTrial, state: TrialState) -> None:
    """End a trial, with the means of its metrics."""
    if state == TrialState.FAIL:
        study.fail(trial, "repeats an earlier trial")
    elif not trial.blocks:
        study.fail(trial)  # the search was over before anything was scored
    else:
        means = {name: trials.mean(trial, name) for name in trial.blocks[0]}
        value = means.pop(trials.config.metric.name)
        study.end(trial, state, value if state == TrialState.COMPLETE else None, means)


def _propose(trials: Trials) -> dict[str, float]:
    """Ask Optuna's Gaussian process for a point.

    Not the study itself is asked, for two reasons. The process also learns from trials that were pruned, by
    scores that are extrapolated with all examples that the trials share; the study has their means over
    different examples. And a sampler that is made anew, with a seed that depends on the number of trials,
    proposes what depends on the trials alone, whichever process asks.
    """
    config = trials.config
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high) for name, (low, high) in config.scaled_space().items()
    }
    with quiet():
        told = optuna.create_study(
            direction="maximize" if config.metric.higher_is_better else "minimize",
            sampler=optuna.samplers.GPSampler(seed=config.seed + len(trials.trials), n_startup_trials=1),
        )
        scores = trials.extrapolated()
        for trial in trials.trials:
            params = config.scaled(trial.params)
            if trial.number in scores:
                value = scores[trial.number]
                told.add_trial(create_trial(params=params, distributions=space, value=value))
            elif trial.is_running:
                state = TrialState.RUNNING
                told.add_trial(create_trial(state=state, params=params, distributions=space))
        return config.unscaled(told.ask(space).params)
