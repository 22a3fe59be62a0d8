"""Nested settings, and the choice among points that were measured."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.models.latency import Latency
from bnpatch.search.latency_limit import Point, choose, dominated, knee, nested_norms, pareto_front


def point(num_norms, ratio, gain, spread=0.01):
    weights = PatchWeights({f"norm layer{index}": 0.1 if index < num_norms else 0.0 for index in range(8)})
    return Point(weights, num_norms, gain, 0.01, Latency(ratio, ratio, ratio - spread, ratio + spread, 1, 9))


ORIGINAL = point(0, 1.0, 0.0, spread=0.0)
#: As measured curves look: most of the gain comes early; one is dominated.
POINTS = [ORIGINAL, point(1, 1.02, 0.10), point(2, 1.05, 0.18), point(4, 1.20, 0.17), point(8, 1.60, 0.21)]


@pytest.mark.parametrize("n", [1, 2, 3, 15, 53, 300])
def test_sites_are_nested_from_none_to_all(n):
    importance = {f"s{index}": math.sin(17 * index) for index in range(n)}
    family = nested_norms(importance)
    assert family[0] == set()
    assert family[-1] == set(importance)
    assert all(small < large for small, large in pairwise(family))
    assert len(family) == min(n + 1, 8 if n == 15 else 9)
    for names in family:
        left_out = [importance[name] for name in importance.keys() - names]
        assert not names or min(importance[name] for name in names) >= max(left_out, default=-1)


def test_no_sites_are_one_family():
    assert nested_norms({}) == [frozenset()]


def test_dominated_points_are_marked():
    assert dominated(POINTS) == [False, False, False, True, False]
    assert [p.num_norms for p in pareto_front(list(reversed(POINTS)))] == [0, 1, 2, 8]
    assert dominated([ORIGINAL, ORIGINAL]) == [False, False]  # copies don't beat each other
    # A gain for less time than the original's, which noise can give, beats the original.
    assert dominated([ORIGINAL, point(1, 0.99, 0.1)]) == [True, False]


@pytest.mark.parametrize(
    ("max_overhead", "num_norms"), [(1.0, 0), (1.02, 1), (1.04, 1), (1.1, 2), (1.5, 2), (1.6, 8), (9, 8)]
)
def test_the_choice_is_the_best_that_is_cheap_enough(max_overhead, num_norms):
    assert choose(POINTS, max_overhead).point.num_norms == num_norms


def test_the_original_is_chosen_with_a_reason():
    choice = choose(POINTS, 1.01)
    assert choice.point is ORIGINAL
    assert choice.reason == "the cheapest patch, of 1 norm layer, takes 1.02x the time: more than 1.01x"
    noisy = choose([ORIGINAL, point(1, 1.15, 0.1, spread=0.1)], 1.1)
    assert noisy.point is ORIGINAL
    assert "measured with an interval of 1.05x to 1.25x" in noisy.reason
    assert choose([ORIGINAL, point(1, 1.01, -0.1)], 1.1).point is ORIGINAL
    assert "nothing gains" in choose([ORIGINAL, point(1, 1.01, 0.0)], 1.1).reason
    assert choose([ORIGINAL], 1.1).reason == "no norm layer has a weight"


def test_of_equal_gains_the_cheaper_is_chosen():
    assert choose([ORIGINAL, point(4, 1.3, 0.1), point(2, 1.2, 0.1)], 2).point.num_norms == 2


def test_the_knee_is_where_the_curve_bends():
    assert knee(POINTS).num_norms == 2
    # Units of either axis don't matter.
    scaled = [replace(p, gain=1000 * p.gain) for p in POINTS]
    assert knee(scaled).num_norms == 2
    straight = [point(n, 1 + 0.1 * n, 0.1 * n) for n in range(4)]
    hollow = [ORIGINAL, point(1, 1.5, 0.1), point(2, 1.6, 1.0)]
    for none in ([ORIGINAL], POINTS[:2], straight, hollow, [ORIGINAL, point(1, 1.2, -0.1)]):
        assert knee(none) is None
