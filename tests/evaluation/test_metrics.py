import numpy as np
import pytest
import torch
from scipy import stats

from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CROSS_ENTROPY,
    METRICS,
    TOP5,
    Metric,
    as_metric,
    mean_estimate,
    paired,
    paired_difference,
    score,
    student,
)
from tests.benchmarks.coverage import coverage, in_use, scaled

LOGITS = torch.tensor([[2.0, 1, 0, -1, -2, -3], [0.0, 1, 2, 3, 4, 5]])


def test_scores_of_known_logits():
    targets = torch.tensor([0, 0])
    assert score(ACCURACY, LOGITS, targets).tolist() == [1, 0]
    assert score(TOP5, LOGITS, targets).tolist() == [1, 0]
    expected = -torch.log_softmax(LOGITS, 1)[:, 0]
    torch.testing.assert_close(score(CROSS_ENTROPY, LOGITS, targets), expected)


def test_top5_of_three_classes_is_always_right():
    assert score(TOP5, torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).tolist() == [1, 1, 1, 1]


def test_half_precision_cross_entropy_is_taken_in_float32():
    logits = torch.full((1, 1000), 10.0, dtype=torch.float16)
    torch.testing.assert_close(
        score(CROSS_ENTROPY, logits, torch.tensor([3])).item(), np.log(1000), rtol=1e-6, atol=0
    )


def test_as_metric():
    assert as_metric("accuracy") is ACCURACY
    assert as_metric(lambda outputs, targets: -outputs).higher_is_better
    with pytest.raises(BnpatchError, match="no metric 'acc'; choose one of accuracy, cross-entropy, top5"):
        as_metric("acc")


@pytest.mark.parametrize("returned", [lambda o, t: o, lambda o, t: o.mean(), lambda o, t: 3.0])
def test_a_metric_must_give_one_number_per_example(returned):
    with pytest.raises(BnpatchError, match="one number per example"):
        score(Metric("mine", returned), torch.zeros(4, 2), torch.zeros(4))


def test_wilson_interval_against_a_published_value():
    # 81 of 263: [0.2553, 0.3662] (Newcombe 1998, Table I, method 3)
    estimate = mean_estimate(np.array([1.0] * 81 + [0.0] * (263 - 81)))
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)


def test_student_interval_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 40)
    estimate = student(values)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    np.testing.assert_allclose([estimate.low, estimate.high], [low, high], rtol=1e-12)


def test_a_rate_at_the_end_has_an_interval():
    estimate = mean_estimate(np.ones(100))
    assert estimate.value == 1
    assert 0.95 < estimate.low < 0.97
    assert estimate.high == pytest.approx(1)


def flips(up, down, same):
    before = np.array([0.0] * up + [1.0] * down + [1.0] * same)
    after = np.array([1.0] * up + [0.0] * down + [1.0] * same)
    return paired_difference(before, after)


def test_few_flips_are_no_evidence():
    assert not flips(up=4, down=0, same=996).excludes_zero  # McNemar's exact test: p = 0.125
    assert flips(up=7, down=0, same=993).excludes_zero  # p = 0.016
    assert flips(up=0, down=0, same=1000).value == 0
    assert not flips(up=0, down=0, same=1000).excludes_zero


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.02), (0.004, 0.004), (0.10, 0.05)])
def test_paired_interval_covers_the_truth(up, down):
    rng = np.random.default_rng(0)
    n, runs, inside = 300, 1000, 0
    for _ in range(runs):
        change = rng.choice([1, -1, 0], n, p=[up, down, 1 - up - down])
        before = np.where(change == 1, 0.0, 1.0)
        estimate = paired_difference(before, before + change)
        inside += estimate.low <= up - down <= estimate.high
    assert inside / runs > 0.94  # 95% less three standard errors of the simulation, 0.7 points each


def test_a_paired_interval_is_sharper_than_two():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 500)
    change = paired_difference(before, before + rng.normal(0.5, 0.1, 500))
    assert change.excludes_zero
    assert change.high - change.low < 0.05


def test_one_example_says_nothing():
    assert not paired_difference(np.array([1.5]), np.array([0.1])).excludes_zero


def skewed(n, seed=0):
    return np.random.default_rng(seed).gamma(0.3, 1, n)


def ends(estimate):
    return np.array([estimate.low, estimate.high])


