"""The charts of a search, drawn with matplotlib: inline SVG for the report, and a picture file of the curves.

The colours are the variables of ``report.css``. The SVG refers to them by name, so that the charts follow the
page from light to dark and to print. A chart is 360 units wide, about as wide as a phone's screen, so that
its text can be read there.
"""

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnpatch.core.io import atomic_path
from bnpatch.core.patch import PatchWeights
from bnpatch.core.text import visible
from bnpatch.evaluation.confusion import ClassChange
from bnpatch.evaluation.metrics import Metric
from bnpatch.report.curves import Curve, global_search_curves
from bnpatch.report.text import title, weight_axis, weight_label
from bnpatch.search.latency_limit import Point, dominated, knee, pareto_front
from bnpatch.search.result import TuneResult

WIDTH, HEIGHT = 360, 240

#: Ticks of the weight's axis, which has a square-root scale because useful weights are small.
WEIGHT_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)

# Range of distances to draw. That of a clean image is about 0.01 to 0.1, that of a strange one 1 to 10.
_DISTANCES = (0.01, 30.0)

# Shape and colour of marks; the shapes differ so that colour isn't needed.
_MARKS = {"baseline": ("s", "ink"), "best": ("D", "good")}

# The gid of what shows a text when it is pointed at: this, and the text.
_TIP = "tip:"

_LONGEST_NAME = 20


@cache
def palette() -> dict[str, str]:
    """Return the colours of the light scheme by name, from the style sheet."""
    css = files("bnpatch.report").joinpath("report.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css.split("}")[0]))


@contextmanager
def _styled() -> Iterator[dict[str, str]]:
    """Draw with the style of the report, whatever a user's own configuration is; yields the colours."""
    colours = palette()
    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "bnpatch",
        "text.parse_math": False,  # names of classes and metrics are text
        "font.size": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": colours["rule"],
        "axes.labelcolor": colours["muted"],
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["rule"],
        "text.color": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.major.pad": 7,
        "legend.frameon": False,
    }
    with style.context(["default", settings]), warnings.catch_warnings():
        # The browser has fonts of its own for names of classes.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield colours


def curve_chart(curve: Curve, axis_label: str, weight: str, name: str) -> Markup:
    """Draw a metric against the weight of the example, with a band of 95% intervals.

    Args:
        curve: a curve of a global search.
        axis_label: label of the horizontal axis.
        weight: name of the weight, for marks.
        name: what the ids of the chart begin with; no other chart of the page has it.
    """

    def draw(axes: Axes) -> None:
        _draw_curve(axes, curve, weight)
        _weight_axis(axes, axis_label)

    marks = "; ".join(text for _, _, text in curve.marked(weight))
    label = f"{title(curve.metric)} against {weight}. {marks}; {len(curve.points)} weights were tried"
    return svg(draw, name, label)


def write_curves(result: TuneResult, path: str | os.PathLike[str]) -> bool:
    """Write the curves of a search as one picture (as Fig. 1 of the paper).

    Args:
        result: the result of a search.
        path: where to write; the suffix chooses PNG, SVG or PDF.

    Returns:
        Whether there was anything to draw.

    Raises:
        BnpatchError: the file can't be written.
    """
    curves = global_search_curves(result)
    if not curves:
        return False
    with _styled() as colours, atomic_path(path) as temporary:
        figure = Figure((6.4, 2.1 + 1.9 * len(curves)), layout="constrained", facecolor=colours["paper"])
        every = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, curve in zip(every, curves, strict=True):
            _draw_curve(axes, curve, weight_label(result))
            axes.set_ylabel(f"{title(curve.metric)}{' (%)' if curve.metric.is_rate else ''}")
            axes.legend(fontsize=9)
        _weight_axis(every[-1], weight_axis(result))
        every[0].set_title(
            f"{result.num_tuning:,} tuning examples; {title(result.metric)} was tuned; "
            "bands and bars: 95% of the change",
            fontsize=10,
        )
        figure.savefig(temporary, dpi=150)
    return True


