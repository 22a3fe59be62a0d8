import math
import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageColor

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.confusion import ClassChange
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.models.latency import Latency
from bnpatch.report.charts import (
    HEIGHT,
    WIDTH,
    curve_chart,
    depth_chart,
    distance_chart,
    palette,
    recall_chart,
    trade_off_chart,
    write_curves,
)
from bnpatch.report.curves import Curve, CurvePoint
from bnpatch.search.latency_limit import Point
from tests.report.test_curves import TRIALS, result


def drawn(chart):
    """The elements of a chart, which is well-formed; all that paths, dots and texts stand at is within it."""
    root = ElementTree.fromstring(chart)
    for path in root.iter("path"):
        if path.get("clip-path"):  # the others are the shapes of dots
            for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d")):
                assert -1 <= float(x) <= WIDTH + 1
                assert -1 <= float(y) <= HEIGHT + 1
    for element in [*root.iter("use"), *root.iter("text")]:
        assert -1 <= float(element.get("x")) <= WIDTH + 1
        assert -1 <= float(element.get("y")) <= HEIGHT + 1
    return root


def tips(chart):
    """What is shown when things are pointed at: texts, with the place of a dot where it is one."""
    places = {}
    for group in drawn(chart).iter("g"):
        if (tip := group.find("title")) is not None:
            dot = next(group.iter("use"), None)
            places[tip.text] = None if dot is None else (float(dot.get("x")), float(dot.get("y")))
    return places


