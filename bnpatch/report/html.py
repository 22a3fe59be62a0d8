"""The report of a search: one HTML page that needs no other files. The template has its prose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted, visible
from bnpatch.evaluation.confusion import class_changes, mistake_changes, most_changed
from bnpatch.evaluation.metrics import Outcome
from bnpatch.models.base import Model
from bnpatch.report import tables, text
from bnpatch.report.charts import curve_chart, depth_chart, distance_chart, recall_chart, trade_off_chart
from bnpatch.report.curves import global_search_curves
from bnpatch.report.pictures import class_galleries, galleries
from bnpatch.report.tables import Cell, Row, Table, TrainingResults
from bnpatch.search.latency_limit import dominated, knee
from bnpatch.search.result import TuneResult

#: Maximum number of rows in the tables of classes and of mistakes.
MOST_CLASSES = 15

# Number of unreadable images that are named; the others are counted.
_NAMED_IMAGES = 5

_SYMBOLS = {"baseline": "■", "best": "◆"}


@dataclass(frozen=True)
class Figure:
    """A chart with its title, and a symbol, its kind and its meaning for each mark."""

    title: str
    chart: Markup
    keys: Sequence[tuple[str, str, str]] = ()


def report_page(
    result: TuneResult, model: Model[Any], written: text.Written, training: TrainingResults | None = None
) -> str:
    """Make the report as self-contained HTML, without scripts or external files.

    Args:
        result: the result of a search.
        model: the model that was tuned.
        written: the files of the result.
        training: results of training the model before the search.
    """
    outcome = Outcome.LOSS if text.is_refused(result) else result.comparisons[0].outcome
    sentence = text.verdict_sentence(result)
    if training is not None:
        outcome = next(c for c in training.comparisons if c.metric.name == result.metric.name).outcome
        sentence = (
            f"{text.training_sentence(training.comparisons, result.metric)} Example weighing: {sentence}"
        )
    shapes, patches_nothing = _shapes(model), text.patches_nothing(result)
    return template("report.html.j2").render(
        result=result,
        name=model.name,
        command="tune-alpha" if training is None else "fine-tune",
        metric=text.title(result.metric),
        verdict="" if outcome is Outcome.NO_CHANGE else outcome.value,
        sentence=sentence,
        training=None if training is None else tables.trained(training, result, model),
        contributions=tables.contributions(training) if training and training.contributions else None,
        before_and_after=tables.before_and_after(result, model),
        kept=tables.kept(result),
        facts=_facts(result),
        notes=_notes(result, model),
        galleries=galleries(result, model.class_names),
        class_galleries=class_galleries(result, model.class_names),
        of_candidates=text.OF_CANDIDATES,
        candidates=tables.candidates(result),
        curves=_curves(result),
        depth=_depth(result, shapes),
        depth_texts=_depth_texts(result),
        weights=None if patches_nothing else tables.weights(result, shapes),
        shapes=shapes,
        trade_off=_trade_off(result) if result.trade_off else None,
        classes=_classes(result, model.class_names),
        skipped=tables.skipped_norms(model.inventory().skipped_norms),
        patched=written.patched,
        snippets=[] if patches_nothing else text.snippets(result, model, written),
        again=str(result.recipe.provenance.get("command") or "").removeprefix("bnpatch "),
        origin=Table("Of this result.", ["what", "value"], text.origin(result.recipe), "words"),
    )


@cache
def template(name: str) -> Template:
    """Load a template; text that is not markup yet is escaped, and can't reorder what is beside it."""
    environment = Environment(
        loader=PackageLoader("bnpatch.report", ""),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value), keep="\n"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _shapes(model: Model[Any]) -> Mapping[str, Sequence[int]]:
    """Return spatial shapes by name of norm layer; empty where the model does not take a blank image."""
    try:
        return {name: shape for name, shape in model.norm_shapes().items() if shape}
    except BnpatchError:  # it takes no blank image; the report leaves the shapes out
        return {}


def _facts(result: TuneResult) -> list[tuple[str, str]]:
    """Count the answers that changed; return an empty list where none did."""
    held_out, facts = result.held_out, []
    if not held_out.changed:
        return []
    if held_out.flips is not None:
        facts.append(("wrong, now right", f"{held_out.flips.gained:,}"))
        facts.append(("right, now wrong", f"{held_out.flips.lost:,}"))
    return [*facts, ("answers changed", f"{held_out.changed:,} of {held_out.num_examples:,}")]


def _notes(result: TuneResult, model: Model[Any]) -> list[str]:
    """Return what else people should know, a sentence each."""
    notes = [*result.notes, *model.notes]
    if result.interrupted:
        notes.insert(0, "The search was interrupted: this is the best of what it had found by then.")
    if skipped := result.skipped:
        shown = [f"{name} ({why})" for name, why in list(skipped.items())[:_NAMED_IMAGES]]
        rest = len(skipped) - len(shown)
        more = f" and {counted(rest, 'other')}" if rest else ""
        notes.append(f"Left out, because they can't be read: {', '.join(shown)}{more}.")
    return notes


