"""Robustness that costs nothing: candidates with known scores, no model."""

import numpy as np
import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Estimate, paired_difference
from bnpatch.search.config import Candidate
from bnpatch.search.robustness import PARTS, toward, without_harm

NOISE = np.random.default_rng(0).normal(0, 0.01, 200)


def candidates(*alphas):
    nothing = Estimate(0.0, 0.0, 0.0)
    return [
        Candidate(f"alpha {a}", PatchWeights({"a": a}, {"a": a / 2}), 0.0, nothing) for a in (0.0, *alphas)
    ]


def search(help_, harm, *alphas, metric=CROSS_ENTROPY):
    sign = -1 if metric.higher_is_better else 1

    def shifted(weights):
        return 1 + sign * (NOISE - help_(weights.alphas["a"]))

    return without_harm(
        candidates(*alphas),
        metric,
        shifted,
        lambda *settings: paired_difference(*map(shifted, settings)).excludes_zero,
        lambda weights: 1 + sign * (NOISE + harm(weights.alphas["a"])),
    )


@pytest.mark.parametrize("metric", [ACCURACY, CROSS_ENTROPY])
def test_takes_as_much_as_costs_nothing(metric):
    found = search(lambda a: a, lambda a: max(0.0, a - 0.5), 0.4, 0.8, metric=metric)
    assert found.weights == PatchWeights({"a": 0.4}, {"a": 0.2})
    assert found.chosen
    assert found.mean == pytest.approx(1.4 if metric.higher_is_better else 0.6, abs=0.01)
    found = search(lambda a: a, lambda a: max(0.0, a - 0.7), 0.4, 0.8, metric=metric)
    assert found.name == "alpha 0.8 x 0.75"
    assert found.weights.alphas["a"] == pytest.approx(0.6)


def test_takes_all_where_that_costs_nothing():
    assert search(lambda a: a, lambda a: 0.0, 0.4, 0.8).name == "alpha 0.8"
    assert search(lambda a: a, lambda a: -a, 0.4, 0.8).name == "alpha 0.8"


def test_nothing_where_any_costs_something_or_nothing_helps():
    assert search(lambda a: a, lambda a: a, 0.4, 0.8) is None
    assert search(lambda a: 0.0, lambda a: 0.0, 0.4) is None
    assert search(lambda a: -a, lambda a: 0.0, 0.4) is None


@pytest.mark.parametrize("sure", [True, False])
def test_a_help_that_may_be_chance_is_none(sure):
    found = without_harm(
        candidates(0.4),
        CROSS_ENTROPY,
        lambda weights: np.ones(200) - weights.alphas["a"],
        lambda *settings: sure,
        lambda weights: np.ones(200),
    )
    assert (found is not None) == sure


def test_part_of_the_way():
    start, end = PatchWeights({"gn": 1.0, "bn": 0.0}), PatchWeights({"gn": 0.6, "bn": 0.2}, {"bn": 0.8})
    assert toward(start, end, 1.0) == end
    half = toward(start, end, 0.5)
    assert half.alphas == pytest.approx({"gn": 0.8, "bn": 0.1})
    assert half.lambdas == pytest.approx({"bn": 0.4})
    assert PARTS[0] == 1


def test_the_interval_of_near_copies_is_by_group():
    groups = np.repeat(np.arange(40), 5)
    noise = np.repeat(NOISE[:40], 5)

    def found(groups):
        return without_harm(
            candidates(0.4),
            CROSS_ENTROPY,
            lambda weights: 1 + (noise - 1) * weights.alphas["a"],
            lambda *settings: True,
            lambda weights: noise,
            groups,
        ).change

    assert (found(None).high - found(None).low) * 2 < found(groups).high - found(groups).low
