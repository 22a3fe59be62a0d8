"""Detailed sections of the report: gain against time, classes, and skipped norms."""

from collections.abc import Sequence
from itertools import islice

from bnpatch.core.inventory import SkippedNorm
from bnpatch.evaluation.metrics import Metric
from bnpatch.report.charts import trade_off_chart
from bnpatch.report.confusion import class_changes, mistake_changes, most_changed
from bnpatch.report.markup import Markup, join, table, tag
from bnpatch.report.summary import interval, points, title
from bnpatch.search.latency_limit import Point, dominated, knee
from bnpatch.search.result import TuneResult

#: Maximum number of rows in the tables of classes and of mistakes.
MOST_CLASSES = 15

#: Number of norms of one kind that are named; the others are counted.
_NAMED = 4


def trade_off(measured: Sequence[Point], metric: Metric) -> Markup:
    """The chart and the table of gain against time, for patches of ever more norm layers."""
    best = knee(measured)
    rows = []
    for point, is_dominated in zip(measured, dominated(measured), strict=True):
        gain, latency = point.interval, point.latency
        norm_layers = f"{point.num_norms}{' (as it is)' if point is measured[0] else ''}"
        mark = "knee" if point is best else "beaten by another" if is_dominated else ""
        time = [f"{latency.ratio:.2f}x", tag("small", f"{latency.low:.2f} to {latency.high:.2f}")]
        gained = [points(metric, point.gain), tag("small", interval(metric, gain))]
        rows.append(
            [join([norm_layers, tag("small", f" {mark}") if mark else None]), join(time), join(gained)]
        )
    caption = "Small: 95% intervals. The knee, in a ring, is where more time begins to gain little."
    return join(
        [
            tag(
                "figure",
                tag(
                    "figcaption", tag("b", f"gain in {title(metric)}{' (points)' if metric.is_rate else ''}")
                ),
                trade_off_chart(measured, metric),
            ),
            table(caption, ["patched norm layers", "time", f"gain in {title(metric)}"], rows),
        ]
    )


def classes(result: TuneResult, names: Sequence[str] | None) -> Markup | None:
    """The changes class by class; None where classes are unknown, or no answer changed."""
    known = result.verdict.classes
    if known is None or not result.verdict.changed:
        return None

    def name(index: int) -> str:
        return names[index] if names and index < len(names) else str(index)

    changes = class_changes(known)
    shown = most_changed(changes, MOST_CLASSES)
    recalls = [
        [
            name(c.target),
            f"{c.examples:,}",
            f"{100 * c.before / c.examples:.1f}%",
            f"{100 * c.after / c.examples:.1f}%",
            f"{100 * (c.after - c.before) / c.examples:+.1f}",
        ]
        for c in shown
    ]
    rest = len(changes) - len(shown)
    which = (
        f"The {len(shown)} classes that change most; {rest} others are left out." if rest else "All classes."
    )
    mistakes = [
        [f"{name(m.target)} → {name(m.answer)}", f"{m.before:,}", f"{m.after:,}", f"{m.after - m.before:+,}"]
        for m in mistake_changes(known, MOST_CLASSES)
    ]
    return join(
        [
            table(
                f"Recall: the part of the examples of a class that is answered rightly. {which}",
                ["class", "examples", "as it is", "patched", "change"],
                recalls,
            ),
            table(
                "Mistakes that change most, target → answer: how often they are made.",
                ["mistake", "as it is", "patched", "change"],
                mistakes,
            ),
        ]
    )


def skipped_norms(norms: Sequence[SkippedNorm]) -> Markup:
    """The normalization layers that can't be patched, and the reasons."""
    if not norms:
        return tag("p", "Nothing: every normalization layer of the model is a norm layer.")
    groups: dict[tuple[str, str], list[str]] = {}
    for norm in norms:
        groups.setdefault((norm.kind, norm.reason), []).append(norm.name)
    rows = []
    for (kind, reason), members in groups.items():
        more = len(members) - _NAMED
        shown = ", ".join(islice(members, _NAMED)) + (f" and {more} others" if more > 0 else "")
        rows.append(
            [join([kind, tag("small", f" {len(members)} times")]), join([reason, tag("small", shown)])]
        )
    return table(
        "Normalization layers that are not rewritten.", ["layer", "why, and which"], rows, class_="words"
    )
