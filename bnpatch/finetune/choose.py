"""Which techniques suit a model and a batch size: by the paper's guidance, or by trying."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import optuna
import torch

from bnpatch.advice import techniques
from bnpatch.data.examples import Examples, split
from bnpatch.decay import NormDecay
from bnpatch.errors import BnpatchError
from bnpatch.finetune.loop import NotFiniteLossError, train
from bnpatch.finetune.settings import FineTuneSettings
from bnpatch.finetune.state import Epoch
from bnpatch.metrics import METRICS
from bnpatch.model import TorchModel
from bnpatch.nn.paths import unnormalized_sites
from bnpatch.spec import NormSpec

#: Of Batch/Group Norm, where nothing else is asked for.
CHANNELS_PER_GROUP = 16
_GHOST = 16  # near the best of the paper's Fig. 3
_DECAYS = (1e-5, 1e-2)  # range of the search


@dataclass(frozen=True)
class Choice:
    """Techniques to train with, and why.

    Attributes:
        spec: what the norms pool.
        norm_decay: decay of scales and shifts, or None.
        reasons: one line per technique, for people.
    """

    spec: NormSpec
    norm_decay: NormDecay | None
    reasons: tuple[str, ...]

    def settings(self, settings: FineTuneSettings) -> FineTuneSettings:
        """The settings with these techniques."""
        return replace(settings, spec=self.spec, norm_decay=self.norm_decay)


def decay_sites(model: TorchModel) -> frozenset[str]:
    """Sites at which decay of scale and shift can act: no other norm is between them and the output."""
    example = torch.zeros(1, *model.preprocessing.input_size, device=model.device)
    return unnormalized_sites(model.module, example)


def by_guidance(model: TorchModel, settings: FineTuneSettings) -> Choice:
    """What the paper says of this batch size and of this architecture, at the rate of the weight decay."""
    sites, batch_size = decay_sites(model), settings.batch_size
    judged = techniques(batch_size, len(model.survey().sites), len(sites))
    fits = {technique.name: technique.fits == "yes" for technique in judged}
    spec = NormSpec.batch()
    if fits["Ghost Batch Norm"]:
        spec = NormSpec.ghost(max(2, min(_GHOST, batch_size // 2)))
    elif fits["Batch/Group Norm"]:
        spec = NormSpec.batch_group(CHANNELS_PER_GROUP)
    decay = None
    if fits["weight decay on scales and shifts"] and settings.weight_decay:
        decay = NormDecay(settings.weight_decay, sites=sites)
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
    on_trial: Callable[[str, float | None], None] = lambda name, score: None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Choice:
    """Train short runs with various techniques, and take the best.

    Plain Batch Norm comes first, then what the guidance says; then Optuna proposes. A run that after some
    epoch is worse than the median of those before it is given up.

    Args:
        model: left as it is.
        examples: training examples, a part of which is held out of these runs and scores them.
        settings: of the runs, but for the techniques and the number of epochs.
        trials: runs.
        epochs: passes of each.
        holdout: the part held out, class by class.
        on_trial: called after each run with its techniques, and its score unless it was given up.
        progress: as of :func:`bnpatch.finetune.loop.train`.

    Raises:
        BnpatchError: no run ended with a finite loss.
    """
    subset, selection = split(examples.strata, holdout, settings.seed)
    metric, sites = METRICS[settings.metric], decay_sites(model)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize" if metric.higher_is_better else "minimize",
        sampler=optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=4),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
    )
    names = _specs(settings.batch_size)
    guided = by_guidance(model, settings)
    study.enqueue_trial({"norm": str(NormSpec.batch()), "decays": False})
    guided_decay = guided.norm_decay.rate if guided.norm_decay else 0.0
    study.enqueue_trial(
        {"norm": str(guided.spec), "decays": bool(guided_decay), "decay": guided_decay or None}
    )
    tried: dict[int, Choice] = {}

    def objective(trial: optuna.Trial) -> float:
        spec = names[trial.suggest_categorical("norm", list(names))]
        rate = 0.0
        if sites and trial.suggest_categorical("decays", [False, True]):
            rate = trial.suggest_float("decay", *_DECAYS, log=True)
        choice = Choice(spec, NormDecay(rate, sites=sites) if rate else None, ())
        tried[trial.number] = choice

        def on_epoch(epoch: Epoch) -> None:
            trial.report(epoch.score(settings.metric), epoch.epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        result = train(
            replace(model, module=copy.deepcopy(model.module)),
            examples,
            examples,
            replace(choice.settings(settings), epochs=epochs, patience=None),
            subset=subset,
            selection=selection,
            on_epoch=on_epoch,
            progress=progress,
        )
        return result.best.score(settings.metric)

    def ended(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        is_complete = trial.state == optuna.trial.TrialState.COMPLETE  # a pruned one has a value too
        on_trial(_describe(tried[trial.number]), trial.value if is_complete else None)

    try:
        study.optimize(objective, trials, catch=(NotFiniteLossError,), callbacks=[ended])
    finally:
        optuna.logging.set_verbosity(verbosity)
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        raise BnpatchError("every run diverged", "lower --lr")
    best = tried[study.best_trial.number]
    reason = f"best of {trials} runs of {epochs} epochs, {settings.metric} {metric.format(study.best_value)}"
    return replace(best, reasons=(f"{_describe(best)}: {reason}",))


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
