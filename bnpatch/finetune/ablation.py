"""Ablation: train with each technique alone and with all together, and compare."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnpatch.core.norm_spec import NormSpec
from bnpatch.data.dataset import Examples, split
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Metric, student
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.techniques import CHANNELS_PER_GROUP, by_guidance, decayed_norms
from bnpatch.finetune.trainer import train
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.tune import tune_alpha

#: Name of the run without any technique.
NONE = "none"
_METRICS = (ACCURACY, CROSS_ENTROPY)
_TRIALS = 15  # alphas to try


@dataclass(frozen=True)
class Contribution:
    """Scores of a technique on held-out examples.

    Attributes:
        name: name of the technique.
        scores: mean over examples for each seed, by name of metric.
        changes: differences of these from plain Batch Norm with the same seed, by name of metric.
    """

    name: str
    scores: dict[str, list[float]]
    changes: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, and cells for a table: means, and changes with intervals over seeds."""
        cells = []
        for metric in _METRICS:
            cells.append(metric.format(float(np.mean(self.scores[metric.name]))))
            cells.append("" if self.name == NONE else _change(metric, self.changes[metric.name]))
        return {"name": self.name, "scores": self.scores, "changes": self.changes, "cells": cells}


def variants(model: TorchModel, settings: FineTuneSettings) -> dict[str, tuple[FineTuneSettings, bool]]:
    """Return settings by name of technique, each with whether alpha is tuned.

    Techniques that the settings use keep their parameters; the others get those of the guidance. Ghost and
    Batch/Group Norm exclude each other: "all" uses the one of the settings, or else of the guidance.
    """
    guided, spec = by_guidance(model, settings), settings.spec
    plain = replace(settings, spec=NormSpec.batch(), norm_decay=None)
    decay = settings.norm_decay or guided.norm_decay
    decay = decay or NormDecay(settings.weight_decay, norm_layers=decayed_norms(model))
    is_ghost = spec.channels_per_group == 1 and spec.examples_per_group is not None
    pooled = spec if spec.channels_per_group > 1 else NormSpec.batch_group(CHANNELS_PER_GROUP)
    everything = guided.spec if spec == NormSpec.batch() else spec
    found = {NONE: (plain, False), "example weighing": (plain, True)}
    if is_ghost or settings.batch_size > 2:
        ghost = spec if is_ghost else NormSpec.ghost(max(2, settings.batch_size // 4))
        found[str(ghost)] = (replace(plain, spec=ghost), False)
    found["decay of scales and shifts"] = (replace(plain, norm_decay=decay), False)
    found[str(pooled)] = (replace(plain, spec=pooled), False)
    found["all"] = (replace(plain, spec=everything, norm_decay=decay), True)
    return found


def ablate(
    model: TorchModel,
    train_examples: Examples,
    val_examples: Examples,
    settings: FineTuneSettings,
    *,
    seeds: int = 1,
    holdout: float = 0.5,
    callbacks: Callbacks | None = None,
) -> list[Contribution]:
    """Train with no technique, with each alone and with all, and score held-out examples.

    Args:
        model: the model, which is not changed.
        train_examples: examples to train on.
        val_examples: examples to select epochs and alpha by, and to score.
        settings: settings of all runs, except for the techniques; their seed is the first one.
        seeds: number of seeds for each technique.
        holdout: fraction of the validation examples that is scored, and not used to select.
        callbacks: functions to call meanwhile.
    """
    callbacks = callbacks or Callbacks()
    in_training = Callbacks(progress=callbacks.progress)
    selection, held_out = split(val_examples.strata, holdout, settings.seed, val_examples.groups)
    examples = RunExamples(train_examples, val_examples, selection=selection)
    named = variants(model, settings)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for seed in range(settings.seed, settings.seed + seeds):
        trained: dict[str, TorchModel] = {}
        for name, (wanted, is_tuned) in named.items():
            key = str((wanted.spec, wanted.norm_decay))
            if key not in trained:  # example weighing needs no training of its own
                callbacks.tell(f"comparing      {name}, seed {seed}")
                trained[key] = replace(model, module=copy.deepcopy(model.module))
                train(trained[key], examples, replace(wanted, seed=seed), callbacks=in_training)
            if is_tuned:
                found = _tuned(trained[key], val_examples, settings, holdout)
            else:
                means = evaluate(trained[key], val_examples, _METRICS, indices=held_out)
                found = {metric.name: means.mean(metric) for metric in _METRICS}
            scores[name].append(found)
    return [_contribution(name, runs, scores[NONE]) for name, runs in scores.items()]


def _contribution(
    name: str, runs: Sequence[Mapping[str, float]], plain: Sequence[Mapping[str, float]]
) -> Contribution:
    """Compare the scores of a technique with those of plain Batch Norm, seed by seed."""
    scores = {m.name: [run[m.name] for run in runs] for m in _METRICS}
    changes = {
        m.name: [run[m.name] - other[m.name] for run, other in zip(runs, plain, strict=True)]
        for m in _METRICS
    }
    return Contribution(name, scores, changes)


def _tuned(
    model: TorchModel, examples: Examples, settings: FineTuneSettings, holdout: float
) -> dict[str, float]:
    """Tune alpha on a part of the examples, and return the means over the held-out ones."""
    # All runs use the seed of the split. One alpha for all norm layers is the paper's technique.
    tuned = tune_alpha(
        model,
        examples,
        metric=settings.metric,
        granularity="global",
        trials=_TRIALS,
        holdout=holdout,
        seed=settings.seed,
    )
    return {c.metric.name: c.after.value for c in tuned.comparisons}


def _change(metric: Metric, changes: list[float]) -> str:
    """Format the mean change, and Student's interval over seeds where there are several."""
    mean = student(np.array(changes))
    text = metric.format(mean.value, signed=True)
    if len(changes) < 2:
        return text
    return f"{text} [{metric.format(mean.low, True)}, {metric.format(mean.high, True)}]"
