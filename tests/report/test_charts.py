import math
import re

import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Estimate
from bnpatch.models.latency import Latency
from bnpatch.report.charts import HEIGHT, WIDTH, _ticks, curve_chart, depth_chart, strip, trade_off_chart
from bnpatch.report.curves import Curve, CurvePoint
from bnpatch.search.latency_limit import Point
from tests.report.html_page import Page


def values(chart, tag, name):
    return [float(value) for value in re.findall(rf'<{tag}[^>]* {name}="([^"]*)"', chart)]


def is_within(chart):
    """Are all points that paths go to, and all centres, within the chart?"""
    pairs = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", chart)
    xs = [float(x) for x, _ in pairs] + values(chart, "circle", "cx") + values(chart, "rect", "x")
    ys = [float(y) for _, y in pairs] + values(chart, "circle", "cy") + values(chart, "rect", "y")
    return all(0 <= x <= WIDTH for x in xs) and all(0 <= y <= HEIGHT for y in ys)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (9.7, 45.1, [0, 10, 20, 30, 40, 50]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (3, 3, [2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6]),
        (0, 3e-7, [0, 1e-7, 2e-7, 3e-7]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert _ticks(low, high, 5) == pytest.approx(expected, abs=1e-12)


def a_curve(metric, high=0.5):
    points = [
        CurvePoint(0.0, 0.4, 0.4, 0.4, True),
        CurvePoint(0.25, 0.6, 0.5, 0.7, True),
        CurvePoint(1.0, 0.2, 0.2 - high, 0.2 + high, False),
    ]
    return Curve(metric, points, points[1])


def test_a_curve_is_on_a_root_axis():
    chart = curve_chart(a_curve(ACCURACY), "alpha, the weight", "alpha")
    left, middle, right = values(chart, "circle", "cx")
    assert middle == pytest.approx((left + right) / 2, abs=0.1)  # sqrt(0.25) is half way
    y = values(chart, "circle", "cy")
    assert y[1] < y[0] < y[2]
    assert chart.count('class="dot pale"') == 1
    assert is_within(chart)
    page = Page(chart)
    assert "identity: 40.00%; best, alpha = 0.25: 60.00%; 3 weights were tried" in page.text
    assert "alpha = 1: 20.00%" in page.text


def test_an_infinite_interval_has_no_band():
    chart = curve_chart(a_curve(CROSS_ENTROPY, high=math.inf), "alpha", "alpha")
    (band,) = re.findall(r'd="([^"]*)" class="band"', chart)
    assert band.count("L") == 3  # two points, there and back
    assert is_within(chart)
    assert "nan" not in chart
    assert "inf" not in chart


def test_the_identity_as_the_best_is_marked_once():
    curve = a_curve(ACCURACY)
    curve = Curve(ACCURACY, curve.points, curve.points[0])
    assert curve_chart(curve, "alpha", "alpha").count('class="mark') == 1


def test_bars_are_as_high_as_the_weights():
    weights = {"a": 0.1, "b": 0.05, "c": 0.0}
    chart = depth_chart(weights, {"a": (8, 8), "b": (8, 8), "c": (4, 4)}, "alpha")
    bars = re.findall(r'<rect [^>]*height="([\d.]+)" class="bar', chart)
    heights = [float(height) for height in bars]
    assert heights[0] == pytest.approx(2 * heights[1])
    assert 0 < heights[2] <= 1
    assert chart.count('class="stage"') == 1
    page = Page(chart)
    assert "8x8 4x4" in page.text
    assert "b: alpha = 0.05" in page.text
    assert is_within(chart)


def test_many_sites_are_few_bytes():
    weights = {f"stage{index}.block.conv.bn": 0.1 + index / 1000 for index in range(170)}
    chart = depth_chart(weights, {}, "alpha")
    assert len(chart) < 40_000
    assert "stage" not in re.findall(r'class="([^"]*)"', chart)
    assert is_within(chart)


def test_the_front_is_joined_and_what_is_beaten_is_pale():
    def point(norm_layers, gain, ratio):
        latency = Latency(ratio, ratio, 0.95 * ratio, 1.05 * ratio, 8, 9)
        return Point(
            PatchWeights({str(index): 0.1 for index in range(norm_layers)}), norm_layers, gain, 0.02, latency
        )

    points = [point(0, 0.0, 1.0), point(1, 0.3, 1.1), point(2, 0.1, 1.3), point(4, 0.4, 2.0)]
    chart = trade_off_chart(points, ACCURACY)
    assert chart.count('class="dot pale"') == 1
    assert chart.count('class="ring"') == 1
    (front,) = re.findall(r'd="([^"]*)" class="line"', chart)
    assert front.count("H") == 2  # two steps from the original
    x = values(chart, "circle", "cx")
    assert front.startswith(f"M{x[0]:.1f} ")
    assert is_within(chart)


def test_a_strip_marks_zero():
    drawn = strip(Estimate(0.5, 0.25, 0.75), (0.0, 1.0))
    assert values(drawn, "circle", "cx") == [60]
    assert "M4.0 1V15" in drawn
    assert "M32.0 8H88.0" in drawn
