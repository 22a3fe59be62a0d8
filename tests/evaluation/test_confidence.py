import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.evaluation.confidence import Answers, Flips, compare_calibration, flips
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CONFIDENCE, score


def plain_loop(confidence, correct):
    """Equation 5 of Guo et al., bin by bin."""
    total = 0.0
    for m in range(15):
        low, high = m / 15, (m + 1) / 15
        inside = [i for i, c in enumerate(confidence) if (low < c <= high) or (m == 0 and c == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


def pairs(n, rng, off_before, off_after):
    """Answers of two related models, which are overconfident by these parts of their confidence."""
    logits = rng.normal(1.5, 1.5, n)
    luck = rng.random(n)
    answers = []
    for values, off in ((logits, off_before), (0.9 * logits + rng.normal(0, 0.3, n), off_after)):
        confidence = 1 / (1 + np.exp(-values))
        answers.append(Answers(confidence, (luck < confidence * (1 - off)).astype(float)))
    return answers


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_calibration_error_equals_a_plain_loop(n):
    rng = np.random.default_rng(n)
    confidence, correct = rng.random(n), (rng.random(n) < 0.6).astype(float)
    expected = plain_loop(confidence, correct)
    assert Answers(confidence, correct).calibration_error() == pytest.approx(expected, abs=1e-12)


def test_bins_are_closed_above():
    """At 1/3, the upper bound of the fifth bin, two errors of one bin cancel; beyond, they add up."""
    inside = Answers(np.array([1 / 3, 0.3]), np.array([1.0, 0.0]))
    assert inside.calibration_error() == pytest.approx((1 - 1 / 3 - 0.3) / 2)
    apart = Answers(np.array([0.34, 0.3]), np.array([1.0, 0.0]))
    assert apart.calibration_error() == pytest.approx((0.66 + 0.3) / 2)
    assert Answers(np.array([0.0, 1.0]), np.array([0.0, 1.0])).calibration_error() == 0


def test_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.0, 0.0, np.log(2)], [30.0, 0, 0]], dtype=torch.float16)
    assert score(CONFIDENCE, logits, torch.tensor([0, 0])).tolist() == pytest.approx([0.5, 1], abs=1e-3)


def test_the_same_answers_do_not_change():
    before, _ = pairs(300, np.random.default_rng(0), 0.2, 0)
    same = compare_calibration(before, before)
    assert (same.change.value, same.change.low, same.change.high) == (0, 0, 0)
    assert same.verdict == "no significant change"


def test_comparison_is_seeded_and_does_not_depend_on_portions(monkeypatch):
    before, after = pairs(200, np.random.default_rng(0), 0.2, 0.05)
    result = compare_calibration(before, after)
    assert result == compare_calibration(before, after)
    other = compare_calibration(before, after, seed=1)
    monkeypatch.setattr("bnpatch.evaluation.confidence._AT_A_TIME", 1000)
    in_portions = compare_calibration(before, after)
    for name in ("before", "after", "change"):
        # A product of matrices may round a row otherwise where there are fewer of them.
        expected = pytest.approx(as_numbers(getattr(result, name)), rel=1e-12)
        assert as_numbers(getattr(in_portions, name)) == expected
        assert as_numbers(getattr(other, name)) != expected


def as_numbers(estimate):
    return estimate.value, estimate.low, estimate.high


def test_bootstrap_equals_resampling_by_hand():
    before, after = pairs(50, np.random.default_rng(0), 0.4, 0.05)
    draws = np.random.default_rng(0).integers(0, 50, (400, 50))
    changes = [
        plain_loop(after.confidence[d], after.correct[d])
        - plain_loop(before.confidence[d], before.correct[d])
        for d in draws
    ]
    value = plain_loop(after.confidence, after.correct) - plain_loop(before.confidence, before.correct)
    low, high = np.quantile(changes, [0.025, 0.975])
    half = max(high - value, value - low)
    change = compare_calibration(before, after, resamples=400).change
    assert (change.value, change.low, change.high) == pytest.approx((value, value - half, value + half))


@pytest.mark.parametrize(
    ("off_before", "off_after"),
    [(0.2, 0.05), *(pytest.param(off, off, marks=pytest.mark.slow) for off in (0, 0.1))],
)
def test_the_paired_interval_covers_the_truth(off_before, off_after):
    rng = np.random.default_rng(0)
    exact = [a.calibration_error() for a in pairs(1_000_000, rng, off_before, off_after)]
    truth, runs, inside = exact[1] - exact[0], 200, 0
    for _ in range(runs):
        change = compare_calibration(*pairs(1000, rng, off_before, off_after), resamples=200).change
        inside += change.low <= truth <= change.high
    assert inside / runs > 0.90  # 95% less three standard errors of the simulation, 1.5 points each


def test_a_clear_change_is_a_verdict():
    result = compare_calibration(*pairs(4000, np.random.default_rng(0), 0.3, 0))
    assert result.verdict == "gain"
    assert result.change.value == pytest.approx(result.after.value - result.before.value)
    assert result.before.low <= result.before.value <= result.before.high
    assert result.after.low >= 0
    assert result.to_json()["verdict"] == "gain"
    assert set(result.to_json()["change"]) == {"value", "low", "high"}
    assert compare_calibration(*pairs(4000, np.random.default_rng(0), 0, 0.3)).verdict == "loss"


def test_flips():
    before = np.array([0.0, 0, 0, 1, 1, 1])
    after = np.array([1.0, 1, 0, 0, 1, 1])
    assert flips(before, after) == Flips(gained=2, lost=1)


def test_answers_of_a_model(checkpoint, clean):
    """Where classes are drawn by its own probabilities it is calibrated, but for the noise in 15 bins."""
    model = bnpatch.load(checkpoint)
    images = torch.from_numpy(clean[0])[:, None].float() / 127.5 - 1
    chances = model.predict(images).double().softmax(1).cumsum(1).numpy()
    labels = (np.random.default_rng(0).random((len(images), 1)) > chances[:, :-1]).sum(1)
    errors = []
    for targets in (labels, (labels + 1) % 10):
        examples = bnpatch.open_examples((clean[0], targets), model)
        scores = evaluate(model, examples, [ACCURACY, CONFIDENCE])
        answers = Answers(scores.values["confidence"], scores.values["accuracy"])
        assert answers.confidence.min() >= 0.1
        errors.append(answers.calibration_error())
    assert errors[0] < 0.1 < 0.5 < errors[1]
