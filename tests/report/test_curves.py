import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, TOP5, Comparison, Estimate, Metric
from bnpatch.report.curves import global_search_curves
from bnpatch.report.text import (
    distances,
    interval,
    patches_nothing,
    shown,
    training_sentence,
    verdict_sentence,
    weight_axis,
)
from bnpatch.search.config import Candidate, Trial
from bnpatch.search.held_out import HeldOutEvaluation
from bnpatch.search.result import TuneResult

EVEN = Estimate(0.0, 0.0, 0.0)


def trial(number, weight, accuracy, examples=100, error=0.01, candidate="alpha"):
    scores = {"accuracy": accuracy, "cross-entropy": 1 - accuracy}
    return Trial(candidate, number, {"weight": weight}, scores, dict.fromkeys(scores, error), examples)


def result(baseline=0.0, metric=ACCURACY, trials=(), best=0.25, origins=None):
    origins = origins or {"a": baseline, "b": baseline}
    start = PatchWeights(origins, dict.fromkeys(origins, 0.0))
    end = PatchWeights({name: abs(alpha - best) for name, alpha in origins.items()}, start.lambdas)
    candidates = [
        Candidate("baseline", start, 0.5, EVEN),
        Candidate("alpha", end, 0.6, Estimate(0.1, 0.05, 0.15), True),
    ]
    gain = Comparison(metric, Estimate(0.5, 0.4, 0.6), Estimate(0.6, 0.5, 0.7), Estimate(0.1, 0.05, 0.15))
    held_out = HeldOutEvaluation([gain], num_examples=1234)
    return TuneResult(metric, candidates, list(trials), held_out, end, list(origins), 3.0, 100)


TRIALS = [
    trial(0, 0.0, 0.5, error=0.0),
    trial(1, 1.0, 0.3, examples=20, error=math.inf),
    trial(2, 0.25, 0.6),
    trial(3, 0.25, 0.9, examples=20),
    trial(4, 0.01, 0.99),
    trial(0, 0.5, 0.1, candidate="lambda"),
]


def test_a_curve_has_each_weight_once():
    accuracy, entropy = global_search_curves(result(trials=TRIALS))
    assert (accuracy.metric, entropy.metric) == (ACCURACY, CROSS_ENTROPY)
    assert [point.weight for point in accuracy.points] == [0.0, 0.01, 0.25, 1.0]
    assert [point.examples for point in accuracy.points] == [100, 100, 100, 20]
    assert accuracy.baseline.value == 0.5
    # Where the global search ended, not the highest
    assert (accuracy.best.weight, accuracy.best.value) == (
        0.25,
        0.6,
    )
    assert (entropy.best.weight, entropy.best.value) == (0.25, pytest.approx(0.4))


def test_intervals_of_rates_stay_between_0_and_1():
    points = {point.weight: point for point in global_search_curves(result(trials=TRIALS))[0].points}
    assert (points[0.25].low, points[0.25].high) == pytest.approx((0.6 - 0.0196, 0.6 + 0.0196))
    assert points[0.01].high == 1.0
    assert (points[0.0].low, points[0.0].high) == (0.5, 0.5)


def test_no_band_or_interval_of_a_mean_cross_entropy_goes_below_0():
    unsure = replace(TRIALS[2], errors={"accuracy": 0.01, "cross-entropy": 0.5})
    _, entropy = global_search_curves(result(trials=[TRIALS[0], unsure]))
    assert entropy.points[1].low == 0
    assert entropy.points[1].high == pytest.approx(0.4 + 1.96 * 0.5, abs=1e-3)
    estimate = Estimate(0.1, -0.2, 0.4)
    assert interval(CROSS_ENTROPY, estimate, signed=False) == "0.0000 to 0.4000"
    assert interval(CROSS_ENTROPY, estimate) == "-0.2000 to +0.4000"  # a change may
    mine = Metric("mine", CROSS_ENTROPY.score)
    assert interval(mine, estimate, signed=False) == "-0.2000 to 0.4000"


@pytest.mark.parametrize(("classes", "number"), [(2, 0), (5, 0), (6, 1), (1000, 1)])
def test_top5_of_few_classes_is_shown_to_those_who_ask_for_it(classes, number):
    model = SimpleNamespace(num_outputs=lambda: classes)
    gain = result().comparisons[0]
    both = [gain, replace(gain, metric=TOP5)]
    assert [c.metric for c in shown(both, model, ACCURACY)] == [ACCURACY, TOP5][: 1 + number]
    assert [c.metric for c in shown(both[::-1], model, TOP5)] == [TOP5, ACCURACY]


