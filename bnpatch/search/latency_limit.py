"""The trade-off of gain and latency: patches of ever more norm layers, and which of them to choose."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.core.text import counted
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Z95, Estimate, Metric, Values, paired_difference
from bnpatch.models.base import Model
from bnpatch.models.latency import Latency, measure, norm_costs

#: Number of patches to measure, at most; six to ten show where the trade-off curve bends.
_FAMILY = 8


@dataclass(frozen=True)
class Point:
    """Weights with their gain and their latency.

    Attributes:
        weights: the weights.
        num_norms: number of norm layers that are patched.
        gain: mean over examples of the improvement over the baseline, in units of the metric; higher is
            better whatever the metric.
        standard_error: standard error of the gain.
        latency: latency, measured alternately with the baseline.
    """

    weights: PatchWeights
    num_norms: int
    gain: float
    standard_error: float
    latency: Latency

    @property
    def interval(self) -> Estimate:
        """The gain with its 95% interval."""
        reach = Z95 * self.standard_error
        return Estimate(self.gain, self.gain - reach, self.gain + reach)


@dataclass(frozen=True)
class Choice:
    """The point that was chosen, and the reason, as text for users."""

    point: Point
    reason: str


def nested_norms(importance: Mapping[str, float]) -> list[frozenset[str]]:
    """Return nested sets of norm layers, from none to all.

    Each set has the most important norm layers: those of the set before, and some more. The sizes grow
    geometrically, because the first few norm layers gain most per norm layer.

    Args:
        importance: gain per cost by name of norm layer, with costs from
            :func:`bnpatch.models.latency.norm_costs`. Ties are kept in this order.

    Returns:
        At most nine sets of names.
    """
    ranked = sorted(importance, key=lambda name: -importance[name])
    sizes = {round(size) for size in np.geomspace(1, len(ranked), _FAMILY)} if ranked else set()
    return [frozenset(ranked[:size]) for size in sorted({0, *sizes})]


def dominated(points: Sequence[Point]) -> list[bool]:
    """Tell for each point whether another costs no more, gains no less, and is strictly better in one."""

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.latency.ratio <= b.latency.ratio and a.gain >= b.gain
        return no_worse and (a.latency.ratio, a.gain) != (b.latency.ratio, b.gain)

    return [any(beats(other, point) for other in points) for point in points]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point dominates, the cheapest first."""
    marks = dominated(points)
    front = [point for point, mark in zip(points, marks, strict=True) if not mark]
    return sorted(front, key=lambda point: point.latency.ratio)


def choose(points: Sequence[Point], max_overhead: float) -> Choice:
    """Choose the point with the largest gain within the latency limit; the baseline where none gains.

    Args:
        points: the points, with the baseline, of gain 0, first.
        max_overhead: maximum ratio to the latency of the baseline, 1 or more, e.g. 1.1. It is compared with
            the median ratio, so that the interval of a noisy measurement may exceed it.
    """
    original, *patched = points
    if not patched:
        return Choice(original, "no norm layer has a weight")
    affordable = [point for point in patched if point.latency.ratio <= max_overhead]
    if not affordable:
        least = min(patched, key=lambda point: point.latency.ratio)
        noise = f", measured with an interval of {_interval(least)}" if least.latency.is_noisy else ""
        return Choice(
            original,
            f"the cheapest patch, of {counted(least.num_norms, 'norm layer')}, takes "
            f"{least.latency.ratio:.2f}x the time{noise}: more than {max_overhead:.2f}x",
        )
    best = max(affordable, key=lambda point: (point.gain, -point.latency.ratio))
    if best.gain <= 0:
        return Choice(original, f"nothing gains within {max_overhead:.2f}x of the time")
    return Choice(
        best,
        f"the largest gain within {max_overhead:.2f}x of the time: {counted(best.num_norms, 'norm layer')} "
        f"at {best.latency.ratio:.2f}x",
    )


def knee(points: Sequence[Point]) -> Point | None:
    """Return the point beyond which more latency gains little, as a suggestion to the user.

    It is the point of the Pareto front that lies farthest above the chord from the first point to the last,
    with both axes scaled to [0, 1] (the kneedle criterion of Satopaa et al. 2011).

    Returns:
        The point; None where no point of the front lies above the chord, as on a front of two points.
    """
    front = pareto_front(points)
    if front[0].gain == front[-1].gain:  # one point, or copies of it
        return None
    costs, gains = (
        np.array(values)
        for values in zip(*((point.latency.ratio, point.gain) for point in front), strict=True)
    )
    above = (gains - gains[0]) / (gains[-1] - gains[0]) - (costs - costs[0]) / (costs[-1] - costs[0])
    best = int(above.argmax())
    return front[best] if above[best] > 1e-9 else None  # ignores rounding on a straight front


def _interval(point: Point) -> str:
    return f"{point.latency.low:.2f}x to {point.latency.high:.2f}x"


def trade_off(
    model: Model[Any],
    weights: PatchWeights,
    scores: Callable[[PatchWeights], Values],
    metric: Metric,
    *,
    seconds: float,
    groups: Indices | None = None,
) -> list[Point]:
    """Measure gain and latency of the weights on ever more of the norm layers, the most important first.

    The importance of a norm layer is the loss in score when it alone is set to its baseline alpha, divided by
    its expected cost. Lambdas cost nothing, and all points but the first have them unchanged.

    Args:
        model: the model; its weights are any of those measured when this returns.
        weights: the weights to start from.
        scores: scores of weights, one per example, always of the same ones.
        metric: metric of these scores.
        seconds: seconds to measure latencies for, with one image at a time.
        groups: the group of each score; None if all are independent.

    Returns:
        The points, the baseline first.
    """
    baseline_alphas, sign = model.baseline_alphas(), metric.sign
    baseline = PatchWeights.baseline(baseline_alphas)
    weighted = [name for name, alpha in weights.alphas.items() if alpha != baseline_alphas[name]]
    whole, costs = scores(weights), norm_costs(model)

    def without(name: str) -> PatchWeights:
        return replace(weights, alphas={**weights.alphas, name: baseline_alphas[name]})

    def lost(name: str) -> float:
        rest = if_finite(lambda: scores(without(name)))
        return math.inf if rest is None else sign * float(np.mean(whole) - np.mean(rest))

    family = [
        replace(
            weights,
            alphas={n: a if n in norm_layers else baseline_alphas[n] for n, a in weights.alphas.items()},
        )
        for norm_layers in nested_norms({name: lost(name) / costs[name] for name in weighted})
    ]
    scored = [(member, if_finite(partial(scores, member))) for member in family if member != baseline]
    usable = [(member, after) for member, after in scored if after is not None]
    model.set_state(model.state.with_weights(replace(weights, alphas={}, lambdas={})))
    latencies = measure(model, [{}, *(member.alphas for member, _ in usable)], seconds=seconds)
    before = scores(baseline)
    points = [Point(baseline, 0, 0.0, 0.0, latencies[0])]
    for (member, after), latency in zip(usable, latencies[1:], strict=True):
        change = paired_difference(before, after, groups)
        count = sum(alpha != baseline_alphas[name] for name, alpha in member.alphas.items())
        points.append(Point(member, count, sign * change.value, change.reach / Z95, latency))
    return points
