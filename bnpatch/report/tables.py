"""The tables of the report: scores before and after, candidates, weights, and what was skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bnpatch.core.inventory import SkippedNorm
from bnpatch.core.text import counted
from bnpatch.evaluation.metrics import Comparison, Estimate, Metric, Outcome
from bnpatch.models.base import Model
from bnpatch.report import text
from bnpatch.search.result import TuneResult

# Number of norms of one kind that are named; the others are counted.
_NAMED_NORMS = 4


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        notes: what stands below it, in small letters.
        kind: "gain" or "loss" colours the last note, "chosen" stresses the cell.
    """

    text: str
    notes: Sequence[str] = ()
    kind: str = ""


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its name.

    Attributes:
        caption: the caption.
        columns: heads of the columns.
        rows: cells of each row, one per column.
        kind: "words" for a table that has no numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    kind: str = ""


@dataclass(frozen=True)
class TrainingResults:
    """The results of fine-tuning a network before alpha was tuned.

    Attributes:
        comparisons: the fine-tuned and patched model against the checkpoint, on held-out examples.
        contributions: name, accuracy, change, cross-entropy and change for each technique, as cells.
    """

    comparisons: Sequence[Comparison]
    contributions: Sequence[Sequence[str]] = ()


def before_and_after(result: TuneResult, model: Model[Any]) -> Table:
    """Make the table of all metrics on the held-out examples."""
    held_out, where = result.held_out, text.scored_on(result)
    comparisons = text.shown(held_out.all_comparisons, model, result.metric)
    is_same = not held_out.changed and not any(c.change.value for c in result.comparisons)
    if is_same and text.patches_nothing(result):
        rows = [[_metric(c.metric), _estimate(c.metric, c.before)] for c in comparisons]
        caption = f"The model as it is, on {where}. Small: 95% intervals."
        return Table(caption, ["metric", "as it is"], rows)
    patched = "patched (not kept)" if text.is_refused(result) else "patched"
    caption = f"On {where}. Small: 95% intervals; the change is paired, example by example."
    return Table(caption, ["metric", "as it is", patched, "change"], [compared(c) for c in comparisons])


def kept(result: TuneResult) -> Table | None:
    """Make the table of the images to keep, with the verdict on them; None where there are none."""
    if (kept := result.held_out.kept) is None:
        return None
    caption = f"Images to keep. Small: 95% intervals. {kept}."
    return Table(caption, ["metric", "as it is", "patched", "change"], [compared(kept.comparison)])


def trained(training: TrainingResults, result: TuneResult, model: Model[Any]) -> Table:
    """Make the table of the checkpoint and the fine-tuned model, on the held-out examples."""
    caption = f"On {text.scored_on(result)}. Small: 95% intervals; the change is paired, example by example."
    rows = [compared(c) for c in text.shown(training.comparisons, model, result.metric)]
    return Table(caption, ["metric", "checkpoint", "fine-tuned", "change"], rows)


def contributions(training: TrainingResults) -> Table:
    """Make the table of what each technique contributes alone, and all together."""
    rows = [
        (name, Cell(accuracy, [change]), Cell(entropy, [other]))
        for name, accuracy, change, entropy, other in training.contributions
    ]
    caption = "Means over seeds, on held-out examples. Small: changes from training with none of them."
    return Table(caption, ["trained with", "accuracy", "cross-entropy"], rows)


def compared(comparison: Comparison) -> Row:
    """A row with the scores before and after, and the change."""
    metric, change, verdict = comparison.metric, comparison.change, comparison.verdict
    sign = {Outcome.GAIN: "▲ ", Outcome.LOSS: "▼ ", Outcome.NO_CHANGE: ""}[comparison.outcome]
    notes = [text.interval(metric, change), f"{sign}{verdict}"]
    before, after = (_estimate(metric, estimate) for estimate in (comparison.before, comparison.after))
    return [_metric(metric), before, after, Cell(metric.format(change.value, signed=True), notes, verdict)]


def _metric(metric: Metric) -> Cell:
    return Cell(text.title(metric), [] if metric.higher_is_better else ["(lower is better)"])


def _estimate(metric: Metric, estimate: Estimate) -> Cell:
    return Cell(metric.format(estimate.value), [text.interval(metric, estimate, signed=False)])


def candidates(result: TuneResult) -> Table:
    """Make the table of candidates, without intervals, which examples that chose one can't give."""
    metric = result.metric
    mark = "chosen, but not kept" if text.is_refused(result) else "chosen"
    rows: list[Row] = []
    for candidate in result.candidates:
        name = candidate.name
        first = Cell(f"✓ {name}", [mark], "chosen") if candidate.chosen else Cell(name)
        change = metric.format(candidate.change.value, signed=True) if rows else "reference"
        rows.append([first, metric.format(candidate.mean), change])
    columns = ["candidate", text.title(metric), "change from the baseline"]
    return Table("On the selection examples.", columns, rows)


def weights(result: TuneResult, shapes: Mapping[str, Sequence[int]]) -> Table:
    """Make the table of the weights of each norm layer, with the others where they do something."""
    columns = {"alpha": {name: f"{alpha:.4g}" for name, alpha in result.weights.alphas.items()}}
    if any(result.weights.lambdas.values()):
        columns["lambda"] = {name: f"{weight:.3g}" for name, weight in result.weights.lambdas.items()}
    for kind, title in (("slope", "slope"), ("var_offset", "offset of the variance")):
        if result.weights.in_effect(kind):
            columns[title] = {name: f"{value:.3g}" for name, value in result.weights.of(kind).items()}
    if shapes:
        columns["feature map"] = {
            name: "x".join(map(str, shapes[name])) if name in shapes else "unknown"
            for name in result.norm_layers
        }
    rows = [[name, *(column[name] for column in columns.values())] for name in result.norm_layers]
    return Table("From input to output.", ["norm layer", *columns], rows)


def skipped_norms(norms: Sequence[SkippedNorm]) -> Table | None:
    """Make the table of the normalization layers that can't be patched, with the reasons."""
    groups: dict[tuple[str, str], list[str]] = {}
    for norm in norms:
        groups.setdefault((norm.kind, norm.reason), []).append(norm.name)
    rows: list[Row] = []
    for (kind, reason), members in groups.items():
        more = len(members) - _NAMED_NORMS
        named = ", ".join(islice(members, _NAMED_NORMS)) + (
            f" and {counted(more, 'other')}" if more > 0 else ""
        )
        rows.append([Cell(kind, [counted(len(members), "time")]), Cell(reason, [named])])
    if not rows:
        return None
    return Table("Normalization layers that are not rewritten.", ["layer", "why, and which"], rows, "words")