def lines(chart, colour):
    """The corners of each line of a colour."""
    style = f"stroke: var(--{colour})"
    return [
        [tuple(map(float, pair)) for pair in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d"))]
        for path in drawn(chart).iter("path")
        if "fill: none" in path.get("style", "") and style in path.get("style") and path.get("clip-path")
    ]


def a_curve(metric, high=0.1):
    points = [
        CurvePoint(0.0, 0.4, 0.4, 0.4, 100),
        CurvePoint(0.04, 0.45, 0.4, 0.5, 20),
        CurvePoint(0.25, 0.6, 0.5, 0.7, 100),
        CurvePoint(0.49, 0.5, 0.5 - high, 0.5 + high, 20),
        CurvePoint(1.0, 0.2, 0.1, 0.3, 20),
    ]
    return Curve(metric, points, points[2])


def test_a_curve_is_on_a_root_axis():
    seen = tips(curve_chart(a_curve(ACCURACY), "alpha, the weight", "alpha", "c"))
    assert list(seen) == [
        "alpha = 0: 40.00%",
        "alpha = 0.04: 45.00%, from 20 of 100 examples",
        "alpha = 0.25: 60.00%",
        "alpha = 0.49: 50.00%, from 20 of 100 examples",
        "alpha = 1: 20.00%, from 20 of 100 examples",
        "baseline: 40.00%",
        "best, alpha = 0.25: 60.00%",
    ]
    (left, low), _, (middle, high), _, (right, lowest), *_ = seen.values()
    assert middle == pytest.approx((left + right) / 2, abs=0.1)  # sqrt(0.25) is half way
    assert high < low < lowest


def test_the_line_joins_what_the_same_examples_scored():
    curve = a_curve(ACCURACY)
    assert [point.weight for point in curve.line] == [0, 0.04, 0.49, 1]
    chart = curve_chart(curve, "alpha", "alpha", "c")
    line = max(lines(chart, "data"), key=len)
    seen = list(tips(chart).values())
    assert line == [pytest.approx(seen[index], abs=0.05) for index in (0, 1, 3, 4)]
    everywhere = replace(curve, points=[replace(point, examples=100) for point in curve.points])
    assert everywhere.line == everywhere.points


def test_few_examples_make_hollow_dots():
    def hollow(curve):
        chart = curve_chart(curve, "alpha", "alpha", "c")
        return sum("fill: var(--paper)" in use.get("style", "") for use in drawn(chart).iter("use"))

    curve = a_curve(ACCURACY)
    assert hollow(curve) == 3
    assert hollow(replace(curve, points=[replace(point, examples=100) for point in curve.points])) == 0


def test_an_infinite_interval_has_no_band():
    chart = curve_chart(a_curve(CROSS_ENTROPY, high=math.inf), "alpha", "alpha", "c")
    (use,) = (use for use in drawn(chart).iter("use") if "fill-opacity" in use.get("style", ""))
    (band,) = (path for path in drawn(chart).iter("path") if f"#{path.get('id')}" == use.get("href"))
    left, second, _, _, right, *_ = tips(chart).values()
    ends = {float(x) for x in re.findall(r"[ML] ([\d.]+)", band.get("d"))}
    assert sorted(ends) == [pytest.approx(x, abs=0.05) for x in (left[0], second[0], right[0])]
    assert "nan" not in chart
    assert "inf" not in chart


def test_the_baseline_as_the_best_is_marked_once():
    curve = a_curve(ACCURACY)
    assert [kind for kind, _, _ in replace(curve, best=curve.points[0]).marked("alpha")] == ["baseline"]
    assert [kind for kind, _, _ in curve.marked("alpha")] == ["baseline", "best"]


def test_bars_are_as_high_as_the_weights():
    weights = {"a": 0.1, "b": 0.05, "c": 0.0}
    chart = depth_chart(weights, {"a": (8, 8), "b": (8, 8), "c": (4, 4)}, "alpha", "d")
    heights = {}
    for group in drawn(chart).iter("g"):
        if (tip := group.find("title")) is not None:
            ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", group.find("path").get("d"))]
            heights[tip.text] = max(ys) - min(ys)
    assert list(heights) == ["a: alpha = 0.1", "b: alpha = 0.05", "c: alpha = 0"]
    a, b, c = heights.values()
    assert a == pytest.approx(2 * b, abs=0.1)
    assert 0 < c < 2  # it is seen, but small
    assert {"8x8", "4x4"} <= {text.text for text in drawn(chart).iter("text")}


def test_many_norm_layers_are_few_bytes():
    weights = {f"stage{index}.block.conv.bn": 0.1 + index / 1000 for index in range(170)}
    assert len(depth_chart(weights, {}, "alpha", "d")) < 60_000


SLOPED = PatchWeights({"a": 0.2, "b": 0.2, "c": 0.1}, {}, {"a": 0.5, "b": -1.0, "c": 0.0})


def test_the_weight_against_the_distance_has_a_line_per_slope():
    chart = distance_chart(SLOPED, "d")
    rising, falling = lines(chart, "data")
    assert rising[0][1] > rising[-1][1]  # heights count from the top
    assert falling[0][1] < falling[-1][1]
    texts = {text.text for text in drawn(chart).iter("text")}
    assert {"0.1", "1", "10"} <= texts
    assert not any("$" in text for text in texts)


def test_a_weight_of_the_variance_of_its_own_has_a_dotted_line():
    chart = distance_chart(PatchWeights({"a": 0.2}, slopes={"a": 0.5}, var_offsets={"a": 2.0}), "d")
    of_mean, of_var = lines(chart, "data")
    assert all(var[1] < mean[1] for mean, var in zip(of_mean, of_var, strict=True))  # heights from the top
    assert any("offset 2.00" in tip for tip in tips(chart))


def point(norm_layers, gain, ratio):
    latency = Latency(ratio, ratio, 0.95 * ratio, 1.05 * ratio, 8, 9)
    weights = PatchWeights({str(index): 0.1 for index in range(norm_layers)})
    return Point(weights, norm_layers, gain, 0.02, latency)


def test_the_front_is_joined_and_gains_have_no_intervals():
    points = [point(0, 0.0, 1.0), point(1, 0.3, 1.1), point(2, 0.1, 1.3), point(4, 0.4, 2.0)]
    chart = trade_off_chart(points, ACCURACY, "t")
    seen = tips(chart)
    assert list(seen)[1] == "1 norm layers: +30.00 at 1.10x"
    front, *_ = lines(chart, "pale")
    assert [front[0], front[2], front[-1]] == [
        pytest.approx(list(seen.values())[index], abs=0.05) for index in (0, 1, 3)
    ]
    whiskers = [line for line in lines(chart, "data") if len(line) == 2]
    assert len(whiskers) == 3  # the one that is beaten is pale
    assert all(start[1] == end[1] and start[0] < end[0] for start, end in whiskers)


def test_recalls_are_joined_and_any_name_may_stand_there():
    changes = [ClassChange(0, 10, 2, 8), ClassChange(1, 10, 8, 2), ClassChange(2, 10, 5, 5)]
    names = ["$\\frac{$", "猫\x1b\u202e\ufffe", "an unreasonably long name"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart = recall_chart(changes, names, "r")
    assert len(lines(chart, "good")[0]) == len(lines(chart, "bad")[0]) == 2
    texts = [text.text for text in drawn(chart).iter("text")]
    assert {"$\\frac{$", "猫\\x1b\\u202e\ufffd", "an unreasonably lon…"} <= set(texts)
    assert tips(chart)["an unreasonably long name: 50.0% → 50.0%"]


@pytest.mark.parametrize(
    "chart",
    [
        lambda name: curve_chart(a_curve(ACCURACY), "alpha", "alpha", name),
        lambda name: depth_chart({"a": 0.1, "b": 0.0}, {}, "alpha", name),
        lambda name: trade_off_chart([point(0, 0.0, 1.0), point(1, 0.3, 1.1)], ACCURACY, name),
        lambda name: recall_chart([ClassChange(0, 10, 2, 8)], ["a"], name),
        lambda name: distance_chart(SLOPED, name),
    ],
    ids=["curve", "depth", "trade-off", "recall", "distance"],
)
def test_a_chart_fits_into_any_page(chart, monkeypatch):
    import matplotlib

    first = chart("first")
    monkeypatch.setitem(matplotlib.rcParams, "xtick.labelsize", 30)  # a configuration of the user's own
    assert chart("first") == first
    assert chart("second") == first.replace("first-", "second-")
    root = drawn(first)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert not {"style", "metadata", "script"} & {element.tag for element in root.iter()}
    ids = {element.get("id") for element in root.iter()} - {None}
    assert all(each.startswith("first-") for each in ids)
    uses = {element.get("href", "#").removeprefix("#") for element in root.iter("use")}
    clips = {element.get("clip-path", "url(#)")[5:-1] for element in root.iter()} - {""}
    assert uses | clips <= ids
    assert set(re.findall(r"var\(--(\w+)\)", first)) <= set(palette())
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|https?:", first)


@pytest.mark.parametrize("trials", [TRIALS, TRIALS[::2]], ids=["some partial", "all whole"])
def test_a_picture(trials, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_curves(result(trials=trials), tmp_path / "curve.png")
    image = Image.open(tmp_path / "curve.png").convert("RGB")
    found = {colour for _, colour in image.getcolors(1 << 24)}
    expected = {name: ImageColor.getrgb(palette()[name]) for name in ("paper", "ink", "good", "pale")}
    assert {name for name, colour in expected.items() if colour in found} == set(expected) - (
        set() if trials is TRIALS else {"pale"}
    )


def test_a_metric_may_have_any_name(tmp_path):
    metric = replace(ACCURACY, name="$\\frac{$")
    trials = [replace(t, scores={metric.name: 0.5}, errors={metric.name: 0.1}) for t in TRIALS]
    assert write_curves(result(metric=metric, trials=trials), tmp_path / "curve.png")


def test_a_point_alone_is_a_curve():
    curve = a_curve(ACCURACY)
    alone = replace(curve, points=curve.points[:1], best=curve.points[0])
    assert list(tips(curve_chart(alone, "alpha", "alpha", "c"))) == ["alpha = 0: 40.00%", "baseline: 40.00%"]


def test_no_search_no_picture(tmp_path):
    assert not write_curves(result(), tmp_path / "curve.png")
    assert not write_curves(result(trials=TRIALS[-1:]), tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
