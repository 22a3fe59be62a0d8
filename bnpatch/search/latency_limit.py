"""What a patch gains against what it costs: nested settings to measure, and which of them to take."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Z95, Estimate, Metric, Values, paired_difference
from bnpatch.models.latency import Latency, measure, norm_costs
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel

#: Settings of a family with norm layers; half a dozen to ten show where a curve bends.
_FAMILY = 8


@dataclass(frozen=True)
class Point:
    """A setting with what it gains and what it costs.

    Attributes:
        setting: weights by name of norm layer.
        num_norms: number of norm layers that weigh examples.
        gain: mean over examples of the improvement over the original, in units of the metric; more is
            better whatever the metric.
        standard_error: of the gain.
        latency: measured in turns with the original.
    """

    setting: PatchWeights
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
    """The point that was chosen, and why, in words for people."""

    point: Point
    reason: str


def nested_norms(importance: Mapping[str, float]) -> list[frozenset[str]]:
    """A nested family of norm layers, from none to all.

    Each member keeps the norm layers that matter most and adds some to those of the one before. Their numbers
    grow geometrically: the first few norm layers change most, per norm layer.

    Args:
        importance: by name of norm layer, how much it matters for the time that it takes: what it gains over
            its share of :func:`bnpatch.models.latency.norm_costs`. Ties go by the order.

    Returns:
        At most nine sets of names.
    """
    ranked = sorted(importance, key=lambda name: -importance[name])
    sizes = {round(size) for size in np.geomspace(1, len(ranked), _FAMILY)} if ranked else set()
    return [frozenset(ranked[:size]) for size in sorted({0, *sizes})]


def dominated(points: Sequence[Point]) -> list[bool]:
    """For each point: is there another that costs no more and gains no less, and is better in one of both?"""

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.latency.ratio <= b.latency.ratio and a.gain >= b.gain
        return no_worse and (a.latency.ratio, a.gain) != (b.latency.ratio, b.gain)

    return [any(beats(other, point) for other in points) for point in points]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, the cheapest first."""
    marks = dominated(points)
    front = [point for point, mark in zip(points, marks, strict=True) if not mark]
    return sorted(front, key=lambda point: point.latency.ratio)


def choose(points: Sequence[Point], max_overhead: float) -> Choice:
    """The point with the largest gain among those that are cheap enough; the original where none gains.

    Args:
        points: the original, of gain 0, first.
        max_overhead: largest ratio to the time of the original, 1 or more, e.g. 1.1. It is compared with the
            median ratio: the interval of a noisy measurement may reach beyond it.
    """
    original, *patched = points
    if not patched:
        return Choice(original, "no norm layer has a weight")
    affordable = [point for point in patched if point.latency.ratio <= max_overhead]
    if not affordable:
        least = min(patched, key=lambda point: point.latency.ratio)
        norm_layers = "one norm layer" if least.num_norms == 1 else f"{least.num_norms} norm layers"
        noise = f", measured with an interval of {_interval(least)}" if least.latency.is_noisy else ""
        return Choice(
            original,
            f"the cheapest patch, of {norm_layers}, takes {least.latency.ratio:.2f}x the time{noise}: "
            f"more than {max_overhead:.2f}x",
        )
    best = max(affordable, key=lambda point: (point.gain, -point.latency.ratio))
    if best.gain <= 0:
        return Choice(original, f"nothing gains within {max_overhead:.2f}x of the time")
    return Choice(
        best,
        f"the largest gain within {max_overhead:.2f}x of the time: {best.num_norms} norm layers "
        f"at {best.latency.ratio:.2f}x",
    )


def knee(points: Sequence[Point]) -> Point | None:
    """The point beyond which more time gains little: a suggestion where nobody has set a limit.

    It is the point of the Pareto front that lies farthest above the chord from its first to its last
    point, both axes scaled to [0, 1] (the kneedle criterion of Satopaa et al. 2011).

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
    return front[best] if above[best] > 1e-9 else None  # rounding on a straight front is no knee


def _interval(point: Point) -> str:
    return f"{point.latency.low:.2f}x to {point.latency.high:.2f}x"


def trade_off(
    model: TorchModel | OnnxModel,
    setting: PatchWeights,
    scores: Callable[[PatchWeights], Values],
    metric: Metric,
    *,
    seconds: float,
) -> list[Point]:
    """Measure gain and latency of ever more of the norm layers of a setting, the important ones first.

    A norm layer is important if the score suffers where it alone goes back to its identity, for the time that
    it is expected to take. Lambdas cost nothing and stay as they are in all but the first point.

    Args:
        model: left with any weights.
        setting: what to thin out.
        scores: of a setting, one per example, always of the same ones.
        metric: that these are of.
        seconds: to measure latencies for, one image at a time.

    Returns:
        The points, that of the original first.
    """
    identities, sign = model.identities(), metric.sign
    identity = PatchWeights(identities, dict.fromkeys(identities, 0.0))
    weighed = [name for name, alpha in setting.alphas.items() if alpha != identities[name]]
    whole, costs = scores(setting), norm_costs(model)

    def without(name: str) -> PatchWeights:
        return replace(setting, alphas={**setting.alphas, name: identities[name]})

    def lost(name: str) -> float:
        rest = if_finite(lambda: scores(without(name)))
        return math.inf if rest is None else sign * float(np.mean(whole) - np.mean(rest))

    family = [
        replace(
            setting, alphas={n: a if n in norm_layers else identities[n] for n, a in setting.alphas.items()}
        )
        for norm_layers in nested_norms({name: lost(name) / costs[name] for name in weighed})
    ]
    scored = [(member, if_finite(partial(scores, member))) for member in family if member != identity]
    usable = [(member, after) for member, after in scored if after is not None]
    latencies = measure(model, [{}, *(member.alphas for member, _ in usable)], seconds=seconds)
    before = scores(identity)
    points = [Point(identity, 0, 0.0, 0.0, latencies[0])]
    for (member, after), latency in zip(usable, latencies[1:], strict=True):
        change = paired_difference(before, after)
        count = sum(alpha != identities[name] for name, alpha in member.alphas.items())
        points.append(Point(member, count, sign * change.value, change.reach / Z95, latency))
    return points
