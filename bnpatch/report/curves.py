"""The curves of the global search for one alpha: each metric against the weight of the example."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnpatch.core.io import atomic_path
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Z95, Metric
from bnpatch.report.summary import weight_axis, weight_label
from bnpatch.search.result import TuneResult

#: Ticks of the weight's axis, which has a square-root scale because useful weights are small.
WEIGHT_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)

_MARKS = {"identity": ("s", "#c0392b"), "best": ("D", "#1f7a4d")}


@dataclass(frozen=True)
class CurvePoint:
    """A weight and its score.

    Attributes:
        weight: distance from the identity, in [0, 1].
        value: mean of the metric.
        low: lower end of the 95% interval of the change from the identity, added to the identity's value.
        high: upper end of this interval, likewise.
        is_whole: whether all tuning examples were scored.
    """

    weight: float
    value: float
    low: float
    high: float
    is_whole: bool


@dataclass(frozen=True)
class Curve:
    """One metric of the tuning examples against the weight of the example.

    Attributes:
        metric: the metric.
        points: points in the order of their weights, which are unique; the first is the identity.
        best: the point that the global search found, which is the best by the tuned metric.
    """

    metric: Metric
    points: Sequence[CurvePoint]
    best: CurvePoint

    @property
    def identity(self) -> CurvePoint:
        """The point of the identity."""
        return self.points[0]

    def marked(self, weight: str) -> list[tuple[str, CurvePoint, str]]:
        """Points to mark: "identity" or "best", the point, and its label."""
        marks = [("identity", self.identity, "identity")]
        if self.best is not self.identity:
            marks.append(("best", self.best, f"best, {weight} = {self.best.weight:.3g}"))
        return [(kind, point, f"{text}: {self.metric.format(point.value)}") for kind, point, text in marks]


def global_search_curves(result: TuneResult) -> list[Curve]:
    """Make the curves of the tuned metric, accuracy and cross-entropy, as far as these were scored.

    Returns:
        The curves; an empty list where the global search for one alpha was not started.
    """
    candidate = next((candidate for candidate in result.candidates if candidate.name == "alpha"), None)
    trials = [trial for trial in result.trials if trial.candidate == "alpha"]
    if candidate is None or not trials:
        return []
    most = max(trial.examples for trial in trials)
    # If two trials have one weight, the one with more examples is the better estimate.
    kept = {t.weight: t for t in sorted(trials, key=lambda trial: trial.examples) if t.weight is not None}
    origin = result.candidates[0].weights.alphas
    weight = max((abs(alpha - origin[name]) for name, alpha in candidate.weights.alphas.items()), default=0.0)
    metrics = [result.metric, *(m for m in (ACCURACY, CROSS_ENTROPY) if m.name != result.metric.name)]
    curves = []
    for metric in metrics:
        if metric.name not in trials[0].scores:
            continue
        points = []
        for position, trial in sorted(kept.items(), key=lambda item: item[0]):
            value, reach = trial.scores[metric.name], Z95 * trial.errors[metric.name]
            low, high = value - reach, value + reach
            if metric.is_rate:
                low, high = max(0.0, low), min(1.0, high)
            points.append(CurvePoint(position, value, low, high, trial.examples == most))
        best = min(points, key=lambda point: abs(point.weight - weight))
        curves.append(Curve(metric, points, best))
    return curves


def plot_curves(result: TuneResult, path: str | os.PathLike[str]) -> bool:
    """Draw the curves of a search (as Fig. 1 of the paper), with 95% bands of the change from the identity.

    Args:
        result: the result of a search.
        path: where to write; the suffix chooses PNG, SVG or PDF.

    Returns:
        Whether there was anything to draw.

    Raises:
        BnpatchError: the file can't be written.
    """
    from matplotlib.figure import Figure

    curves = global_search_curves(result)
    if not curves:
        return False
    label = weight_label(result)
    figure = Figure(figsize=(6.4, 2.1 + 1.9 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axis, curve in zip(axes, curves, strict=True):
        _draw(axis, curve, label)
    axes[-1].set_xscale("function", functions=(lambda a: np.sqrt(np.maximum(a, 0)), np.square))
    axes[-1].set_xticks(WEIGHT_TICKS, [f"{tick:g}" for tick in WEIGHT_TICKS], minor=False)
    axes[-1].set_xlim(0, 1)
    axes[-1].set_xlabel(weight_axis(result))
    axes[0].set_title(
        f"{result.num_tuning:,} tuning examples; {result.metric.name} was tuned; bands: 95% of the change",
        fontsize=10,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return True


def _draw(axis: Any, curve: Curve, weight: str) -> None:
    scale = 100 if curve.metric.is_rate else 1
    x = np.array([point.weight for point in curve.points])
    y, low, high = (
        scale * np.array([getattr(point, name) for point in curve.points])
        for name in ("value", "low", "high")
    )
    axis.fill_between(x, low, high, where=np.isfinite(high - low), color="#3d4f63", alpha=0.15, zorder=0)
    axis.plot(x, y, "-", color="#9aa5b1", linewidth=1.2, zorder=1)
    whole = np.array([point.is_whole for point in curve.points])
    for seen, colour, name in ((whole, "#3d4f63", None), (~whole, "#b3bdc7", "seen on fewer examples")):
        if seen.any():  # an empty line has no extent, which breaks the layout
            axis.plot(x[seen], y[seen], "o", color=colour, markersize=4, label=name, zorder=2, clip_on=False)
    for kind, point, text in curve.marked(weight):
        style, colour = _MARKS[kind]
        value = scale * point.value
        axis.plot(point.weight, value, style, color=colour, markersize=8, label=text, zorder=3, clip_on=False)
    axis.set_ylabel(f"{curve.metric.name}{' (%)' if curve.metric.is_rate else ''}")
    axis.grid(alpha=0.25)
    axis.legend(loc="best", frameon=False, fontsize=9)
