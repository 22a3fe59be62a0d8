"""The verdict: what a patch does to examples that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.confidence import Answers, Flips, compare_calibration, flips
from bnpatch.evaluation.metrics import ACCURACY, CONFIDENCE, PREDICTION, Comparison, Metric, Values, paired
from bnpatch.models.base import Patchable
from bnpatch.search.objective import Judge, in_sets


@dataclass(frozen=True)
class Evidence:
    """Scores of the same examples in the same order, without and with a patch.

    Attributes:
        before: by name of metric, of shape (N,), or one per set of examples.
        after: likewise.
        targets: classes of the examples, of shape (N,); empty where they have none.
    """

    before: Mapping[str, Values]
    after: Mapping[str, Values]
    targets: npt.NDArray[np.int64]

    @staticmethod
    def joined(parts: Sequence["Evidence"]) -> "Evidence":
        """All examples of several parts: of the folds of a cross-fit."""

        def join(which: str) -> dict[str, Values]:
            return {n: np.concatenate([getattr(p, which)[n] for p in parts]) for n in parts[0].before}

        return Evidence(join("before"), join("after"), np.concatenate([part.targets for part in parts]))


@dataclass(frozen=True)
class Verdict:
    """What a patch does to held-out examples.

    Attributes:
        comparisons: metric by metric; the first is what the verdict is about.
        calibration: expected calibration error, where there are labels.
        flips: answers that became right and wrong, where there are labels.
        changed: number of examples whose answer is another one; None where answers are no classes.
        classes: target, answer before and answer after of each example, (3, N); None without labels.
        num_examples: how many were judged.
    """

    comparisons: list[Comparison]
    calibration: Comparison | None = None
    flips: Flips | None = None
    changed: int | None = None
    classes: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    num_examples: int = 0

    def __str__(self) -> str:
        """Either gain, loss, or no significant change."""
        return self.comparisons[0].verdict

    @property
    def all_comparisons(self) -> list[Comparison]:
        """Of the metrics and, where there are labels, of the calibration error."""
        return [*self.comparisons, *([] if self.calibration is None else [self.calibration])]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content: dict[str, Any] = {c.metric.name: c.to_json() for c in self.comparisons}
        if self.calibration is not None:
            content["calibration-error"] = self.calibration.to_json()
        if self.flips is not None:
            content["flips"] = {"gained": self.flips.gained, "lost": self.flips.lost}
        if self.changed is not None:
            content["answers-changed"] = self.changed
        return content


def gather(
    model: Patchable,
    examples: Examples,
    judge: Judge,
    before: PatchWeights,
    after: PatchWeights,
    indices: Indices,
    baseline_statistics: Mapping[str, Moments[Any]],
) -> Evidence:
    """Score examples without and with a patch; the model has the weights of ``after`` when this returns.

    Args:
        model: its target moments are those that ``after`` weighs.
        examples: to judge by.
        judge: what scores them.
        before: the weights that the model came with.
        after: those of the patch.
        indices: of the examples.
        baseline_statistics: the target moments that ``before`` weighs.
    """
    if judge.set_size > 1:
        examples.readable(indices)  # or sets could be of other examples the second time
    found = dict(model.targets())
    model.retarget(baseline_statistics)
    first = scores(model, examples, judge, before, indices)
    model.retarget(found)
    unchanged = before == after and not baseline_statistics
    second = first if unchanged else scores(model, examples, judge, after, indices)
    read = _readable(examples, judge, indices)
    labelled = examples.classes and examples.labelled[read].all()
    return Evidence(first, second, examples.targets[read] if labelled else np.zeros(0, np.int64))


def scores(
    model: Patchable, examples: Examples, judge: Judge, setting: PatchWeights, indices: Indices
) -> dict[str, Values]:
    """Scores of a setting by name of metric, of the examples that can be read or of sets of them.

    They are in an order that depends on the examples and the judge, not on the setting.
    """
    model.set(setting)
    sets = in_sets(_readable(examples, judge, indices), judge.set_size)
    parts = [judge.scores(model, examples, part) for part in sets]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _readable(examples: Examples, judge: Judge, indices: Indices) -> Indices:
    """The examples that can be read; in random order where sets of them are to look alike.

    Folders are sorted by class: in their order each set would be of a class or two.
    """
    readable = np.array([index for index in indices if index not in examples.skipped], dtype=np.int64)
    if judge.set_size == 1:
        return readable
    return readable[np.argsort(np.random.default_rng(0).random(len(examples))[readable])]


def conclude(evidence: Evidence, metrics: Sequence[Metric]) -> Verdict:
    """Compare pair by pair.

    Args:
        evidence: of all held-out examples.
        metrics: what to compare; the first is what the verdict is about.
    """
    before, after = evidence.before, evidence.after
    comparisons = [paired(metric, before[metric.name], after[metric.name]) for metric in metrics]
    count = max(len(values) for values in before.values())
    if PREDICTION.name not in before:
        return Verdict(comparisons, num_examples=count)
    answers = [side[PREDICTION.name].astype(np.int64) for side in (before, after)]
    changed = int(np.sum(answers[0] != answers[1]))
    if ACCURACY.name not in before or len(evidence.targets) != count:
        return Verdict(comparisons, changed=changed, num_examples=count)
    sure = [Answers(side[CONFIDENCE.name], side[ACCURACY.name]) for side in (before, after)]
    return Verdict(
        comparisons,
        compare_calibration(sure[0], sure[1]),
        flips(before[ACCURACY.name], after[ACCURACY.name]),
        changed,
        np.stack([evidence.targets, *answers]),
        count,
    )
