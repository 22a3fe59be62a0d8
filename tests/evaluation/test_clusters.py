"""Intervals of means over groups of near-copies."""

import numpy as np
import pytest

from bnpatch.evaluation.clusters import by_group, effective_count, effective_groups
from bnpatch.evaluation.confidence import Answers, compare_calibration
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CROSS_ENTROPY,
    mean_estimate,
    paired,
    paired_difference,
    student,
)
from tests.benchmarks.coverage import coverage_of_groups, near_copies, populations_of_groups


def answers(count=100, seed=0):
    """0/1 scores before and after, of which a fifth change."""
    rng = np.random.default_rng(seed)
    before = (rng.random(count) < 0.7).astype(float)
    return before, np.where(rng.random(count) < 0.2, 1 - before, before)


@pytest.mark.parametrize("kind", ["rate", "number"])
def test_groups_of_one_change_nothing(kind):
    before, after = answers() if kind == "rate" else np.random.default_rng(0).normal(0, 1, (2, 100))
    alone = np.random.default_rng(1).permutation(100)
    assert paired_difference(before, after, alone) == paired_difference(before, after)
    assert mean_estimate(before, alone) == mean_estimate(before)


def test_copies_add_nothing():
    """Five copies of each example, known as such, say what the examples alone say: a normal mean exactly."""
    changes = np.random.default_rng(0).exponential(1, 60)
    copies, numbers = np.repeat(changes, 5), np.repeat(np.arange(60), 5)
    once, known = (paired_difference(0 * c, c, g) for c, g in ((changes, None), (copies, numbers)))
    assert (known.value, known.low, known.high) == pytest.approx((once.value, once.low, once.high))
    ignored = paired_difference(0 * copies, copies)
    assert (ignored.high - ignored.low) * 2 < known.high - known.low


def test_copies_of_answers_count_once():
    before, after = answers(60)
    numbers = np.repeat(np.arange(60), 5)
    for values in (before, after - before):
        # The exact variance of a mean has n - 1 where that of a share has n.
        assert effective_count(np.repeat(values, 5), numbers) == pytest.approx(60, rel=0.03)
    once, known = mean_estimate(before), mean_estimate(np.repeat(before, 5), numbers)
    assert (known.low, known.high) == pytest.approx((once.low, once.high), abs=0.005)
    once = paired_difference(before, after)
    known = paired_difference(np.repeat(before, 5), np.repeat(after, 5), numbers)
    assert (known.low, known.high) == pytest.approx((once.low, once.high), abs=0.01)


def test_an_interval_does_not_shrink_to_nothing_where_no_answer_changes():
    right, numbers = np.ones(100), np.repeat(np.arange(20), 5)
    assert effective_count(0 * right, numbers) == pytest.approx(20)
    change = paired_difference(right, right, numbers)
    assert change.high - change.low > paired_difference(np.ones(20), np.ones(20)).high * 2 * 0.99
    assert mean_estimate(right, numbers).low < 0.85


def test_groups_of_different_sizes_are_linearized():
    values, numbers = np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])
    assert by_group(values, numbers).mean() == pytest.approx(values.mean())
    # The variance of a ratio: sum of (sum - size * mean)^2 over groups, times G / (G - 1), over N^2.
    error = np.sqrt(((3 - 3 * 0.75) ** 2 + 0.75**2) * 2) / 4
    assert np.std(by_group(values, numbers), ddof=1) / np.sqrt(2) == pytest.approx(error)
    assert effective_groups(np.repeat([0, 1, 2], [8, 1, 1])) == 2.0
    assert effective_groups(np.repeat([0, 1, 2, 3], 5)) == 4.0


def test_one_group_has_no_interval():
    before, after = answers(50)
    for estimate in (mean_estimate(before, 0 * before), paired_difference(before, after, 0 * before)):
        assert (estimate.low, estimate.high) == (-np.inf, np.inf)
    assert student(by_group(after, np.zeros(50, np.int64))).high == np.inf


def test_few_groups_are_rough():
    before, after = answers(900)
    assert paired(ACCURACY, before, after, np.arange(900) % 9).is_rough
    assert not paired(ACCURACY, before, after, np.arange(900) % 10).is_rough
    assert paired(CROSS_ENTROPY, before + 0.1, after, np.arange(900) % 299).is_rough
    assert not paired(CROSS_ENTROPY, before + 0.1, after, np.arange(900) % 300).is_rough


def test_the_calibration_error_resamples_groups():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, (2, 100))
    right = (rng.random((2, 100)) < sure**2).astype(float)
    once = compare_calibration(*(Answers(s, r) for s, r in zip(sure, right, strict=True))).change
    copies = [Answers(np.repeat(s, 5), np.repeat(r, 5)) for s, r in zip(sure, right, strict=True)]
    known = compare_calibration(*copies, np.repeat(np.arange(100), 5)).change
    assert (known.low, known.high) == pytest.approx((once.low, once.high))
    ignored = compare_calibration(*copies).change
    assert (ignored.high - ignored.low) * 1.5 < known.high - known.low


@pytest.mark.parametrize(
    "name", ["accuracy, 6% change", "accuracy, 12% change, 10% for the better", "cross-entropy, logits / 0.7"]
)
@pytest.mark.parametrize("count", [20, 200])
def test_near_copies_that_are_known_make_no_false_gains(name, count):
    """A seeded part of the table of docs/trust.md; the bounds are four standard errors from its numbers."""
    values = populations_of_groups(20_000, np.random.default_rng(0))[name]
    truth = float(np.mean(values[:, 1] - values[:, 0]))

    def draw(count, rng):
        drawn = near_copies(values, count, rng)
        return drawn[..., 0], drawn[..., 1]

    def found(with_groups):
        return coverage_of_groups(draw, truth, count, 300, np.random.default_rng(1), with_groups)

    known, ignored = found(True), found(False)
    assert known.holds > 0.91
    assert known.gain < 0.065
    assert ignored.holds < 0.90
    assert ignored.gain > 0.04
