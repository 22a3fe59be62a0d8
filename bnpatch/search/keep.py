"""Images on which a patch must do no harm, such as those of the time before a shift.

A patch that was chosen on shifted images may ruin images without the shift. With images to keep, a patch must
be shown not to lose more than a margin there: the upper end of a one-sided 95% interval of the loss must
lie below the margin (a test of non-inferiority). One half of these images takes part in learning and
choosing; the other half only tests the choice.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import ndtri
from torch import Tensor

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.patch import PatchState
from bnpatch.core.text import counted
from bnpatch.data.dataset import Batch, Examples, Indices, portions, split
from bnpatch.evaluation.evaluate import evaluate, if_finite
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CROSS_ENTROPY,
    PREDICTION,
    Comparison,
    Metric,
    Values,
    no_scores,
    paired,
    paired_rates,
)
from bnpatch.models.base import Model
from bnpatch.search.objective import LabelledObjective

#: Share of the answers of the unpatched model that stay, where the images to keep have no labels.
ANSWERS_KEPT = Metric("answers kept", no_scores, is_rate=True)

#: Confidence that a patch loses less than the upper end of the interval.
_LEVEL = 0.95

# Weight of the images to keep in the loss of learning, and in what compares its steps. With less, learning
# loses some points on them; with more, it gives away much of the gain: docs/decisions/0019 has the numbers.
_WEIGHT = 3.0

# Number of images by which steps of learning are compared.
_CHECKED = 300

Loss = Callable[[Model[Any], Sequence[Batch]], Iterator[Tensor]]


def largest_loss(before: Values, after: Values, groups: Indices | None = None) -> float:
    """Return the upper end of the one-sided 95% interval of the loss, from paired 0/1 scores (N,).

    Examples of a group (``groups``, (N,)) are not independent; the interval then is by group.

    >>> round(largest_loss(np.ones(998), np.ones(998)), 5)
    0.00233
    """
    return -paired_rates(before, after, groups, level=_LEVEL).low


def fewest_images(margin: float) -> int:
    """Return how many images can show that no more than ``margin`` is lost, if no answer changes.

    >>> fewest_images(0.005)
    464
    """
    return max(1, math.floor(float(ndtri(_LEVEL)) * math.sqrt(2) / margin) - 1)


@dataclass(frozen=True)
class Kept:
    """What a patch does to the images to keep that had no say in it.

    Attributes:
        comparison: accuracy, or without labels the share of answers kept, without and with the patch.
        largest_loss: upper end of the one-sided 95% interval of the loss, as a fraction.
        margin: the loss that the user accepts, as a fraction.
        num_examples: number of images.
        num_groups: number of groups that these are of; None if all are independent.
    """

    comparison: Comparison
    largest_loss: float
    margin: float
    num_examples: int
    num_groups: int | None = None

    @property
    def is_within(self) -> bool:
        """Whether the patch is shown not to lose more than the margin."""
        return self.largest_loss < self.margin

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return "kept within the margin" if self.is_within else "not shown to be within the margin"

    def __str__(self) -> str:
        """Return the verdict with its numbers, for users."""
        metric = self.comparison.metric
        before, after = (metric.format(end.value) for end in (self.comparison.before, self.comparison.after))
        images = counted(self.num_examples, "image") + " to keep"
        if self.num_groups is not None:
            images += f" in {counted(self.num_groups, 'group')}"
        return (
            f"{self.verdict}: {metric.name} {before} → {after} on {images}, "
            f"at 95% confidence a loss of at most {100 * max(0.0, self.largest_loss):.2f} points; "
            f"the margin is {100 * self.margin:g}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "metric": self.comparison.metric.name,
            **self.comparison.to_json(),
            "largest_loss": self.largest_loss,
            "margin": self.margin,
            "examples": self.num_examples,
            **({} if self.num_groups is None else {"groups": self.num_groups}),
            "verdict": self.verdict,
        }


class KeepSet:
    """Images on which a patch must not lose more than a margin.

    Attributes:
        examples: the images. Their targets are their labels or, if one of them has none, the answers of the
            unpatched model.
        metric: what is compared: accuracy, or the share of answers kept.
        margin: the loss that the user accepts, as a fraction.
        scored: number of images that were scored for learning and choosing.
    """

    def __init__(
        self,
        model: Model[Any],
        examples: Examples,
        margin: float,
        batch_size: int = 64,
        seed: int = 0,
        count: Callable[[str, float], None] = lambda label, examples: None,
    ) -> None:
        """Read the images, split them, and let the model answer where labels are missing.

        Args:
            model: the model in the state that patches are compared with.
            examples: the images; those that can't be read are left out.
            margin: the loss that the user accepts, as a fraction.
            batch_size: images at a time.
            seed: seed of the split; a group of images is in one half.
            count: called with a label and the number of images that were scored.

        Raises:
            BnpatchError: none of the images can be read, or all of a half are of one group.
        """
        self._model, self._before, self._count = model, model.state, count
        self.margin, self.scored, self._seed = margin, 0, seed
        self._objective = LabelledObjective(ACCURACY, [ACCURACY, CROSS_ENTROPY], batch_size)
        readable = examples.readable(np.arange(len(examples)))
        is_labelled = bool(examples.labelled[readable].all())
        self.metric = ACCURACY if is_labelled else ANSWERS_KEPT
        self.examples = examples if is_labelled else _answered(model, examples, readable, batch_size)
        groups = None if examples.groups is None else examples.groups[readable]
        halves = split(self.examples.strata[readable], 0.5, seed, groups)
        self._choosing, self._judging = (readable[half] for half in halves)
        if groups is not None and min(len(np.unique(groups[half])) for half in halves) < 2:
            raise BnpatchError(
                "the images to keep are of too few groups", "give images of more groups, ten or more"
            )
        smaller = min(self._choosing, self._judging, key=len)
        _warn_if_few(len(smaller), self._groups(smaller), margin)
        self._before_choosing = self._right(self._before, self._choosing)

    @property
    def num_checked(self) -> int:
        """The number of images that :meth:`cost` scores."""
        return min(_CHECKED, len(self._choosing))

    def on_choosing(self, state: PatchState) -> Kept | None:
        """Compare the state with the unpatched model, on the half that chooses; None if not finite."""
        self.scored += len(self._choosing)
        after = if_finite(partial(self._right, state, self._choosing))
        return None if after is None else self._compared(self._before_choosing, after, self._choosing)

    def judged(self, state: PatchState) -> Kept:
        """Compare the state with the unpatched model, on the half that judges."""
        before = self._right(self._before, self._judging)
        after = before if self._before.computes_like(state) else self._right(state, self._judging)
        return self._compared(before, after, self._judging)

    def cost(self, state: PatchState) -> float:
        """Return the weighted mean cross-entropy of some images, by which steps of learning are compared."""
        part = np.random.default_rng(self._seed).permutation(self._choosing)[:_CHECKED]
        self.scored += len(part)
        values = if_finite(partial(self._scores, state, part))
        return math.inf if values is None else _WEIGHT * float(values[CROSS_ENTROPY.name].mean())

    def with_loss(self, loss: Loss, batch_size: int, part_size: int) -> Loss:
        """Add the weighted cross-entropy of as many images to keep to the loss of each step of learning.

        Args:
            loss: the loss of a step, in parts that add up.
            batch_size: images to keep per step.
            part_size: images to keep per part of the loss.
        """
        drawn = portions(self._choosing, batch_size, self._seed)

        def both(model: Model[Any], batches: Sequence[Batch]) -> Iterator[Tensor]:
            yield from loss(model, batches)
            images = list(self.examples.batches(part_size, next(drawn)))
            yield from (_WEIGHT * part for part in self._objective.loss(model, images))

        return both

    def _compared(self, before: Values, after: Values, indices: Indices) -> Kept:
        groups = self._groups(indices)
        return Kept(
            paired(self.metric, before, after, groups),
            largest_loss(before, after, groups),
            self.margin,
            len(before),
            self.examples.num_groups(indices),
        )

    def _groups(self, indices: Indices) -> Indices | None:
        return None if self.examples.groups is None else self.examples.groups[indices]

    def _right(self, state: PatchState, indices: Indices) -> Values:
        return self._scores(state, indices)[ACCURACY.name]

    def _scores(self, state: PatchState, indices: Indices) -> dict[str, Values]:
        self._model.set_state(state)
        self._count("images to keep", len(indices))
        return self._objective.scores(self._model, self.examples, indices)


class _Answered(Examples):
    """A view of examples whose targets are answers of a model, that shares their cache."""

    def __init__(self, examples: Examples, answers: Values, readable: Indices) -> None:
        vars(self).update(vars(examples))
        self.targets = np.full(len(examples), -1, dtype=np.int64)
        self.targets[readable] = answers
        self.labelled = self.targets >= 0


def _answered(model: Model[Any], examples: Examples, readable: Indices, batch_size: int) -> Examples:
    scores = evaluate(model, examples, [PREDICTION], indices=readable, batch_size=batch_size)
    return _Answered(examples, scores.values[PREDICTION.name], scores.indices)


def _warn_if_few(count: int, groups: Indices | None, margin: float) -> None:
    """Warn if the images of a half are so few that only a patch that gains on them can pass."""
    same = np.ones(count)
    least = largest_loss(same, same, groups)
    if least < margin:
        return
    fewest = fewest_images(margin)
    if groups is not None:  # the interval is that of at least count / size independent images
        size = int(np.unique(groups, return_counts=True)[1].max())
        fewest = math.ceil((count + 2 * size) * least / margin)
    units = "" if groups is None else f" in about {2 * len(np.unique(groups)):,} groups"
    possible = math.floor(1e4 * least + 1) / 1e4
    warnings.warn(
        f"{2 * count:,} images to keep{units} are too few to show that a patch loses at most "
        f"{100 * margin:g} points on them, even if no answer changes: at least {2 * fewest:,} are needed"
        + (f", or a margin of {possible:g}" if possible < 1 else ""),
        BnpatchWarning,
        stacklevel=2,
    )
