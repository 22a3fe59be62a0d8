"""What a patch gains against what it costs: nested settings to measure, and which of them to take."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnpatch.bench import Latency
from bnpatch.errors import BnpatchError
from bnpatch.files import atomic_path
from bnpatch.metrics import Metric
from bnpatch.setting import Setting

#: Settings of a family with sites; half a dozen to ten show where a curve bends.
_FAMILY = 8


@dataclass(frozen=True)
class Point:
    """A setting with what it gains and what it costs.

    Attributes:
        setting: weights by name of site.
        num_sites: number of sites that weigh examples.
        gain: mean over examples of the improvement over the original, in units of the metric; more is
            better whatever the metric.
        standard_error: of the gain.
        latency: measured in turns with the original.
    """

    setting: Setting
    num_sites: int
    gain: float
    standard_error: float
    latency: Latency


@dataclass(frozen=True)
class Choice:
    """The point that was chosen, and why, in words for people."""

    point: Point
    reason: str


def nested_sites(importance: Mapping[str, float]) -> list[frozenset[str]]:
    """A nested family of sites, from none to all.

    Each member keeps the sites that matter most and adds some to those of the one before. Their numbers
    grow geometrically: the first few sites change most, per site.

    Args:
        importance: by name of site, how much it matters for the time that it takes: what it gains over its
            share of :func:`bnpatch.bench.site_costs`. Ties go by the order.

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
        max_overhead: largest ratio to the time of the original, e.g. 1.1. It is compared with the median
            ratio: the interval of a noisy measurement may reach beyond it.

    Raises:
        BnpatchError: ``max_overhead`` is less than 1.
    """
    if not max_overhead >= 1:
        raise BnpatchError(
            f"an overhead of {max_overhead:g} times the original's time is not possible",
            "write 1.1 for a tenth more",
        )
    original, *patched = points
    if not patched:
        return Choice(original, "no site has a weight")
    affordable = [point for point in patched if point.latency.ratio <= max_overhead]
    if not affordable:
        least = min(patched, key=lambda point: point.latency.ratio)
        sites = "one site" if least.num_sites == 1 else f"{least.num_sites} sites"
        noise = f", measured with an interval of {_interval(least)}" if least.latency.is_noisy else ""
        return Choice(
            original,
            f"the cheapest patch, of {sites}, takes {least.latency.ratio:.2f}x the time{noise}: "
            f"more than {max_overhead:.2f}x",
        )
    best = max(affordable, key=lambda point: (point.gain, -point.latency.ratio))
    if best.gain <= 0:
        return Choice(original, f"nothing gains within {max_overhead:.2f}x of the time")
    return Choice(
        best,
        f"the largest gain within {max_overhead:.2f}x of the time: {best.num_sites} sites "
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


def plot_trade_off(
    points: Sequence[Point],
    path: str | os.PathLike[str],
    metric: Metric,
    *,
    chosen: Point | None = None,
    max_overhead: float | None = None,
) -> None:
    """Draw gain against latency: the Pareto front, dominated points pale, the chosen point and the knee.

    Args:
        points: what was measured.
        path: where to write, by its suffix a PNG, SVG or PDF file.
        metric: that the gain is of.
        chosen: see :func:`choose`.
        max_overhead: drawn as a limit.

    Raises:
        BnpatchError: the file can't be written.
    """
    from matplotlib.figure import Figure

    scale = 100 if metric.is_rate else 1
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="#9aa5b1", linewidth=0.8, zorder=0)
    for point, is_dominated in zip(points, dominated(points), strict=True):
        latency = point.latency
        axis.errorbar(
            latency.ratio,
            scale * point.gain,
            xerr=[[latency.ratio - latency.low], [latency.high - latency.ratio]],
            yerr=1.96 * scale * point.standard_error,
            fmt="o",
            color="#3d4f63",
            alpha=0.3 if is_dominated else 1,
            markersize=5,
            elinewidth=0.9,
            zorder=2,
        )
        axis.annotate(
            str(point.num_sites),
            (latency.ratio, scale * point.gain),
            xytext=(7, -13),
            textcoords="offset points",
            fontsize=8,
            color="#9aa5b1" if is_dominated else "#3d4f63",
        )
    front = pareto_front(points)
    costs, gains = [p.latency.ratio for p in front], [scale * p.gain for p in front]
    axis.step(costs, gains, where="post", color="#9aa5b1", linewidth=1.2, zorder=1)
    for marked, name, style, colour, size in (
        (chosen, "chosen", "D", "#1f7a4d", 9),
        (knee(points), "knee", "o", "#c0392b", 15),
    ):
        if marked is not None:
            sites = f"{marked.num_sites} site{'' if marked.num_sites == 1 else 's'}"
            gain = f"{metric.format(marked.gain, signed=True)} at {marked.latency.ratio:.2f}x"
            axis.plot(
                marked.latency.ratio,
                scale * marked.gain,
                style,
                markersize=size,
                color=colour,
                fillstyle="none" if name == "knee" else "full",
                markeredgewidth=1.6,
                linestyle="none",
                label=f"{name}, {sites}: {gain}",
                zorder=3,
            )
    if max_overhead is not None:
        axis.axvline(
            max_overhead, color="#c0392b", linewidth=1, linestyle=":", label=f"limit {max_overhead:g}x"
        )
    axis.set_xlabel("time per batch, times the original's")
    axis.set_ylabel(f"gain in {metric.name}{' (points)' if metric.is_rate else ''}")
    axis.set_title("numbers are patched sites; bars are 95% intervals", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", frameon=False, fontsize=9, markerscale=0.6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _interval(point: Point) -> str:
    return f"{point.latency.low:.2f}x to {point.latency.high:.2f}x"
