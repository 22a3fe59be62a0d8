"""What each technique contributes: trained alone, and together."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnpatch.core.norm_spec import NormSpec
from bnpatch.data.dataset import Examples, Indices, split
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Metric, student
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.techniques import CHANNELS_PER_GROUP, by_guidance, decayed_norms
from bnpatch.finetune.trainer import train
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.tune import tune_alpha

#: Name of the run without any technique.
NONE = "none"
_METRICS = (ACCURACY, CROSS_ENTROPY)


@dataclass(frozen=True)
class Contribution:
    """How a model did on held-out examples.

    Attributes:
        name: of the technique.
        scores: by metric, the mean over examples of each seed's run.
        changes: by metric, the same minus that of plain Batch Norm with the same seed.
    """

    name: str
    scores: dict[str, list[float]]
    changes: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, and cells for a table: mean, and change with its interval over seeds."""
        cells = []
        for metric in _METRICS:
            cells.append(metric.format(float(np.mean(self.scores[metric.name]))))
            cells.append("" if self.name == NONE else _change(metric, self.changes[metric.name]))
        return {"name": self.name, "scores": self.scores, "changes": self.changes, "cells": cells}


def variants(model: TorchModel, settings: FineTuneSettings) -> dict[str, tuple[FineTuneSettings, bool]]:
    """Settings by name of what they show, and whether alpha is tuned.

    A technique that the settings ask for is shown as they ask for it, another as the guidance has it. Ghost
    and Batch/Group Norm exclude each other: all has the one of the settings, or of the guidance.
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
    trials: int = 15,
    tell: Callable[[str], None] = lambda note: None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> list[Contribution]:
    """Train with no technique, with each alone and with all, and score held-out examples.

    Args:
        model: left as it is.
        train_examples: what to train on.
        val_examples: one part chooses epochs and alpha, the other is scored.
        settings: of all runs, but for the techniques; the seed counts up from theirs.
        seeds: runs of each.
        holdout: the part of the validation examples that is scored.
        trials: weights of the example to try.
        tell: called before each run with what it is.
        progress: as of :func:`bnpatch.finetune.trainer.train`.
    """
    selection, held_out = split(val_examples.strata, holdout, settings.seed)
    named = variants(model, settings)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for seed in range(settings.seed, settings.seed + seeds):
        trained: dict[str, TorchModel] = {}
        for name, (wanted, is_tuned) in named.items():
            key = str((wanted.spec, wanted.norm_decay))
            if key not in trained:  # example weighing needs no training of its own
                tell(f"comparing      {name}, seed {seed}")
                trained[key] = replace(model, module=copy.deepcopy(model.module))
                train(
                    trained[key],
                    train_examples,
                    val_examples,
                    replace(wanted, seed=seed),
                    selection=selection,
                    progress=progress,
                )
            scores[name].append(
                _held_out(trained[key], val_examples, held_out, settings, holdout, trials if is_tuned else 0)
            )
    return [
        Contribution(
            name,
            {m.name: [run[m.name] for run in runs] for m in _METRICS},
            {
                m.name: [run[m.name] - base[m.name] for run, base in zip(runs, scores[NONE], strict=True)]
                for m in _METRICS
            },
        )
        for name, runs in scores.items()
    ]


def _held_out(
    model: TorchModel,
    examples: Examples,
    held_out: Indices,
    settings: FineTuneSettings,
    holdout: float,
    trials: int,
) -> dict[str, float]:
    """Means over the held-out examples, with alpha tuned on the others where there are trials."""
    if not trials:
        scores = evaluate(model, examples, _METRICS, indices=held_out)
        return {metric.name: scores.mean(metric) for metric in _METRICS}
    # The seed is that of the split, for all runs. One alpha for all norm layers is the paper's technique.
    tuned = tune_alpha(
        model,
        examples,
        metric=settings.metric,
        granularity="global",
        trials=trials,
        holdout=holdout,
        seed=settings.seed,
    )
    return {c.metric.name: c.after.value for c in tuned.comparisons}


def _change(metric: Metric, changes: list[float]) -> str:
    """For people: the mean change, and Student's interval over seeds where there are some."""
    mean = student(np.array(changes))
    text = metric.format(mean.value, signed=True)
    if len(changes) < 2:
        return text
    return f"{text} [{metric.format(mean.low, True)}, {metric.format(mean.high, True)}]"