@pytest.mark.parametrize("n", [5, 30, 1000])
def test_interval_of_a_mean_inverts_halls_transformation(n):
    """On the longer side, where Student's interval ends earlier, the transformed t is Student's quantile."""
    for values in (skewed(n), -skewed(n)):
        estimate = in_use(values)
        g, root = stats.skew(values), np.sqrt(n)
        far = estimate.high if g > 0 else estimate.low
        t = (values.mean() - far) / stats.sem(values)
        transformed = t + g * t**2 / (3 * root) + g**2 * t**3 / (27 * n) + g / (6 * root)
        assert transformed == pytest.approx(-np.sign(g) * stats.t.ppf(0.975, n - 1), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 30, 1000])
def test_the_interval_of_a_mean_is_lopsided_and_contains_students(n):
    values = skewed(n)
    estimate, plain = in_use(values), student(values)
    assert estimate.value == plain.value == values.mean()
    assert estimate.low <= plain.low < estimate.value < plain.high <= estimate.high
    assert estimate.reach == plain.reach
    if n > 2:  # of two values the skewness is 0
        assert estimate.high - estimate.value > 1.02 * (estimate.value - estimate.low)


@pytest.mark.parametrize("n", [1, 2, 3, 30, 1000])
def test_the_interval_of_a_mean_is_mirrored_with_its_values(n):
    estimate, mirrored = in_use(skewed(n)), in_use(-skewed(n))
    assert (-mirrored.high, -mirrored.low) == (estimate.low, estimate.high)


def test_the_interval_of_a_mean_goes_with_the_unit():
    values = skewed(50)
    for factor in (1e-120, 1e120):
        np.testing.assert_allclose(ends(in_use(factor * values)), factor * ends(in_use(values)), rtol=1e-9)


def test_symmetric_values_have_students_interval():
    half = skewed(50)
    values = np.concatenate([half, -half])
    np.testing.assert_allclose(ends(in_use(values)), ends(student(values)), rtol=1e-9)


@pytest.mark.parametrize("value", [0.1, -3.0])
def test_equal_changes_have_no_width(value):
    np.testing.assert_allclose(ends(in_use(np.full(40, value))), value, rtol=1e-12)


@pytest.mark.parametrize("n", [3, 100, 10_000])
def test_one_outlier_stretches_the_interval_to_its_side(n):
    """Of events with one in n seen, as many as 5.57 may be expected (95%, Garwood 1936): about that far."""
    values = np.zeros(n)
    values[0] = 10.0
    estimate = in_use(values)
    assert estimate.low <= 0 < estimate.value == pytest.approx(10 / n)
    assert not estimate.excludes_zero
    assert 5 * 10 / n < estimate.high < 20 * 10 / n


@pytest.mark.parametrize("divisor", [0.7, pytest.param(1.5, marks=pytest.mark.slow)])
def test_the_interval_of_a_skewed_change_covers_the_truth(divisor):
    """Of a calibrated softmax that is right in 82% of the cases; docs/trust.md has the whole table."""
    logits = np.random.default_rng(0).normal(0, 6, (20_000, 10))
    changes = scaled(logits, divisor, np.random.default_rng(0))  # skewness 4.3, and -3.9
    before, now = (
        coverage(changes, 100, 1000, np.random.default_rng(0), interval) for interval in (student, in_use)
    )
    # The seeds are fixed. The truth was held in 91.8% and 92.2%, and is in 96.7% and 95.8%.
    assert before.holds < 0.925 < 0.95 < now.holds
    # A change that does nothing passed for a gain in 7.8%, for a loss in 7.3%: now in 2.9% and 3.7%.
    assert max(now.gain, now.loss) < 0.045 < 0.07 < max(before.gain, before.loss)


def test_heavy_tails_do_not_narrow_the_interval():
    """Hall's interval alone holds the truth in 92%, because the skewness of such a sample is noise."""
    values = np.random.default_rng(1).standard_t(2.5, 200_000)
    assert coverage(values, 100, 1000, np.random.default_rng(1), in_use).holds > 0.94  # it is 95.5%


def test_a_cross_entropy_on_few_examples_is_rough():
    values = skewed(300)
    assert paired(CROSS_ENTROPY, values[:299], 2 * values[:299]).is_rough
    assert not paired(CROSS_ENTROPY, values, 2 * values).is_rough
    right = np.array([0.0, 1.0, 1.0])
    assert not paired(ACCURACY, right, right).is_rough


def test_formats():
    assert ACCURACY.format(0.8123) == "81.23%"
    assert ACCURACY.format(0.0123, signed=True) == "+1.23"
    assert CROSS_ENTROPY.format(-0.5, signed=True) == "-0.5000"
    assert METRICS["cross-entropy"].better(0.1, 0.2)
    assert METRICS["accuracy"].better(0.2, 0.1)
