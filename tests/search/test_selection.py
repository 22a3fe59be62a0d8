from types import SimpleNamespace

import numpy as np

from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.search.config import chosen_of
from bnpatch.search.objective import LabelledObjective
from bnpatch.search.selection import Selection


def chosen(scores, cross_entropies=None, groups=None):
    """Of settings with scores on eight blocks, the last two of which select."""

    def on(blocks, weights, label, metric):
        values = (cross_entropies or scores) if metric == "cross-entropy" else scores
        return values[weights][10 * blocks.start : 10 * blocks.stop]

    judge = LabelledObjective(ACCURACY if cross_entropies else CROSS_ENTROPY, [CROSS_ENTROPY])
    blocks = np.arange(80).reshape(8, 10)

    def groups_of(blocks):
        return None if groups is None else groups[10 * blocks.start : 10 * blocks.stop]

    board = SimpleNamespace(blocks=blocks, on=on, groups=groups_of, objective=judge)
    return chosen_of(Selection(board, range(6, 8)).choose({name: name for name in scores})).name


def test_what_beats_the_baseline_beyond_doubt_is_asked_of_all_examples_then_the_best_mean_wins():
    rng = np.random.default_rng(0)
    baseline, noise = np.ones(80), rng.normal(0, 1, 80)
    noise -= noise.reshape(4, 20).mean(1).repeat(20)  # of mean 0 where it selects, too
    scores = {
        "baseline": baseline,
        "alpha": 0.7 * baseline + noise,
        "alpha per layer": 0.6 * baseline + noise,
    }
    assert chosen(scores) == "alpha per layer"  # that alpha gains is sure: of 80, not of 20
    assert chosen({"baseline": baseline, "alpha": scores["alpha"]}) == "alpha"
    scores.pop("alpha")
    assert chosen(scores) == "baseline"  # of 20, nothing is
    tie = {"baseline": baseline, "alpha": 0.5 * baseline, "lambda": 0.5 * baseline}
    assert chosen(tie) == "alpha"


def test_a_few_examples_refute_weights_that_are_much_worse():
    seen = []

    def on(blocks, weights, label, metric):
        seen.append(blocks)
        return {"much worse": 6.0, "worse": 1.1, "baseline": 1.0}[weights] + noise[weights]

    rng = np.random.default_rng(0)
    noise = {weights: rng.normal(0, 1, 10) for weights in ("much worse", "worse", "baseline")}
    objective = LabelledObjective(ACCURACY, [ACCURACY, CROSS_ENTROPY])
    cache = SimpleNamespace(
        blocks=np.arange(80).reshape(8, 10), on=on, groups=lambda blocks: None, objective=objective
    )
    selection = Selection(cache, range(5, 8))
    assert selection.at_once_worse("much worse", than="baseline")
    assert not selection.at_once_worse("worse", than="baseline")
    assert not selection.at_once_worse("baseline", than="much worse")
    assert set(seen) == {range(5, 6)}


def test_the_cross_entropy_may_settle_what_few_answers_do_not():
    right = np.tile([1.0, 0.0], 40)
    one_more = right.copy()
    one_more[[1, 61]] = 1
    accuracies, losses = {"baseline": right, "alpha": one_more}, {"baseline": 1.0 - right / 2}
    noise = np.random.default_rng(0).normal(0, 1, 80)
    assert chosen(accuracies, {**losses, "alpha": 0.8 - right / 2}) == "alpha"
    assert chosen(accuracies, {**losses, "alpha": 1.2 - right / 2}) == "baseline"
    assert chosen(accuracies, {**losses, "alpha": losses["baseline"] + noise}) == "baseline"
    two_more = {**accuracies, "lambda": one_more, "lambda, alpha": np.maximum(one_more, np.arange(80) >= 78)}
    losses |= {"alpha": 0.7 - right / 2, "lambda": 0.6 - right / 2, "lambda, alpha": 0.8 - right / 2}
    assert chosen(two_more, losses) == "lambda"  # its rate is within a standard error of the best
    losses |= {"alpha": 0.6 + noise / 8 - right / 2, "lambda": 0.6 - right / 2}
    assert chosen(two_more, losses) == "alpha"  # its cross-entropy is within a standard error of the best
    far_better = {**two_more, "lambda, alpha": np.ones(80)}
    assert chosen(far_better, losses) == "lambda, alpha"  # whatever the cross-entropy
    one_less = {"baseline": one_more, "alpha": right}
    assert chosen(one_less, {**losses, "alpha": 0.8 - right / 2}) == "baseline"


def test_near_copies_support_no_candidate_that_their_groups_do_not():
    """The selection examples are four groups, one of which loses what the others gain."""
    gains = np.tile(np.repeat([1.0, 1.0, 1.0, -0.9], 5), 4)
    scores = {"baseline": np.ones(80), "alpha per layer": np.ones(80) - gains}
    assert chosen(scores) == "alpha per layer"
    assert chosen(scores, groups=np.arange(80) // 5) == "baseline"


def test_near_copies_do_not_tell_between_rates_that_their_groups_do_not():
    """One candidate is right on one of four groups more; the cross-entropy is better by the other."""
    group, names = np.arange(80) % 20 // 5, ("baseline", "alpha per layer", "refined")
    accuracies = {name: 1.0 * (group < right) for right, name in enumerate(names)}
    losses = {"baseline": np.ones(80), "alpha per layer": np.full(80, 0.5), "refined": np.full(80, 0.6)}
    assert chosen(accuracies, losses) == "refined"
    assert chosen(accuracies, losses, groups=np.arange(80) // 5) == "alpha per layer"
