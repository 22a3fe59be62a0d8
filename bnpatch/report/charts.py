"""The charts of the report, as SVG; the report's style sheet has their colours.

A chart is 360 units wide, about as wide as a phone's screen, so that its text can be read there.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from bnpatch.evaluation.metrics import Estimate, Metric
from bnpatch.report.curves import WEIGHT_TICKS, Curve
from bnpatch.report.markup import Markup, join, tag
from bnpatch.search.latency_limit import Point, dominated, knee, pareto_front

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 14, 36


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, linearly after applying ``bend``."""

    low: float
    high: float
    start: float
    end: float
    bend: Callable[[float], float] = lambda value: value

    def __call__(self, value: float) -> float:
        low, high = self.bend(self.low), self.bend(self.high)
        part = (self.bend(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.start + part * (self.end - self.start)


def curve_chart(curve: Curve, axis_label: str, weight: str) -> Markup:
    """Draw a metric against the weight of the example, with a band of 95% intervals.

    Args:
        curve: a curve of a global search.
        axis_label: label of the horizontal axis.
        weight: name of the weight, for marks.
    """
    points = curve.points
    finite = [end for p in points for end in (p.low, p.value, p.high) if math.isfinite(end)]
    scale = 100 if curve.metric.is_rate else 1
    y, y_ticks = _vertical([scale * value for value in finite])
    x = _Axis(0, 1, _LEFT, WIDTH - _RIGHT, math.sqrt)
    banded = [p for p in points if math.isfinite(p.high - p.low)]
    upper = [(x(p.weight), y(scale * p.high)) for p in banded]
    lower = [(x(p.weight), y(scale * p.low)) for p in reversed(banded)]
    marks = curve.marked(weight)
    return _svg(
        f"{curve.metric.name} against {weight}",
        "; ".join(text for _, _, text in marks) + f"; {len(points)} weights were tried",
        _grid(x, y, WEIGHT_TICKS, y_ticks, axis_label),
        tag("path", d=_path(upper + lower), class_="band"),
        tag("path", d=_path([(x(p.weight), y(scale * p.value)) for p in points]), class_="line"),
        *(
            tag(
                "circle",
                tag("title", f"{weight} = {p.weight:.3g}: {curve.metric.format(p.value)}"),
                cx=x(p.weight),
                cy=y(scale * p.value),
                r=3,
                class_="dot" if p.is_whole else "dot pale",
            )
            for p in points
        ),
        *(_mark(kind, x(point.weight), y(scale * point.value), text) for kind, point, text in marks),
    )


def depth_chart(weights: Mapping[str, float], shapes: Mapping[str, Sequence[int]], label: str) -> Markup:
    """Draw a bar per norm layer, from the input of the model to its output.

    Args:
        weights: weights by name of norm layer, in the order of the model.
        shapes: known spatial shapes by name of norm layer; a stage begins where the shape changes.
        label: name of the weights.
    """
    y, y_ticks = _vertical([0.0, max(weights.values())], includes_top=False)
    step = (WIDTH - _RIGHT - _LEFT) / len(weights)
    bottom, parts, left = y(0), [], 0
    stages = [(shape, len(list(group))) for shape, group in groupby(shapes.get(name) for name in weights)]
    for index, (shape, count) in enumerate(stages):
        x, width = _LEFT + step * left, step * count
        if shapes and index % 2:
            parts.append(tag("rect", x=x, y=_TOP, width=width, height=bottom - _TOP, class_="stage"))
        if shape and width >= 30:
            text = "x".join(map(str, shape))
            parts.append(tag("text", text, x=x + width / 2, y=_TOP - 4, class_="tick", text_anchor="middle"))
        left += count
    for index, (name, value) in enumerate(weights.items()):
        top = min(y(value), bottom - 1)  # a weight of 0 still gets a visible bar
        bar = {"x": _LEFT + step * (index + 0.1), "y": top, "width": 0.8 * step, "height": bottom - top}
        text = f"{name}: {label} = {value:.3g}"
        parts.append(tag("rect", tag("title", text), **bar, class_="bar" if value else "bar pale"))
    return _svg(
        f"{label} of {len(weights)} norm layers by depth",
        f"from {min(weights.values()):.3g} to {max(weights.values()):.3g}; the table below has the numbers",
        _grid(_Axis(0, 1, _LEFT, WIDTH - _RIGHT), y, (), y_ticks, "norm layers from input to output"),
        *parts,
    )


def trade_off_chart(points: Sequence[Point], metric: Metric) -> Markup:
    """Draw gain against time, with 95% intervals of both and a line along the Pareto front."""
    scale = 100 if metric.is_rate else 1
    spans = [(scale * p.interval.low, scale * p.interval.high) for p in points]
    y, y_ticks = _vertical([0.0, *(end for span in spans for end in span)])
    ends = [1.0, *(end for p in points for end in (p.latency.low, p.latency.ratio, p.latency.high))]
    x_ticks = _ticks(min(ends), max(ends), 5)
    x = _Axis(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    parts = []
    for point, is_dominated, (low, high) in zip(points, dominated(points), spans, strict=True):
        cx, cy = x(point.latency.ratio), y(scale * point.gain)
        pale = " pale" if is_dominated else ""
        gain = metric.format(point.gain, signed=True)
        text = f"{point.num_norms} norm layers: {gain} at {point.latency.ratio:.2f}x"
        slower = f"M{x(point.latency.low):.1f} {cy:.1f}H{x(point.latency.high):.1f}"
        whiskers = f"M{cx:.1f} {y(low):.1f}V{y(high):.1f}{slower}"
        parts += [
            tag("path", d=whiskers, class_=f"whisker{pale}"),
            tag("circle", tag("title", text), cx=cx, cy=cy, r=3, class_=f"dot{pale}"),
            tag("text", str(point.num_norms), x=cx + 5, y=cy + 12, class_="tick"),
        ]
    front = pareto_front(points)
    steps = f"M{x(front[0].latency.ratio):.1f} {y(scale * front[0].gain):.1f}" + "".join(
        f"H{x(p.latency.ratio):.1f}V{y(scale * p.gain):.1f}" for p in front[1:]
    )
    if bend := knee(points):
        cx, cy = x(bend.latency.ratio), y(scale * bend.gain)
        parts.append(tag("circle", tag("title", "knee"), cx=cx, cy=cy, r=7, class_="ring"))
    return _svg(
        f"gain in {metric.name} against time",
        f"{len(points)} patches measured; the table below has the numbers",
        _grid(x, y, x_ticks, y_ticks, "time per batch, times the original's"),
        tag("path", d=steps, class_="line"),
        *parts,
    )


def strip(estimate: Estimate, span: tuple[float, float]) -> Markup:
    """Draw an interval for one row of a table.

    Args:
        estimate: the estimate to draw.
        span: ends of the axis, which is the same in all rows; it includes 0, which is marked.
    """
    x = _Axis(*span, 4, 116)
    ends = [x(end) for end in (estimate.low, estimate.high)]
    return tag(
        "svg",
        tag("path", d=f"M{x(0):.1f} 1V15", class_="axis"),
        tag("path", d=f"M{ends[0]:.1f} 8H{ends[1]:.1f}", class_="whisker"),
        tag("circle", cx=x(estimate.value), cy=8, r=3.5, class_="dot"),
        viewBox="0 0 120 16",
        class_="strip",
        aria_hidden="true",
    )


def _svg(title: str, description: str, *children: str) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *children,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )


def _vertical(values: Sequence[float], includes_top: bool = True) -> tuple[_Axis, list[float]]:
    """The vertical axis and its ticks."""
    ticks = _ticks(min(values), max(values), 5)
    high = ticks[-1] if includes_top else max(values) or 1.0
    ticks = [tick for tick in ticks if tick <= high]
    return _Axis(ticks[0], high, HEIGHT - _BOTTOM, _TOP), ticks


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Choose about ``count`` round numbers, from at most ``low`` to at least ``high``."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _grid(x: _Axis, y: _Axis, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> Markup:
    def draw() -> Iterator[Markup]:
        for tick in y_ticks:
            yield tag("path", d=f"M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}", class_="grid")
            yield tag("text", f"{tick:.6g}", x=_LEFT - 6, y=y(tick) + 4, class_="tick", text_anchor="end")
        for tick in x_ticks:
            yield tag("path", d=f"M{x(tick):.1f} {_TOP}V{HEIGHT - _BOTTOM}", class_="grid")
            text = f"{tick:.3g}".replace("0.", ".", 1) if 0 < tick < 1 else f"{tick:.3g}"
            yield tag("text", text, x=x(tick), y=HEIGHT - _BOTTOM + 14, class_="tick", text_anchor="middle")
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        below = HEIGHT - (5 if x_ticks else _BOTTOM - 16)
        yield tag("text", x_label, x=middle, y=below, class_="tick", text_anchor="middle")

    return join(draw())


def _mark(kind: str, x: float, y: float, text: str) -> Markup:
    """Draw a mark: a square for the identity, a diamond for the best, so that colour isn't needed."""
    d = (
        f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"
        if kind == "identity"
        else f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7-7z"
    )
    return tag("path", tag("title", text), d=d, class_=f"mark {kind}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
