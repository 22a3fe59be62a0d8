import numpy as np
import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.search.coordinate_search import Coordinate, coordinate_search

NORM_LAYERS = [f"s{index}" for index in range(30)]
START = PatchWeights(dict.fromkeys(NORM_LAYERS, 0.0), dict.fromkeys(NORM_LAYERS, 0.0))
COORDINATES = [Coordinate("alpha", (name,)) for name in NORM_LAYERS]


def scored(best, calls=None):
    """Scores of 200 examples that fall with the distance to the best setting."""
    rng = np.random.default_rng(0)
    each = rng.normal(1, 0.2, (200, 1))
    level = rng.normal(0, 1, 200)

    def scores(weights):
        if calls is not None:
            calls.append(weights)
        loss = sum((weights.alphas[name] - value) ** 2 for name, value in best.items())
        loss += 0.5 * sum(alpha for name, alpha in weights.alphas.items() if name not in best)
        return level - each[:, 0] * loss

    return scores


def test_finds_the_norm_layers_that_matter():
    best = {"s3": 0.5, "s17": 0.2, "s20": 1.0}
    found = coordinate_search(scored(best), START, COORDINATES)
    assert found.alphas == START.alphas | best


def test_a_change_that_overflows_is_not_made():
    """The next best is."""
    best = {"s3": 0.5, "s17": 0.2}
    scores = scored(best)
    found = coordinate_search(
        lambda weights: None if weights.alphas["s3"] == 0.5 else scores(weights),
        START,
        COORDINATES,
        rounds=1,
    )
    assert found.alphas == START.alphas | {"s3": 0.2, "s17": 0.2}


@pytest.mark.parametrize(("gain", "taken"), [(0.5, False), (3.0, True)])
def test_takes_no_step_that_may_be_chance(gain, taken):
    """Of so many standard errors."""
    rng = np.random.default_rng(0)
    level, each = rng.normal(0, 1, 100), rng.normal(0, 1, 100)
    each = (each - each.mean()) / each.std() + gain / 10

    def scores(weights):
        return level + (weights.alphas["s3"] > 0) * each - 10 * (sum(weights.alphas.values()) > 1)

    found = coordinate_search(scores, START, COORDINATES)
    assert (found != START) == taken


def test_a_glance_at_some_examples_tells_where_to_look():
    whole, few = [], []
    best = {"s3": 0.5, "s17": 0.2}
    full, part = scored(best, calls=whole), scored(best, calls=few)
    found = coordinate_search(full, START, COORDINATES, preview=lambda weights: part(weights)[:50])
    assert {name for name, alpha in found.alphas.items() if alpha} == {"s3", "s17"}
    assert len(whole) < len(few) / 10


def test_costs_no_more_than_it_says():
    calls = []
    coordinate_search(
        scored(dict.fromkeys(NORM_LAYERS, 0.5), calls=calls),
        START,
        COORDINATES,
        most=4,
        rounds=1,
    )
    assert len(calls) <= 2 + 2 * len(COORDINATES) + 4 * (5 + 1)


def test_stops_when_told():
    calls = []
    found = coordinate_search(
        scored({"s3": 0.5}, calls=calls),
        START,
        COORDINATES,
        stop=lambda: len(calls) > 5,
    )
    assert len(calls) <= 6
    assert found == START


def test_a_coordinate_moves_all_its_norm_layers():
    coordinate = Coordinate("lambda", ("s1", "s2"))
    moved = coordinate.moved(START, 0.4)
    assert moved.alphas == START.alphas
    assert {name for name, value in moved.lambdas.items() if value == 0.4} == {"s1", "s2"}
    assert coordinate.value(moved) == pytest.approx(0.4)


def test_a_gain_of_one_group_of_near_copies_is_none():
    """The mean gain of 20 examples is above its standard error, that of the four groups is not."""
    gains, groups = np.repeat([1.0, 1.0, -0.6, 0.0], 5), np.repeat(np.arange(4), 5)

    def scores(weights):
        return gains * (weights.alphas["s3"] > 0)

    run = {"rounds": 1}
    assert coordinate_search(scores, START, COORDINATES, **run) != START
    assert coordinate_search(scores, START, COORDINATES, groups=groups, **run) == START