def _curves(result: TuneResult) -> list[Figure]:
    """Draw the metrics against one alpha for all norm layers; none where that was not tried."""
    label, figures = text.weight_label(result), []
    for number, curve in enumerate(global_search_curves(result)):
        metric = curve.metric
        unit = " (%)" if metric.is_rate else "" if metric.higher_is_better else " (lower is better)"
        keys = [(_SYMBOLS[kind], kind, meaning) for kind, _, meaning in curve.marked(label)]
        if few := {point.examples for point in curve.points} - {curve.most}:
            span = f"{min(few):,}" if len(few) == 1 else f"{min(few):,} to {max(few):,}"
            keys.append(("○", "few", f"scored on {span} of {curve.most:,} examples"))
        chart = curve_chart(curve, text.weight_axis(result), label, f"curve{number}")
        figures.append(Figure(f"{text.title(metric)}{unit}", chart, keys))
    return figures


def _kept_weights(result: TuneResult) -> list[tuple[str, str, Mapping[str, float]]]:
    """Name, meaning and values by norm layer of alpha and of lambda; slopes have a chart of their own."""
    alpha = text.weight_label(result), text.weight_axis(result), text.distances(result)
    meaning = "lambda, the weight of the re-estimated statistics"
    return [alpha, ("lambda", meaning, result.weights.lambdas)]


def _depth(result: TuneResult, shapes: Mapping[str, Sequence[int]]) -> list[Figure]:
    """Draw the weights that differ between norm layers."""
    bars = [
        Figure(meaning, depth_chart(weights, shapes, label, f"depth{number}"))
        for number, (label, meaning, weights) in enumerate(_kept_weights(result))
        if len(set(weights.values())) > 1
    ]
    if result.weights.in_effect("slope"):
        meaning = "the weight of an example by its distance from the running statistics, per norm layer"
        bars.append(Figure(meaning, distance_chart(result.weights, "distance")))
    return bars


def _depth_texts(result: TuneResult) -> list[str]:
    """Describe the weights that are the same at all norm layers, but do something."""
    same = [(meaning, set(weights.values()), weights) for _, meaning, weights in _kept_weights(result)]
    return [
        f"{meaning[0].upper()}{meaning[1:]}, is {max(values):.4g} at all {len(weights)} norm layers."
        for meaning, values, weights in same
        if len(values) == 1 and any(values)
    ]


def _trade_off(result: TuneResult) -> tuple[Figure, Table]:
    """Make the chart and the table of gain against time, for patches of ever more norm layers."""
    measured, metric = result.trade_off, result.comparisons[0].metric
    best = knee(measured)
    rows: list[Row] = []
    for point, is_dominated in zip(measured, dominated(measured), strict=True):
        marks = ["as it is"] if point is measured[0] else []
        marks += ["knee"] if point is best else ["another is better"] if is_dominated else []
        latency = point.latency
        time = Cell(f"{latency.ratio:.2f}x", [f"{latency.low:.2f} to {latency.high:.2f}"])
        rows.append([Cell(str(point.num_norms), marks), time, text.points(metric, point.gain)])
    heading = f"gain in {text.title(metric)}"
    chart = trade_off_chart(measured, metric, "tradeoff")
    figure = Figure(f"{heading}{' (points)' if metric.is_rate else ''}", chart)
    caption = "On the selection examples. Small: 95% intervals of the time."
    return figure, Table(caption, ["patched norm layers", "time", heading], rows)


def _classes(result: TuneResult, names: Sequence[str] | None) -> tuple[Figure, Table, Table, int] | None:
    """Describe changes class by class, and count the classes left out; None where no answer changed."""
    known = result.held_out.classes
    if known is None or not result.held_out.changed:
        return None

    name = partial(text.class_name, names)
    changes = class_changes(known)
    shown = most_changed(changes, MOST_CLASSES)
    called = [name(c.target) for c in shown]
    recalls = []
    for c in shown:
        before, after = (100 * right / c.examples for right in (c.before, c.after))
        cells = f"{c.examples:,}", f"{before:.1f}%", f"{after:.1f}%", f"{after - before:+.1f}"
        recalls.append([name(c.target), *cells])
    mistakes = [
        [f"{name(m.target)} → {name(m.answer)}", f"{m.before:,}", f"{m.after:,}", f"{m.after - m.before:+,}"]
        for m in mistake_changes(known, MOST_CLASSES)
    ]
    head = ["as it is", "patched", "change"]
    return (
        Figure("recall, as it is (○) and patched (●)", recall_chart(shown, called, "recall")),
        Table("Recall.", ["class", "examples", *head], recalls),
        Table(
            "Mistakes that change most, target → answer: how often they are made.",
            ["mistake", *head],
            mistakes,
        ),
        len(changes) - len(shown),
    )