def test_the_tuned_metric_comes_first():
    assert [c.metric.name for c in global_search_curves(result(metric=CROSS_ENTROPY, trials=TRIALS))] == [
        "cross-entropy",
        "accuracy",
    ]


@pytest.mark.parametrize(
    ("origins", "label"),
    [
        ({"a": 0.0, "b": 0.0}, "alpha, the weight of the example"),
        ({"a": 1.0, "b": 1.0}, "1 - alpha, the weight of the running statistics"),
        ({"a": 0.0, "b": 1.0}, "alpha (Group Norm: 1 - alpha)"),
    ],
)
def test_weights_are_distances_from_the_baseline(origins, label):
    found = result(origins=origins, trials=TRIALS)
    assert weight_axis(found) == label
    assert distances(found) == {"a": 0.25, "b": 0.25}
    assert global_search_curves(found)[0].best.weight == 0.25
    assert not patches_nothing(found)
    assert patches_nothing(replace(found, weights=found.candidates[0].weights))
    assert not patches_nothing(replace(found, weights=PatchWeights(origins, {"a": 0.5, "b": 0.0})))


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (
            Estimate(0.1, 0.05, 0.15),
            "Fine-tuned, the model is better than the checkpoint: accuracy",
        ),
        (
            Estimate(-0.1, -0.15, -0.05),
            "Keep the checkpoint, the fine-tuned model is worse: accuracy",
        ),
        (Estimate(0.1, -0.1, 0.3), "The fine-tuned model is not better than the checkpoint beyond doubt: "),
    ],
)
def test_what_training_did_is_said_of_the_checkpoint(change, start):
    gain = result().comparisons[0]
    trained = replace(gain, after=Estimate(0.5 + change.value, 0, 1), change=change)
    assert training_sentence([trained], gain.metric).startswith(start)


def test_sentences():
    gain = result()
    where = "on 1,234 examples that the search did not see"
    assert (
        verdict_sentence(gain)
        == f"Patched, the model gains: its accuracy rises from 50.00% to 60.00% {where}."
    )
    entropy = replace(gain.comparisons[0], metric=CROSS_ENTROPY)  # the same rise, which is a loss
    both = replace(gain, held_out=replace(gain.held_out, comparisons=[*gain.comparisons, entropy]))
    assert verdict_sentence(both) == f"{verdict_sentence(gain)} It loses in cross-entropy, though."
    folds = verdict_sentence(replace(gain, num_parts=5))
    assert folds.endswith("on 1,234 examples, each left out of the search that it judged (cross-fitting).")
    less = Metric("loss", ACCURACY.score, higher_is_better=False)
    worse = verdict_sentence(result(metric=less))
    assert (
        worse
        == f"Keep the model as it is: alpha did best in tuning, but makes its loss worse by 0.1000 {where}."
    )
    unsure = replace(gain.comparisons[0], change=Estimate(0.1, -0.1, 0.3))
    kept = verdict_sentence(replace(gain, held_out=replace(gain.held_out, comparisons=[unsure])))
    assert kept.startswith(f"No significant gain in accuracy (+10.00 points, -10.00 to +30.00) {where}: keep")
    unknown = replace(unsure, change=Estimate(0.1, -math.inf, math.inf))
    kept = verdict_sentence(replace(gain, held_out=replace(gain.held_out, comparisons=[unknown])))
    assert kept.startswith("It is unknown whether the model gains: its accuracy changes by +10.00 points")
    nothing = [replace(gain.candidates[0], chosen=True), replace(gain.candidates[1], chosen=False)]
    kept = replace(
        gain, candidates=nothing, held_out=replace(gain.held_out, comparisons=[replace(unsure, change=EVEN)])
    )
    assert "nothing that was tried does better beyond doubt" in verdict_sentence(kept)
    assert "gains" in verdict_sentence(replace(gain, candidates=nothing))  # it came with worse weights
    alone = replace(gain, candidates=[replace(gain.candidates[0], chosen=True)])
    assert "ended before anything else was tried" in verdict_sentence(alone)
