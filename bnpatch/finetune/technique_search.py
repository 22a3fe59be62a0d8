"""Choose the techniques to train with by short runs, as Optuna proposes them."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.text import counted
from bnpatch.data.dataset import Examples, split
from bnpatch.evaluation.metrics import METRICS
from bnpatch.finetune.checkpoint import Epoch, difference
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.techniques import CHANNELS_PER_GROUP, Choice, by_guidance, decayed_norms, ghost_of
from bnpatch.finetune.trainer import NotFiniteLossError, train
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.distributed import Processes, start
from bnpatch.search.storages import connect, quiet, usable

_HOLDOUT = 0.2  # fraction of the training examples that scores the runs
_DECAYS = (1e-5, 1e-2)  # range of the search; extended to include the rate of the guidance
_SEARCH, _DIVERGED = "bnpatch:search", "bnpatch:diverged"  # names of user attributes


def by_search(
    model: TorchModel,
    examples: Examples,
    settings: FineTuneSettings,
    *,
    trials: int = 12,
    epochs: int = 3,
    database: Path | None = None,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> Choice:
    """Train short runs with various techniques, and choose those of the best run.

    The first run uses plain Batch Norm, the second follows the guidance, and Optuna proposes the others. A
    run is pruned if after some epoch it is worse than the median of the runs before it.

    Args:
        model: the model, which is not changed.
        examples: training examples; a part of them, stratified by class, is held out to score the runs.
        settings: settings of the runs, except for the techniques and the number of epochs.
        trials: number of runs.
        epochs: number of epochs of each run.
        database: SQLite file that keeps the runs as an Optuna study, so that a search that was killed can
            continue; None for memory.
        resume: whether to continue from the database, if it exists; otherwise the search starts again.
        callbacks: functions to call meanwhile; ``tell`` gets the techniques and the score of each run.

    Raises:
        BnpatchError: no run ended with a finite loss, or the database is of another search.
    """
    processes, metric = start(), METRICS[settings.metric]
    search = _Search(model, examples, settings, epochs, callbacks or Callbacks())
    with quiet():
        fingerprint = search.fingerprint(1 if processes is None else processes.count)
        study = _opened(database, resume, fingerprint, metric.higher_is_better, processes)
        while (number := sum(map(_ended, study.trials))) < trials:
            # The techniques of a run depend on the ended runs alone, so that a run that was interrupted is
            # repeated with the same techniques.
            if number < len(search.first) and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(search.first[number])
            study.sampler = optuna.samplers.TPESampler(seed=settings.seed + number, n_startup_trials=4)
            study.optimize(search.score, 1, catch=(NotFiniteLossError,), callbacks=[search.tell])
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise BnpatchError("every run diverged", "lower --lr")
    best = search.choice(study.best_params)
    of = f"best of {counted(trials, 'run')} of {counted(epochs, 'epoch')}"
    reason = f"{of}, {settings.metric} {metric.format(study.best_value)}"
    return replace(best, reasons=(f"{_describe(best)}: {reason}",))


class _Search:
    """What the runs of a search have in common, and what the parameters of a trial mean.

    Attributes:
        first: parameters of the first runs.
    """

    def __init__(
        self,
        model: TorchModel,
        examples: Examples,
        settings: FineTuneSettings,
        epochs: int,
        callbacks: Callbacks,
    ) -> None:
        self._model, self._settings, self._epochs, self._callbacks = model, settings, epochs, callbacks
        subset, selection = split(examples.strata, _HOLDOUT, settings.seed, examples.groups)
        self._examples = RunExamples(examples, examples, subset, selection)
        self._specs, self._norm_layers = _specs(settings.batch_size), decayed_norms(model)
        guided = by_guidance(model, settings)
        rate = guided.norm_decay.rate if guided.norm_decay else None
        rates = (*_DECAYS, rate or _DECAYS[0])
        self._lowest_rate, self._highest_rate = min(rates), max(rates)
        self.first = (
            {"norm": str(NormSpec.batch()), "decays": False},
            {"norm": str(guided.spec), "decays": rate is not None, "decay": rate},
        )

    def fingerprint(self, num_processes: int) -> dict[str, Any]:
        """Return all that scores depend on, with the number of workers, each of which has its own seed."""
        return {
            "model": self._model.fingerprints(),
            "data": self._examples.train.fingerprint(),
            "settings": self._settings.to_json(),
            "epochs": self._epochs,
            "holdout": _HOLDOUT,
            "processes": num_processes,  # each has its own batch
        }

    def choice(self, params: Mapping[str, Any]) -> Choice:
        """Return the techniques that the parameters of a trial stand for."""
        rate = params["decay"] if params.get("decays") else 0.0
        decay = NormDecay(rate, norm_layers=self._norm_layers) if rate else None
        return Choice(self._specs[params["norm"]], decay, ())

    def score(self, trial: optuna.Trial) -> float:
        """Train a copy of the model with the techniques of a trial, and return its best score.

        Raises:
            TrialPruned: the run is worse than the median after some epoch.
            NotFiniteLossError: the run diverged; the trial remembers it.
        """
        trial.suggest_categorical("norm", list(self._specs))
        if self._norm_layers and trial.suggest_categorical("decays", [False, True]):
            trial.suggest_float("decay", self._lowest_rate, self._highest_rate, log=True)
        settings = self.choice(trial.params).settings(self._settings)
        settings = replace(settings, epochs=self._epochs, patience=None)

        def on_epoch(epoch: Epoch) -> None:
            trial.report(epoch.score(settings.metric), epoch.epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        copied = replace(self._model, module=copy.deepcopy(self._model.module))
        try:
            callbacks = Callbacks(progress=self._callbacks.progress, on_epoch=on_epoch)
            result = train(copied, self._examples, settings, callbacks=callbacks)
        except NotFiniteLossError:
            trial.set_user_attr(_DIVERGED, True)  # to tell it from a run that was interrupted
            raise
        return result.best.score(settings.metric)

    def tell(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Tell the user how a run ended."""
        is_complete = trial.state == TrialState.COMPLETE  # a pruned one has a value too
        end = f"{trial.value:.4f}" if is_complete else "given up"
        self._callbacks.tell(f"tried          {_describe(self.choice(trial.params))}: {end}")


