"""The main sections of the report: scores before and after, candidates, curves and weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnpatch.evaluation.metrics import Comparison, Estimate, Metric
from bnpatch.report.charts import curve_chart, depth_chart, strip
from bnpatch.report.curves import Curve, global_search_curves
from bnpatch.report.markup import Markup, join, table, tag
from bnpatch.report.summary import (
    distances,
    interval,
    is_identity,
    scored_on,
    title,
    weight_axis,
    weight_label,
)
from bnpatch.search.result import TuneResult


def before_and_after(result: TuneResult) -> Markup:
    """A table of all metrics on the held-out examples, and numbers of answers that changed."""
    verdict = result.verdict
    if is_identity(result) and not verdict.changed and not any(c.change.value for c in result.comparisons):
        rows = [_named(c.metric, _estimated(c.metric, c.before)) for c in verdict.all_comparisons]
        caption = f"The model as it is, on {scored_on(result)}. Small: 95% intervals."
        return table(caption, ["metric", "as it is"], rows)
    rows = [_compared(c) for c in verdict.all_comparisons]
    facts = []
    if verdict.flips is not None:
        facts += [
            ("wrong, now right", f"{verdict.flips.gained:,}"),
            ("right, now wrong", f"{verdict.flips.lost:,}"),
        ]
    if verdict.changed is not None:
        facts.append(("answers changed", f"{verdict.changed:,} of {verdict.num_examples:,}"))
    patched = "patched" if str(verdict) != "loss" else "patched (not kept)"
    return join(
        [
            table(
                f"On {scored_on(result)}. Small: 95% intervals; the change is paired, example by example.",
                ["metric", "as it is", patched, "change"],
                rows,
            ),
            tag(
                "dl",
                *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts),
                class_="facts",
            )
            if facts
            else None,
        ]
    )


@dataclass(frozen=True)
class Training:
    """The results of fine-tuning a network before alpha was tuned.

    Attributes:
        comparisons: the fine-tuned and patched model against the checkpoint, on held-out examples.
        contributions: name, accuracy, change, cross-entropy and change for each technique, as cells.
    """

    comparisons: Sequence[Comparison]
    contributions: Sequence[Sequence[str]] = ()


def trained(training: Training, examples: str) -> Markup:
    """A table of the fine-tuned model against the checkpoint."""
    return table(
        f"On {examples}. Small: 95% intervals; the change is paired, example by example.",
        ["metric", "checkpoint", "fine-tuned", "change"],
        [_compared(c) for c in training.comparisons],
    )


def contributions(training: Training) -> Markup | None:
    """A table of what each technique contributes alone, and all together; None if not measured."""
    if not training.contributions:
        return None
    rows = [
        [name, join([accuracy, tag("small", change)]), join([entropy, tag("small", other)])]
        for name, accuracy, change, entropy, other in training.contributions
    ]
    caption = "Means over seeds, on held-out examples. Small: changes from training with none of them."
    return table(caption, ["trained with", "accuracy", "cross-entropy"], rows)


def _compared(comparison: Comparison) -> list[str]:
    metric, change, verdict = comparison.metric, comparison.change, comparison.verdict
    sign = {"gain": "▲ gain", "loss": "▼ loss"}.get(verdict, verdict)
    changed = [
        metric.format(change.value, signed=True),
        tag("small", interval(metric, change)),
        tag("small", sign, class_=f"is-{verdict}" if verdict in ("gain", "loss") else None),
    ]
    before, after = (_estimated(metric, estimate) for estimate in (comparison.before, comparison.after))
    return _named(metric, before, after, join(changed))


def _named(metric: Metric, *cells: str) -> list[str]:
    """A row of a table of metrics."""
    hint = None if metric.higher_is_better else tag("small", "(lower is better)")
    return [join([title(metric), " ", hint]), *cells]


def _estimated(metric: Metric, estimate: Estimate) -> Markup:
    return join([metric.format(estimate.value), tag("small", interval(metric, estimate, signed=False))])


def search(result: TuneResult) -> Markup:
    """A table of the candidates with their scores on the selection examples."""
    metric = result.metric
    changes = [
        candidate.change
        for candidate in result.candidates[1:]
        if math.isfinite(candidate.change.high - candidate.change.low)
    ]
    ends = [0.0, *(end for change in changes for end in (change.low, change.value, change.high))]
    span = (min(ends), max(ends))
    mark = " chosen, but not kept" if str(result.verdict) == "loss" else " chosen"
    rows = []
    for index, candidate in enumerate(result.candidates):
        change = [
            metric.format(candidate.change.value, signed=True),
            tag("small", interval(metric, candidate.change)),
        ]
        name = tag("b", f"✓ {candidate.name}", tag("small", mark)) if candidate.chosen else candidate.name
        drawn = strip(candidate.change, span) if candidate.change in changes and span[0] < span[1] else ""
        rows.append([name, metric.format(candidate.mean), join(change) if index else "reference", drawn])
    head = ["weights", title(metric), "change from the identity", ""]
    return join(
        [
            tag(
                "p",
                "Each candidate gives the weights more freedom. Where any of them gains beyond doubt, by the "
                "metric or the cross-entropy, the best is chosen by the selection examples, a part of the "
                "tuning examples set aside for that (of one weight for all, all of them settle the doubt). "
                "Of candidates that a single answer tells apart it is the first whose cross-entropy is "
                "within a standard error of the best. Having been chosen by these examples, a candidate "
                "looks better on them than it is: the verdict comes from the held-out examples above.",
            ),
            table("On the selection examples. Small: 95% intervals.", head, rows, class_="ladder"),
        ]
    )


def curves(result: TuneResult) -> Markup | None:
    """Charts of the metrics against one alpha for all norm layers; None where that was not tried."""
    found = global_search_curves(result)
    label = weight_label(result)
    if not found:
        return None
    return join(
        [
            tag(
                "p",
                "One weight for all norm layers, on the tuning examples. Bands are 95% intervals of the "
                "change from the identity; hollow dots were given up after fewer examples, which say what "
                "all would score.",
            ),
            tag("div", *(_figure(curve, weight_axis(result), label) for curve in found), class_="charts"),
        ]
    )


def _figure(curve: Curve, axis: str, label: str) -> Markup:
    shapes = {"identity": "■", "best": "◆"}
    keys = [
        tag("span", tag("i", shapes[kind], class_=kind), f" {text}", class_="key")
        for kind, _, text in curve.marked(label)
    ]
    unit = " (%)" if curve.metric.is_rate else "" if curve.metric.higher_is_better else " (lower is better)"
    caption = tag("figcaption", tag("b", f"{title(curve.metric)}{unit}"), *keys)
    return tag("figure", caption, curve_chart(curve, axis, label))


def depth(result: TuneResult, shapes: Mapping[str, Sequence[int]]) -> Markup:
    """Charts and a table of the weights that are kept, from the input of the model to its output."""
    if is_identity(result):
        return tag("p", f"All {len(result.norm_layers)} norm layers stay as they were.")
    label, lambdas = weight_label(result), dict(result.weights.lambdas)
    charts, texts = [], []
    for name, meaning, weights in (
        (label, weight_axis(result), distances(result)),
        ("lambda", "lambda, the weight of re-estimated moments", lambdas),
    ):
        if len(values := set(weights.values())) > 1:
            caption = tag("figcaption", tag("b", meaning))
            charts.append(tag("figure", caption, depth_chart(weights, shapes, name)))
        elif any(values):
            texts.append(f"{meaning}, is {values.pop():.4g} at all {len(weights)} norm layers.")
    if charts:
        texts.append("Bars stand for norm layers, in the order of the model.")
        if shapes:
            texts.append("Shading and numbers on top mark stages: norm layers of one size of feature map.")
    return join(
        [
            *(tag("p", text[0].upper() + text[1:]) for text in texts),
            tag("div", *charts, class_="charts") if charts else None,
            tag("details", tag("summary", "All weights"), _weights(result, shapes)),
        ]
    )


def _weights(result: TuneResult, shapes: Mapping[str, Sequence[int]]) -> Markup:
    columns = {"alpha": {name: f"{alpha:.4g}" for name, alpha in result.weights.alphas.items()}}
    if any(result.weights.lambdas.values()):
        columns["lambda"] = {name: f"{weight:.3g}" for name, weight in result.weights.lambdas.items()}
    if shapes:
        columns["feature map"] = {
            name: "x".join(map(str, shapes[name])) if name in shapes else "unknown"
            for name in result.norm_layers
        }
    rows = [[name, *(column[name] for column in columns.values())] for name in result.norm_layers]
    return table("From input to output.", ["norm layer", *columns], rows)
