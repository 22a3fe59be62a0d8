from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, TOP5, Metric, score
from bnpatch.search.config import chosen_of
from bnpatch.search.objective import LabelledObjective, ObjectiveSpec
from bnpatch.search.score_cache import ScoreCache
from bnpatch.search.selection import Selection
from bnpatch.search.temperature import INVERSES, SCALED, TEMPERED, guide_of, values_of


def chosen(scores, cross_entropies=None, groups=None):
    """Of settings with scores on eight blocks, the last two of which select."""

    def on(blocks, weights, label, metric):
        values = scores if metric == "accuracy" else cross_entropies or scores
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


def logits_of(knowledge, sureness, seed=0):
    """Logits (400, 5) of examples of class 0, which know their class so well and are so sure of it."""
    logits = torch.randn(400, 5, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += knowledge
    return sureness * logits


def scores_of(logits, metrics):
    """Scores of logits by name of metric; all examples are of class 0."""
    targets = torch.zeros(len(logits), dtype=torch.int64)
    return {metric.name: score(metric, logits, targets).double().numpy() for metric in metrics}


@pytest.fixture
def by_logits():
    """Make a selection between logits (400, 5), by name, for a tuned metric."""

    def selection(logits, metric):
        objective = ObjectiveSpec.of(metric, None, 64).objective(None, None, None)
        cache = ScoreCache.__new__(ScoreCache)
        cache.objective, cache.blocks, cache.groups = objective, np.split(np.arange(400), 8), lambda _: None
        cache.by_block = lambda weights, blocks, label: [
            scores_of(logits[weights][cache.blocks[block]], objective.metrics) for block in blocks
        ]
        return Selection(cache, range(8))

    return selection


def test_a_network_that_is_too_sure_is_not_passed_over_for_one_that_doubts(by_logits):
    """Under fog statistics from the field alone answer better, and far too surely."""
    logits = {
        "baseline": logits_of(0, 4),
        "lambda": logits_of(1.0, 4, seed=1),
        "alpha per layer": logits_of(1.15, 0.7, seed=2),
    }
    right, losses = (
        [scores_of(one, [metric])[metric.name].mean() for one in logits.values()]
        for metric in (ACCURACY, CROSS_ENTROPY)
    )
    assert right[0] < right[2] < right[1] < right[2] + 0.02
    assert losses[2] < losses[1] < losses[0]
    names = {name: name for name in logits}
    assert chosen_of(by_logits(logits, "accuracy").choose(names)).name == "lambda"
    assert chosen_of(by_logits(logits, "top5").choose(names)).name == "baseline"  # of five, all are right
    assert chosen_of(by_logits(logits, "cross-entropy").choose(names)).name == "alpha per layer"


def test_starts_and_steps_go_by_the_cross_entropy_that_is_learned(by_logits):
    """At the best temperature both starts are equal, but learning goes on from one that is not too sure."""
    logits = {"sure": logits_of(1, 4), "doubting": logits_of(1, 1)}
    selection = by_logits(logits, "accuracy")
    for name, own in logits.items():
        checked = own[: selection.num_checked]
        wanted = scores_of(checked, [CROSS_ENTROPY])[CROSS_ENTROPY.name].mean()
        assert selection.cost(name, "") == pytest.approx(wanted)
    assert selection.at_once_worse("sure", "doubting")
    assert not selection.at_once_worse("doubting", "sure")


def test_doubt_alone_supports_no_candidate_where_answers_are_counted(by_logits):
    logits = {"baseline": logits_of(1, 3), "alpha": logits_of(1, 1)}
    logits["alpha"][0, :2] = torch.tensor([9.0, 0.0])  # one more is right
    logits["baseline"][0, :2] = torch.tensor([0.0, 9.0])
    names = {name: name for name in logits}
    assert chosen_of(by_logits(logits, "accuracy").choose(names)).name == "baseline"
    assert chosen_of(by_logits(logits, "cross-entropy").choose(names)).name == "alpha"


@pytest.mark.parametrize("sureness", [0.4, 1.0, 5.0, 12.0])
def test_the_cross_entropy_at_the_best_temperature_does_not_depend_on_how_sure_a_network_is(sureness):
    log_inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = logits_of(1, 1).double()
    optimizer = torch.optim.LBFGS([log_inverse], max_iter=50)

    def loss():
        optimizer.zero_grad()
        total = F.cross_entropy(log_inverse.exp() * logits, torch.zeros(400, dtype=torch.int64))
        total.backward()
        return total

    optimizer.step(loss)
    found = values_of(TEMPERED.name, scores_of(sureness * logits, SCALED))
    assert INVERSES[0] < log_inverse.exp() / sureness < INVERSES[-1]
    # The nearest inverse is at most a factor of 2 ** (1/4) away, where the loss is flat.
    assert found.mean() == pytest.approx(loss().item(), abs=0.01)
    assert found.mean() >= loss().item()


def test_rates_are_guided_by_what_does_not_depend_on_the_temperature_as_they_do():
    assert [guide_of(metric) for metric in (ACCURACY, TOP5)] == [TEMPERED, TEMPERED]
    assert guide_of(CROSS_ENTROPY) is CROSS_ENTROPY
    mine = Metric("mine", lambda outputs, targets: outputs, is_rate=True)
    assert guide_of(mine) is mine