def _opened(
    database: Path | None,
    resume: bool,
    search: Mapping[str, Any],
    higher_is_better: bool,
    processes: Processes | None,
) -> optuna.Study:
    """Open the study of a search; the first of several processes stores it, the others have copies."""
    if processes is None:
        return _stored(database, resume, search, higher_is_better)
    if processes.rank == 0:
        try:
            study = _stored(database, resume, search, higher_is_better)
        except BnpatchError as error:
            processes.tell(error)  # the others wait for a message
            raise
        processes.tell(study.trials)
        return study
    told = processes.tell(None)
    if isinstance(told, BnpatchError):
        raise told
    study = _stored(None, resume, search, higher_is_better)
    study.add_trials(told)
    return study


def _stored(
    database: Path | None, resume: bool, search: Mapping[str, Any], higher_is_better: bool
) -> optuna.Study:
    """Open the study of a search in its database."""
    storage = None if database is None else f"sqlite:///{database}"
    with usable(storage or "memory"):
        if database is not None and not resume:
            database.unlink(missing_ok=True)
        study = optuna.create_study(
            storage=None if storage is None else connect(storage),
            study_name="choose",
            direction="maximize" if higher_is_better else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
            load_if_exists=True,
        )
        wanted = json.loads(json.dumps(search))
        if study.trials and (key := difference(study.user_attrs.get(_SEARCH), wanted)) is not None:
            raise BnpatchError(
                f"{database} is of another search: {key} differs",
                "repeat the command as it was, or leave out --resume",
            )
        study.set_user_attr(_SEARCH, wanted)
        for trial in study.trials:
            if trial.state == TrialState.RUNNING:  # in a process that was killed
                study.tell(trial.number, state=TrialState.FAIL)
    return study


def _ended(trial: optuna.trial.FrozenTrial) -> bool:
    """Tell whether a run ended by itself, that is, was not interrupted."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _DIVERGED in trial.user_attrs


def _specs(batch_size: int) -> dict[str, NormSpec]:
    """Return Batch Norm, Ghost Batch Norms whose size divides the batch, and Batch/Group Norm, by name."""
    ghosts = [2**k for k in range(1, 8) if 2**k < batch_size and batch_size % 2**k == 0]
    specs = [NormSpec.batch(), *map(NormSpec.ghost, ghosts), NormSpec.batch_group(CHANNELS_PER_GROUP)]
    if batch_size > 1:
        specs.append(ghost_of(batch_size))
    return {str(spec): spec for spec in specs}


def _describe(choice: Choice) -> str:
    rate = choice.norm_decay.rate if choice.norm_decay else 0.0
    return f"{choice.spec}" + (f", decay of scales and shifts {rate:.2g}" if rate else "")
