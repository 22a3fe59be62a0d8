"""The curves of the global search for one alpha: each metric against the weight of the example."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Z95, Metric
from bnpatch.report.text import baseline_alphas
from bnpatch.search.result import TuneResult


@dataclass(frozen=True)
class CurvePoint:
    """A weight and its score.

    Attributes:
        weight: distance from the weight that changes nothing, in [0, 1].
        value: mean of the metric.
        low: lower end of the 95% interval of the change from the baseline, added to the baseline's value.
        high: upper end of this interval, likewise.
        examples: number of examples that were scored; the value is extrapolated from these to all.
    """

    weight: float
    value: float
    low: float
    high: float
    examples: int


@dataclass(frozen=True)
class Curve:
    """One metric of the tuning examples against the weight of the example.

    Attributes:
        metric: the metric.
        points: points in the order of their weights, which are unique; the first is the baseline.
        best: the point that the global search found, which is the best by the tuned metric.
    """

    metric: Metric
    points: Sequence[CurvePoint]
    best: CurvePoint

    @property
    def baseline(self) -> CurvePoint:
        """The point of the model as it was loaded."""
        return self.points[0]

    @property
    def most(self) -> int:
        """The number of examples that the baseline and the best point were scored on."""
        return max(point.examples for point in self.points)

    @property
    def line(self) -> list[CurvePoint]:
        """The points that a line may join: the baseline, and most of those with the same examples.

        A line through points that were scored on different examples would jump where these differ.
        """
        counts = Counter(point.examples for point in self.points[1:])
        usual = max(counts, key=lambda examples: (counts[examples], examples), default=self.most)
        return [self.baseline, *(point for point in self.points[1:] if point.examples == usual)]

    def marked(self, weight: str) -> list[tuple[str, CurvePoint, str]]:
        """List the points to mark: "baseline" or "best", the point, and its label."""
        marks = [("baseline", self.baseline, "baseline")]
        if self.best is not self.baseline:
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
    # If two trials have one weight, the one with more examples is the better estimate.
    kept = {t.weight: t for t in sorted(trials, key=lambda trial: trial.examples) if t.weight is not None}
    baseline = baseline_alphas(result)
    weight = max((abs(a - baseline[name]) for name, a in candidate.weights.alphas.items()), default=0.0)
    metrics = [result.metric, *(m for m in (ACCURACY, CROSS_ENTROPY) if m.name != result.metric.name)]
    curves = []
    for metric in metrics:
        if metric.name not in trials[0].scores:
            continue
        points = []
        for position, trial in sorted(kept.items(), key=lambda item: item[0]):
            value, reach = trial.scores[metric.name], Z95 * trial.errors[metric.name]
            low, high = metric.clip(value - reach), metric.clip(value + reach)
            points.append(CurvePoint(position, value, low, high, trial.examples))
        best = min(points, key=lambda point: abs(point.weight - weight))
        curves.append(Curve(metric, points, best))
    return curves
