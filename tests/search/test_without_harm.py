"""Candidates with known scores, and the choice between them that does no harm; no model."""

from dataclasses import replace

import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import Estimate
from bnpatch.search.config import Candidate
from bnpatch.search.selection import PARTS, toward, without_harm


def weights(alpha):
    return PatchWeights({"a": alpha}, {"a": alpha / 2})


def choose(found):
    """The more alpha, the better."""
    means = {name: some.alphas["a"] for name, some in found.items()}
    best = max(means, key=means.__getitem__)
    return [
        Candidate(name, some, means[name], Estimate(0.0, 0.0, 0.0), name == best)
        for name, some in found.items()
    ]


def search(harmless_up_to, *alphas):
    asked = []

    def is_harmless(some):
        asked.append(some.alphas["a"])
        return some.alphas["a"] <= harmless_up_to

    found = {"baseline": weights(0.0), **{f"alpha {alpha}": weights(alpha) for alpha in alphas}}
    return without_harm(choose(found), choose, is_harmless), asked


def test_takes_the_choice_where_that_does_no_harm():
    best, asked = search(1.0, 0.4, 0.8)
    assert (best.name, best.chosen, asked) == ("alpha 0.8", True, [0.8])


def test_takes_as_much_as_does_no_harm():
    assert search(0.7, 0.4, 0.8)[0].name == "alpha 0.8 x 0.75"
    assert search(0.7, 0.4, 0.8)[0].weights.alphas["a"] == pytest.approx(0.6)
    assert search(0.5, 0.45, 0.8)[0].name == "alpha 0.45"
    assert search(0.05, 0.4, 0.8)[0].name == "alpha 0.4 x 0.1"


def test_takes_the_baseline_where_all_do_harm_and_asks_for_each_once():
    best, asked = search(0.0, 0.4, 0.8)
    assert best.name == "baseline"
    assert asked == sorted(asked, reverse=True)
    assert len(asked) == 2 * (1 + len(PARTS))


def test_what_is_not_chosen_is_not_asked_for():
    found = [
        replace(candidate, chosen=candidate.name == "baseline")
        for candidate in choose({"baseline": weights(0.0), "alpha": weights(0.4)})
    ]
    assert without_harm(found, choose, lambda some: pytest.fail("asked")).name == "baseline"


def test_part_of_the_way():
    start, end = PatchWeights({"gn": 1.0, "bn": 0.0}), PatchWeights({"gn": 0.6, "bn": 0.2}, {"bn": 0.8})
    assert toward(start, end, 1.0) == end
    half = toward(start, end, 0.5)
    assert half.alphas == pytest.approx({"gn": 0.8, "bn": 0.1})
    assert half.lambdas == pytest.approx({"bn": 0.4})
