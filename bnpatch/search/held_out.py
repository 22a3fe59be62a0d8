"""Held-out evaluation: the effect of a patch on examples that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.core.patch import PatchState
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.groups import shuffled
from bnpatch.evaluation.confidence import Answers, Flips, compare_calibration, flips
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CONFIDENCE,
    PREDICTION,
    Comparison,
    Metric,
    Outcome,
    Values,
    paired,
)
from bnpatch.models.base import Model
from bnpatch.search.keep import Kept
from bnpatch.search.objective import Objective, groups_of_scores, in_sets


@dataclass(frozen=True)
class PairedScores:
    """Scores of the same examples in the same order, without and with a patch.

    Attributes:
        before: scores without the patch by name of metric, of shape (N,), or one per set of examples.
        after: scores with the patch, likewise.
        targets: classes of the examples, of shape (N,); empty where they have none.
        indices: positions of the examples in the data set, of shape (N,).
        groups: the group of each score, of shape (N,); None where scores are independent.
    """

    before: Mapping[str, Values]
    after: Mapping[str, Values]
    targets: npt.NDArray[np.int64]
    indices: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    groups: Indices | None = None

    @staticmethod
    def joined(parts: Sequence["PairedScores"]) -> "PairedScores":
        """Join the scores of several parts, the folds of a cross-fit."""

        def join(which: str) -> dict[str, Values]:
            return {n: np.concatenate([getattr(p, which)[n] for p in parts]) for n in parts[0].before}

        targets, indices = (np.concatenate([getattr(p, n) for p in parts]) for n in ("targets", "indices"))
        groups = [part.groups for part in parts if part.groups is not None]
        joined = np.concatenate(groups) if groups else None
        return PairedScores(join("before"), join("after"), targets, indices, joined)


@dataclass(frozen=True)
class HeldOutEvaluation:
    """The effect of a patch on held-out examples.

    Attributes:
        comparisons: one comparison per metric; the first decides the verdict.
        calibration: comparison of the expected calibration error, where there are labels.
        flips: numbers of answers that became right and wrong, where there are labels.
        changed: number of examples whose answer changed; None where answers are not classes.
        classes: target, answer before and answer after of each example, (3, N); None without labels.
        num_examples: number of held-out examples, or of sets of them.
        num_groups: number of groups of these examples; None where they are independent.
        indices: positions of the held-out examples in the data set, of shape (N,).
        confidences: confidence before and after of each example, (2, N); None without labels.
        kept: what the patch does to the images to keep; None where there are none.
    """

    comparisons: list[Comparison]
    calibration: Comparison | None = None
    flips: Flips | None = None
    changed: int | None = None
    classes: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    num_examples: int = 0
    indices: Indices = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    confidences: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    num_groups: int | None = None
    kept: Kept | None = None

    @property
    def verdict(self) -> str:
        """The verdict in words: gain, loss, or no significant change."""
        return self.comparisons[0].verdict

    @property
    def all_comparisons(self) -> list[Comparison]:
        """Comparisons of the metrics and, where there are labels, of the calibration error."""
        return [*self.comparisons, *([] if self.calibration is None else [self.calibration])]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        content: dict[str, Any] = {c.metric.name: c.to_json() for c in self.comparisons}
        if self.calibration is not None:
            content["calibration-error"] = self.calibration.to_json()
        if self.flips is not None:
            content["flips"] = {"gained": self.flips.gained, "lost": self.flips.lost}
        if self.changed is not None:
            content["answers-changed"] = self.changed
        return content


@dataclass(frozen=True)
class Decision:
    """Whether a candidate is recommended, and why not.

    Attributes:
        is_recommended: whether held-out examples support the candidate.
        held_out: the effect of the candidate on held-out examples.
        reason: why the candidate is not recommended, as a sentence for users; "" where there is nothing to
            say.
    """

    is_recommended: bool
    held_out: HeldOutEvaluation
    reason: str = ""


def gather(
    model: Model[Any],
    examples: Examples,
    objective: Objective,
    before: PatchState,
    after: PatchState,
    indices: Indices,
) -> PairedScores:
    """Score examples without and with a patch. The model is in one of the two states afterwards.

    Args:
        model: the model.
        examples: the examples to judge by.
        objective: scores the examples.
        before: the state of the model before the search.
        after: the state with the patch.
        indices: which examples to use.
    """
    if objective.set_size > 1:
        examples.readable(indices)  # finds all that can't be read now, so that both states get the same sets
    first = scores(model, examples, objective, before, indices)
    second = first if before.computes_like(after) else scores(model, examples, objective, after, indices)
    read = _readable(examples, objective, indices)
    labelled = examples.classes and examples.labelled[read].all()
    targets = examples.targets[read] if labelled else np.zeros(0, np.int64)
    return PairedScores(first, second, targets, read, groups_of_scores(objective, examples, read))


def scores(
    model: Model[Any], examples: Examples, objective: Objective, state: PatchState, indices: Indices
) -> dict[str, Values]:
    """Score with a patch the examples that can be read, or sets of them; return scores by name of metric.

    Their order depends on the examples and the objective, not on the patch.
    """
    model.set_state(state)
    sets = in_sets(_readable(examples, objective, indices), objective.set_size, examples.groups)
    parts = [objective.scores(model, examples, part) for part in sets]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _readable(examples: Examples, objective: Objective, indices: Indices) -> Indices:
    """Return the examples that can be read; in random order where sets of them are scored.

    Folders are sorted by class, so that without shuffling each set would have one class or two.
    """
    readable = np.array([index for index in indices if index not in examples.skipped], dtype=np.int64)
    if objective.set_size == 1:
        return readable
    rng = np.random.default_rng(0)
    if examples.groups is not None:
        return shuffled(readable, examples.groups, rng)
    return readable[np.argsort(rng.random(len(examples))[readable])]


def conclude(scored: PairedScores, metrics: Sequence[Metric]) -> HeldOutEvaluation:
    """Compare the scores without and with the patch, paired by example.

    Args:
        scored: scores of all held-out examples.
        metrics: metrics to compare; the first decides the verdict.
    """
    before, after = scored.before, scored.after
    groups = scored.groups
    comparisons = [paired(metric, before[metric.name], after[metric.name], groups) for metric in metrics]
    count = max(len(values) for values in before.values())
    evaluation = HeldOutEvaluation(
        comparisons,
        num_examples=count,
        indices=scored.indices,
        num_groups=None if groups is None else len(np.unique(groups)),
    )
    if PREDICTION.name not in before:
        return evaluation
    answers = [side[PREDICTION.name].astype(np.int64) for side in (before, after)]
    changed = int(np.sum(answers[0] != answers[1]))
    if ACCURACY.name not in before or len(scored.targets) != count:
        return replace(evaluation, changed=changed)
    sure = [Answers(side[CONFIDENCE.name], side[ACCURACY.name]) for side in (before, after)]
    return replace(
        evaluation,
        calibration=compare_calibration(sure[0], sure[1], groups),
        flips=flips(before[ACCURACY.name], after[ACCURACY.name]),
        changed=changed,
        classes=np.stack([scored.targets, *answers]),
        confidences=np.stack([one.confidence for one in sure]),
    )


def decide(
    candidate: str | None,
    scored: PairedScores,
    shifted: PairedScores | None,
    metrics: Sequence[Metric],
    kept: Kept | None = None,
) -> Decision:
    """Recommend a candidate only if held-out examples, which have no say in what is chosen, show a gain.

    A candidate that was tuned on augmented examples must gain on augmented held-out examples, and must not
    be a loss on the examples as they are. Where there are images to keep, it must be shown to keep the
    margin there.

    Args:
        candidate: name of the candidate; None where the search chose the baseline.
        scored: scores of all held-out examples; in a cross-fit, of what each search found.
        shifted: the same of augmented held-out examples, where the search was on such.
        metrics: metrics to compare; the first decides.
        kept: what the candidate does to the images to keep, where there are any.
    """
    held_out = replace(conclude(scored, metrics), kept=kept)
    tuned = held_out.comparisons[0]
    if candidate is None:
        # In a cross-fit, searches without one of the parts may have found something.
        reason = ""
        if change := tuned.change.value:
            reason = (
                f"what was found without one of the parts changes their {tuned.metric.name} by "
                f"{tuned.metric.format(change, signed=True)}; all images together speak for none of it"
            )
        unchanged = conclude(replace(scored, after=scored.before), metrics)
        return Decision(False, replace(unchanged, kept=kept), reason)
    if tuned.outcome is Outcome.LOSS:
        reason = f"{candidate}: best in tuning, but a loss in {tuned.metric.name} on held-out examples"
        return Decision(False, held_out, f"{reason}; not applied")
    where = "held-out examples"
    if shifted is not None:
        tuned, where = (
            conclude(shifted, metrics).comparisons[0],
            "held-out examples as --augment shifts them",
        )
    if tuned.outcome is Outcome.GAIN:
        if kept is not None and not kept.is_within:
            return Decision(False, held_out, f"{candidate}: {kept}; not applied")
        return Decision(True, held_out)
    reason = f"{candidate}: no significant change in {tuned.metric.name} on {where}; not applied"
    units = "examples" if held_out.num_groups is None else "groups"
    if more := _more_units(tuned, held_out.num_groups or held_out.num_examples):
        reason += f" (about {more:,} more {units} might show a gain, if the change so far is the truth)"
    return Decision(False, held_out, reason)


def _more_units(tuned: Comparison, count: int) -> int:
    """Estimate how many more examples or groups would show a gain, to two digits; 0 if there is none."""
    gain = tuned.metric.sign * tuned.change.value
    if gain <= 0:
        return 0
    more = count * ((tuned.change.reach / gain) ** 2 - 1)
    if more < 1:
        return 1
    digits = 10 ** max(0, int(np.log10(more)) - 1)
    return int(np.ceil(more / digits) * digits)