def _draw_curve(axes: Axes, curve: Curve, weight: str) -> None:
    """Draw points with their intervals, hollow where few examples were scored, and a line through equals."""
    scale, colours = _scale(curve.metric), palette()
    x, value, low, high = (
        np.array([getattr(point, name) for point in curve.line])
        for name in ("weight", "value", "low", "high")
    )
    known = np.isfinite(high - low)
    band = x[known], scale * low[known], scale * high[known]
    axes.fill_between(*band, color=colours["data"], alpha=0.15, linewidth=0)
    axes.plot(x, scale * value, color=colours["data"], linewidth=1.2)
    label = "scored on fewer examples"
    for point in curve.points:
        text = f"{weight} = {point.weight:.3g}: {curve.metric.format(point.value)}"
        options: dict[str, Any] = {"color": colours["data"], "markersize": 4.5}
        if point.examples < curve.most:
            text += f", from {point.examples:,} of {curve.most:,} examples"
            options = {"color": colours["pale"], "markerfacecolor": colours["paper"], "label": label}
            options["markersize"], label = 4, "_nolegend_"  # one of them is enough in the legend
        if point not in curve.line and np.isfinite(point.high - point.low):
            axes.vlines(point.weight, scale * point.low, scale * point.high, color=options["color"], lw=1.2)
        axes.plot([point.weight], [scale * point.value], "o", clip_on=False, gid=tip_id(text), **options)
    for kind, point, text in curve.marked(weight):
        shape, colour = _MARKS[kind]
        edge = colours["paper"]
        options = {"color": colours[colour], "markeredgecolor": edge, "markersize": 8, "label": text}
        axes.plot([point.weight], [scale * point.value], shape, clip_on=False, gid=tip_id(text), **options)
    axes.locator_params(axis="y", nbins=6)


def _weight_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("function", functions=(lambda a: np.sqrt(np.maximum(a, 0)), np.square))
    axes.set_xticks(WEIGHT_TICKS, [f"{tick:g}".replace("0.", ".") for tick in WEIGHT_TICKS])
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)


def depth_chart(
    weights: Mapping[str, float], shapes: Mapping[str, Sequence[int]], label: str, name: str
) -> Markup:
    """Draw a bar per norm layer, from the input of the model to its output.

    Args:
        weights: weights by name of norm layer, in the order of the model.
        shapes: known spatial shapes by name of norm layer; a stage begins where the shape changes.
        label: name of the weights.
        name: see :func:`curve_chart`.
    """

    def draw(axes: Axes) -> None:
        colours, left, top = palette(), -0.5, max(weights.values()) or 1.0
        for index, (shape, members) in enumerate(groupby(shapes.get(each) for each in weights)):
            right = left + len(list(members))
            if shapes and index % 2:
                axes.axvspan(left, right, color=colours["panel"], linewidth=0)
            if shape and right - left >= len(weights) / 10:  # else it has no room
                text = "x".join(map(str, shape))
                axes.text((left + right) / 2, 1.03 * top, text, ha="center", va="bottom", fontsize=10)
            left = right
        bars = axes.bar(range(len(weights)), [max(value, 0.005 * top) for value in weights.values()])
        for bar, (each, value) in zip(bars, weights.items(), strict=True):
            bar.set(color=colours["data" if value else "pale"], gid=tip_id(f"{each}: {label} = {value:.3g}"))
        axes.set(xlim=(-0.5, len(weights) - 0.5), ylim=(0, 1.02 * top), xticks=[])
        axes.set_xlabel("norm layers from input to output")
        axes.grid(axis="x", visible=False)

    span = f"from {min(weights.values()):.3g} to {max(weights.values()):.3g}"
    return svg(draw, name, f"{label} of {len(weights)} norm layers by depth, {span}")


def distance_chart(weights: PatchWeights, name: str) -> Markup:
    """Draw the weight of an example against its distance, a line per norm layer whose slope is not 0.

    Where the variance has another weight than the mean, that is a dotted line.

    Args:
        weights: the weights of a patch.
        name: see :func:`curve_chart`.
    """
    distance = np.geomspace(*_DISTANCES, 61)
    slopes = weights.in_effect("slope")

    def draw(axes: Axes) -> None:
        colours = palette()
        for each, slope in slopes.items():
            weight = weights.example_weight(each)
            tip = f"{each}: alpha = {weight.alpha:.3g} at distance 1, slope = {slope:.2f}"
            of_mean, of_var = weight.at(distance)
            lines = [(of_mean, "-", tip)]
            if weight.var_offset:
                lines.append((of_var, ":", f"{tip}, of the variance with offset {weight.var_offset:.2f}"))
            for share, line, text in lines:
                axes.plot(
                    distance,
                    share.example,
                    line,
                    color=colours["data"],
                    linewidth=1.5,
                    alpha=0.6,
                    gid=tip_id(text),
                )
        axes.set_xscale("log")
        # Labels of a logarithmic axis are mathematics by default, which text in SVG can't show.
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlim=_DISTANCES, ylim=(0, 1), xlabel="distance of the example", ylabel="its weight")

    return svg(draw, name, f"weight against distance at {len(slopes)} norm layers")


