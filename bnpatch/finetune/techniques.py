"""Choose techniques for a model and a batch size, by the paper's guidance or by a search."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.data.dataset import Examples, Indices, split
from bnpatch.evaluation.metrics import METRICS
from bnpatch.finetune.checkpoint import Epoch, difference
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.guidance import techniques
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.trainer import NotFiniteLossError, train
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.tracing import unnormalized_norms
from bnpatch.search.distributed import Processes, start
from bnpatch.search.storages import connect, quiet, usable

#: Channels per group of Batch/Group Norm, by default.
CHANNELS_PER_GROUP = 16
_GHOST = 16  # examples per group; near the best of the paper's Fig. 3
_DECAYS = (1e-5, 1e-2)  # range of the search; extended to include the rate of the guidance
_SEARCH, _DIVERGED = "bnpatch:search", "bnpatch:diverged"  # names of user attributes


@dataclass(frozen=True)
class Choice:
    """Techniques to train with, and the reasons.

    Attributes:
        spec: which values the norms pool.
        norm_decay: decay of scales and shifts, or None.
        reasons: one line per technique, as text for users.
    """

    spec: NormSpec
    norm_decay: NormDecay | None
    reasons: tuple[str, ...]

    def settings(self, settings: FineTuneSettings) -> FineTuneSettings:
        """The settings with these techniques."""
        return replace(settings, spec=self.spec, norm_decay=self.norm_decay)


def decayed_norms(model: TorchModel) -> frozenset[str]:
    """Norm layers where decay has an effect, because no other norm is between them and the output."""
    example = torch.zeros(1, *model.preprocessing.input_size, device=model.device)
    return unnormalized_norms(model.module, example)


def by_guidance(model: TorchModel, settings: FineTuneSettings) -> Choice:
    """Choose techniques by the paper's guidance; scales and shifts decay at the rate of the weight decay."""
    norm_layers, batch_size = decayed_norms(model), settings.batch_size
    judged = techniques(batch_size, len(model.inventory().norm_layers), len(norm_layers))
    fits = {technique.name: technique.fits == "yes" for technique in judged}
    spec = NormSpec.batch()
    if fits["Ghost Batch Norm"]:
        spec = NormSpec.ghost(max(2, min(_GHOST, batch_size // 2)))
    elif fits["Batch/Group Norm"]:
        spec = NormSpec.batch_group(CHANNELS_PER_GROUP)
    decay = None
    if fits["weight decay on scales and shifts"] and settings.weight_decay:
        decay = NormDecay(settings.weight_decay, norm_layers=norm_layers)
    reasons = tuple(f"{t.name}: {t.fits}; {t.reason}" for t in judged)
    return Choice(spec, decay, reasons)


def by_search(
    model: TorchModel,
    examples: Examples,
    settings: FineTuneSettings,
    *,
    trials: int = 12,
    epochs: int = 3,
    holdout: float = 0.2,
    database: Path | None = None,
    resume: bool = False,
    on_trial: Callable[[str, float | None], None] = lambda name, score: None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Choice:
    """Train short runs with various techniques, and choose those of the best run.

    The first run uses plain Batch Norm, the second follows the guidance, and Optuna proposes the others. A
    run is pruned if after some epoch it is worse than the median of the runs before it.

    Args:
        model: the model, which is not changed.
        examples: training examples; a part of them is held out of these runs, to score them.
        settings: settings of the runs, except for the techniques and the number of epochs.
        trials: number of runs.
        epochs: number of epochs of each run.
        holdout: fraction of the examples that is held out, stratified by class.
        database: SQLite file that keeps the runs as an Optuna study, so that a search that was killed can
            continue; None for memory.
        resume: whether to continue from the database, if it exists; otherwise the search starts again.
        on_trial: called after each run with its techniques, and its score unless it was pruned.
        progress: see :func:`bnpatch.finetune.trainer.train`.

    Raises:
        BnpatchError: no run ended with a finite loss, or the database is of another search.
    """
    processes = start()
    subset, selection = split(examples.strata, holdout, settings.seed)
    metric, norm_layers = METRICS[settings.metric], decayed_norms(model)
    names = _specs(settings.batch_size)
    guided = by_guidance(model, settings)
    guided_decay = guided.norm_decay.rate if guided.norm_decay else None
    decays = (*_DECAYS, guided_decay or _DECAYS[0])
    first = (
        {"norm": str(NormSpec.batch()), "decays": False},
        {"norm": str(guided.spec), "decays": guided_decay is not None, "decay": guided_decay},
    )
    # All that scores depend on; this includes the number of workers, each of which has its own seed.
    search = {
        "model": model.fingerprints(),
        "data": examples.fingerprint(),
        "settings": settings.to_json(),
        "epochs": epochs,
        "holdout": holdout,
        "processes": 1 if processes is None else processes.count,  # each has its own batch
    }

    def choice(params: Mapping[str, Any]) -> Choice:
        rate = params["decay"] if params.get("decays") else 0.0
        return Choice(names[params["norm"]], NormDecay(rate, norm_layers=norm_layers) if rate else None, ())

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_categorical("norm", list(names))
        if norm_layers and trial.suggest_categorical("decays", [False, True]):
            trial.suggest_float("decay", min(decays), max(decays), log=True)
        run = replace(choice(trial.params).settings(settings), epochs=epochs, patience=None)
        return _score_of_run(trial, model, examples, run, (subset, selection), progress)

    def told(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        is_complete = trial.state == TrialState.COMPLETE  # a pruned one has a value too
        on_trial(_describe(choice(trial.params)), trial.value if is_complete else None)

    with quiet():
        study = _opened(database, resume, search, metric.higher_is_better, processes)
        while (number := sum(map(_ended, study.trials))) < trials:
            # The techniques of a run depend on the ended runs alone, so that a run that was interrupted is
            # repeated with the same techniques.
            if number < len(first) and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(first[number])
            study.sampler = optuna.samplers.TPESampler(seed=settings.seed + number, n_startup_trials=4)
            study.optimize(objective, 1, catch=(NotFiniteLossError,), callbacks=[told])
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise BnpatchError("every run diverged", "lower --lr")
    best = choice(study.best_params)
    reason = f"best of {trials} runs of {epochs} epochs, {settings.metric} {metric.format(study.best_value)}"
    return replace(best, reasons=(f"{_describe(best)}: {reason}",))


def _score_of_run(
    trial: optuna.Trial,
    model: TorchModel,
    examples: Examples,
    settings: FineTuneSettings,
    parts: tuple[Indices, Indices],
    progress: Callable[[str, int, int], None],
) -> float:
    """Train a copy of the model on the first part, and return its best score on the second.

    Raises:
        TrialPruned: the run is worse than the median after some epoch.
        NotFiniteLossError: the run diverged; the trial remembers it.
    """

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.score(settings.metric), epoch.epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        result = train(
            replace(model, module=copy.deepcopy(model.module)),
            examples,
            examples,
            settings,
            subset=parts[0],
            selection=parts[1],
            on_epoch=on_epoch,
            progress=progress,
        )
    except NotFiniteLossError:
        trial.set_user_attr(_DIVERGED, True)  # to tell it from a run that was interrupted
        raise
    return result.best.score(settings.metric)


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
    """Did the run end by itself, that is, was it not interrupted?"""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _DIVERGED in trial.user_attrs


def _specs(batch_size: int) -> dict[str, NormSpec]:
    """Batch Norm, Ghost sizes that divide the batch, and Batch/Group Norm, by name."""
    ghosts = [2**k for k in range(1, 8) if 2**k < batch_size and batch_size % 2**k == 0]
    specs = [NormSpec.batch(), *map(NormSpec.ghost, ghosts), NormSpec.batch_group(CHANNELS_PER_GROUP)]
    if batch_size > 1 and (guided := max(2, min(_GHOST, batch_size // 2))) not in ghosts:
        specs.append(NormSpec.ghost(guided))
    return {str(spec): spec for spec in specs}


def _describe(choice: Choice) -> str:
    rate = choice.norm_decay.rate if choice.norm_decay else 0.0
    return f"{choice.spec}" + (f", decay of scales and shifts {rate:.2g}" if rate else "")
