"""Run a model on examples, score each, and compare the scores of two states."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CROSS_ENTROPY,
    TOP5,
    Comparison,
    Estimate,
    Metric,
    ScoreFunction,
    Values,
    as_metric,
    mean_estimate,
    paired,
    score,
)
from bnpatch.models.base import Model

T = TypeVar("T")

STANDARD_METRICS = (ACCURACY, TOP5, CROSS_ENTROPY)


class OutputsNotFiniteError(BnpatchError):
    """The model returned infinities or NaN."""


def if_finite(score: Callable[[], T]) -> T | None:
    """Call ``score`` and return its result, or None if it raises OutputsNotFiniteError."""
    try:
        return score()
    except OutputsNotFiniteError:  # callers ask for None because they rate such weights as the worst
        return None


class NoExamplesError(BnpatchError):
    """None of the examples can be read."""


@dataclass(frozen=True)
class Scores:
    """Scores of the examples that could be read.

    Attributes:
        indices: indices of these examples, of shape (N,).
        values: by name of metric, the scores in the order of ``indices``, of shape (N,).
        groups: the group of each of these examples, of shape (N,); None if all are independent.
    """

    indices: Indices
    values: dict[str, Values]
    groups: Indices | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def mean(self, metric: Metric) -> float:
        """Return the mean of a metric over the examples."""
        return float(np.mean(self.values[metric.name]))

    def estimate(self, metric: Metric) -> Estimate:
        """Return the mean of a metric with its 95% confidence interval."""
        return mean_estimate(self.values[metric.name], self.groups)


def evaluate(
    model: Model[Any],
    examples: Examples,
    metrics: Sequence[str | Metric | ScoreFunction] = STANDARD_METRICS,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Run a model with its current state on examples, and score each example.

        model = bnpatch.load("timm:resnet18")
        scores = bnpatch.evaluate(model, bnpatch.open_examples("val/", model))
        accuracy = scores.values["accuracy"].mean()

    Args:
        model: the model; it is in evaluation mode while this runs.
        examples: from :func:`bnpatch.open_examples`.
        metrics: the metrics to compute: their names, or functions as for :func:`bnpatch.tune_alpha`.
        indices: indices of the examples to score; None for all.
        batch_size: examples at a time; it changes only the speed.
        on_batch: called with the number of examples of each batch, for progress.

    Returns:
        The scores by name of metric, without the examples that can't be read.

    Raises:
        OutputsNotFiniteError: an output is infinite or not a number.
        BnpatchError: the model doesn't take the examples, none can be read, or a metric needs classes that
            they don't have.
    """
    chosen = [as_metric(metric) for metric in metrics]
    _check_targets(examples, chosen, indices)
    seen: list[Indices] = []
    scores: dict[str, list[Tensor]] = {metric.name: [] for metric in chosen}
    finite: list[Tensor] = []
    with model.evaluating():
        first = next(examples.batches(1, indices), None)
        size = batch_size if first is None else model.efficient_batch(batch_size, first.x)
        for batch in examples.batches(size, indices):
            outputs = model.predict(batch.x)
            targets = batch.targets.to(outputs.device, non_blocking=True)
            # The scores stay on the device until the end, so that no batch waits for it.
            finite.append(torch.isfinite(outputs).reshape(len(outputs), -1).all(1))
            by_class = any(metric.reads_classes for metric in chosen)
            logits = model.as_classes(outputs) if by_class else outputs
            for metric in chosen:
                read = logits if metric.reads_classes else outputs
                scores[metric.name].append(score(metric, read, targets))
            seen.append(batch.indices)
            on_batch(len(batch.indices))
    if not seen:
        index, problem = next(iter(examples.skipped.items()), (0, "there are none"))
        raise NoExamplesError(
            f"none of the images can be read, {examples.source.name(index)} for one: {problem}",
            "look at the files",
        )
    order = np.concatenate(seen)
    if not (ok := torch.cat(finite).cpu().numpy()).all():
        raise OutputsNotFiniteError(
            f"{model.name} returns infinities or NaN for {examples.source.name(int(order[~ok][0]))}",
            "check the weights and the preprocessing, or leave out --amp",
        )
    values = {name: torch.cat(parts).cpu().double().numpy() for name, parts in scores.items()}
    return Scores(order, values, None if examples.groups is None else examples.groups[order])


def _check_targets(examples: Examples, metrics: Sequence[Metric], indices: Indices | None) -> None:
    metric = next((metric for metric in metrics if metric.of_classes), None)
    if metric is None:
        return  # a metric of the user's own may take any targets
    if not examples.classes:
        raise BnpatchError(
            f"{metric.name} needs class indices, and the targets are something else",
            "give a metric of your own, a function from (outputs, targets) to one number per example",
        )
    if not examples.labelled[slice(None) if indices is None else indices].all():
        raise BnpatchError(
            f"{metric.name} needs labels, and some examples have none", "give labelled examples"
        )


def warn_at_chance(accuracy: float, examples: Examples) -> None:
    """Warn if a model is hardly better than guessing; a mistake in how it is run is the usual reason."""
    if not examples.classes or not examples.labelled.any():
        return
    chance = 1 / len(np.unique(examples.targets[examples.labelled]))
    if accuracy <= chance + min(0.5 * chance, 0.1) < 1:
        warnings.warn(
            f"the model is right on {accuracy:.1%} of the examples as it is, and chance is {chance:.1%}: if "
            "that surprises you, the class folders may be in another order (--class-map), or the "
            "preprocessing may not be the model's",
            BnpatchWarning,
            stacklevel=2,
        )


def compare(
    model: Model[Any],
    examples: Examples,
    weights: PatchWeights,
    metrics: Sequence[Metric] = STANDARD_METRICS,
    **options: Any,
) -> list[Comparison]:
    """Score examples with the current weights of a model, then with others, and compare the scores.

    Args:
        model: the model; it has the new weights when this returns.
        examples: the examples to score.
        weights: the new weights.
        metrics: the metrics to compute.
        options: further arguments of :func:`evaluate`.
    """
    before = after = evaluate(model, examples, metrics, **options)
    was = model.state
    model.set_weights(weights)
    if not model.state.computes_like(was):
        after = evaluate(model, examples, metrics, **options)
    return compare_scores(before, after, metrics)


def compare_scores(
    before: Scores, after: Scores, metrics: Sequence[Metric] = STANDARD_METRICS
) -> list[Comparison]:
    """Compare scores of the same examples, pair by pair."""
    return [
        paired(metric, before.values[metric.name], after.values[metric.name], before.groups)
        for metric in metrics
    ]