def trade_off_chart(points: Sequence[Point], metric: Metric, name: str) -> Markup:
    """Draw gain against time, with 95% intervals of the time and a line along the Pareto front.

    The gain has no interval: it is of the examples that chose the patch.
    """
    scale = _scale(metric)

    def draw(axes: Axes) -> None:
        colours, front = palette(), pareto_front(points)
        time, gain = ([p.latency.ratio for p in front], [scale * p.gain for p in front])
        axes.plot(time, gain, drawstyle="steps-post", color=colours["pale"], linewidth=1.5)
        for point, is_dominated in zip(points, dominated(points), strict=True):
            x, y = point.latency.ratio, scale * point.gain
            colour = colours["pale" if is_dominated else "data"]
            axes.hlines(y, point.latency.low, point.latency.high, color=colour, linewidth=1.5)
            text = f"{metric.format(point.gain, signed=True)} at {point.latency.ratio:.2f}x"
            tip = tip_id(f"{point.num_norms} norm layers: {text}")
            face = "none" if is_dominated else colour
            axes.plot([x], [y], "o", color=colour, markerfacecolor=face, markersize=5, gid=tip)
            axes.annotate(str(point.num_norms), (x, y), (5, -12), textcoords="offset points", fontsize=10)
        if best := knee(points):
            x, y = best.latency.ratio, scale * best.gain
            axes.plot([x], [y], "o", color=colours["ink"], markerfacecolor="none", markersize=13)
        axes.margins(y=0.15)
        axes.set_xlabel("time per batch, times the original's")

    return svg(draw, name, f"Gain in {title(metric)} against time of {len(points)} patches")


def recall_chart(changes: Sequence[ClassChange], names: Sequence[str], name: str) -> Markup:
    """Draw the recall of each class without and with the patch, joined by a line.

    Args:
        changes: the classes.
        names: names of these classes, in the same order.
        name: see :func:`curve_chart`.
    """

    def draw(axes: Axes) -> None:
        colours = palette()
        for row, (change, each) in enumerate(zip(changes, names, strict=True)):
            before, after = (100 * right / change.examples for right in (change.before, change.after))
            colour = colours["good" if after > before else "bad" if after < before else "pale"]
            axes.plot([before, after], [row, row], color=colour, linewidth=2)
            face, tip = colours["paper"], tip_id(f"{each}: {before:.1f}% → {after:.1f}%")
            axes.plot([before], [row], "o", color=colours["pale"], markerfacecolor=face, clip_on=False)
            axes.plot([after], [row], "o", color=colour, clip_on=False, gid=tip)
        axes.set_yticks(range(len(names)), [_short(each) for each in names])
        axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
        axes.set_xlabel("recall (%)")

    return svg(draw, name, f"Recall of {len(changes)} classes, before and after", 56 + 18 * len(changes))


def _scale(metric: Metric) -> int:
    return 100 if metric.is_rate else 1


def svg(draw: Callable[[Axes], None], name: str, label: str, height: int = HEIGHT) -> Markup:
    """Return what ``draw`` draws as SVG to stand in a page, with ids that begin with ``name``."""
    content = io.StringIO()
    with _styled():
        figure = Figure((WIDTH / 72, height / 72), layout="constrained")
        draw(figure.subplots())
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(content.getvalue())
    names = {colour: variable for variable, colour in palette().items()}
    for element in root.iter():
        _fit_into_page(element, name, names)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "chart", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _fit_into_page(element: ElementTree.Element, name: str, variables: Mapping[str, str]) -> None:
    """Change one element of matplotlib's SVG: ids, colours, fonts, tips; and leave out what a page has."""
    element.tag = element.tag.rpartition("}")[2]  # in a page, elements need no name space
    for child in element.findall("{*}style"):
        element.remove(child)  # it would style the whole page
    given = dict(element.attrib)
    element.attrib.clear()
    for key, value in given.items():
        key = key.rpartition("}")[2]
        if key == "style":
            value = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{variables[found[0]]})", value)
            value = re.sub(r"font: (\S+px)[^;]*", r"font-size: \1", value)
            value = re.sub(r"font-family: [^;]*;? ?", "", value)
        elif key in ("href", "clip-path"):
            value = value.replace("#", f"#{name}-")
        elif key == "id":
            if value.startswith(_TIP):
                tip = ElementTree.Element("title")
                tip.text = value.removeprefix(_TIP)
                element.insert(0, tip)
            if element.tag == "g":  # nothing refers to groups
                continue
            value = f"{name}-{value}"
        else:
            value = " ".join(re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", value).split())
        element.set(key, value)
    if element.tag not in ("text", "title"):
        element.text = None
    element.tail = None


def tip_id(text: str) -> str:
    """Return a gid that shows a text where its mark is pointed at."""
    return _TIP + _plain(text)


def _plain(text: str) -> str:
    """Return text that may stand in XML."""
    return "".join(character if character.isprintable() else "\ufffd" for character in visible(text))


def _short(name: str) -> str:
    name = _plain(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
