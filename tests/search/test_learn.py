from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bnpatch
from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import CROSS_ENTROPY
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.search.gradient_search import (
    STEP_COST,
    Course,
    Learner,
    NoGradientError,
    Problem,
    Start,
    learn,
)
from bnpatch.search.objective import ObjectiveSpec
from tests.search.tiny import MeanOfUnknownScale


@pytest.fixture
def task(tiny, dim):
    model = tiny
    examples = bnpatch.open_examples(dim, model)
    names = list(model.alphas())
    zeros = dict.fromkeys(names, 0.0)
    return model, examples, PatchWeights(zeros, zeros, zeros, zeros), names


def loss(model, batches):
    count = sum(len(batch.indices) for batch in batches)
    for batch in batches:
        yield F.cross_entropy(model.forward(batch.x), batch.targets, reduction="sum") / count


def cost_on(model, examples, indices):
    def cost(weights):
        model.set_weights(weights)
        return evaluate(model, examples, [CROSS_ENTROPY], indices=indices).mean(CROSS_ENTROPY)

    return cost


def all_of(names):
    by_name = {name: name for name in names}
    return dict.fromkeys(("alpha", "slope", "var_offset"), by_name)


def test_gains_on_examples_that_it_does_not_learn_from(task):
    model, examples, start, names = task
    cost = cost_on(model, examples, np.arange(400, 600))
    with model.borrowed():
        before = cost(start)
        problem = Problem(model, examples, np.arange(400), loss, model.state, 100, 100)
        found = learn(problem, [Start(start, all_of(names))], cost, Course(100, 0, 24)).weights
        assert cost(found) < 0.6 * before
    assert len(set(found.alphas.values())) == 3
    assert len(set(found.slopes.values()) - {0.0}) == 3
    assert len(set(found.var_offsets.values()) - {0.0}) == 3
    assert found.lambdas == start.lambdas
    assert model.alphas() == start.alphas  # borrowed
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_norm_layers_of_a_group_share_their_weight(task):
    """The loss is given: it rises with the alphas of one group and falls with those of the other."""
    model, examples, start, names = task
    groups = {name: "odd" if index % 2 else "even" for index, name in enumerate(names)}

    def opposed(model, batches):
        layers = [layer.module for layer in model.inventory().norm_layers]
        yield layers[0].alpha + layers[2].alpha - layers[1].alpha

    with model.borrowed():
        problem = Problem(model, examples, np.arange(100), opposed, model.state, 16, 16)
        start = PatchWeights(dict.fromkeys(names, 0.5), start.lambdas, start.slopes)
        found = Learner(problem, Start(start, {"alpha": groups}), 4, 0.4).advance(4).alphas
    assert found[names[0]] == found[names[2]] < 0.5 < found[names[1]]


def test_learning_starts_at_the_weights_of_the_start(task):
    model, examples, _, names = task
    values = {"alpha": 0.2, "lambda": 0.4, "slope": -0.5, "var_offset": 1.5}
    start = PatchWeights(**{f"{kind}s": dict.fromkeys(names, value) for kind, value in values.items()})
    groups = {kind: {name: name for name in names} for kind in values}
    problem = Problem(model, examples, np.arange(100), loss, model.state)
    found = Learner(problem, Start(start, groups), 4, 0.4).weights()
    for kind, value in values.items():
        assert found.of(kind) == pytest.approx(dict.fromkeys(names, value), rel=1e-5), kind


def test_the_variance_learns_a_weight_that_the_mean_must_not_have():
    """By construction, see the model: with one weight for both, a gain in one is a loss in the other."""
    module = MeanOfUnknownScale().eval()
    model, (x, labels) = bnpatch.load(module), module.examples(128)
    examples = bnpatch.open_examples((x, labels), model)
    start, cost = PatchWeights({"norm": 0.05}), cost_on(model, examples, np.arange(128))
    costs = {}
    for kinds in (("alpha",), ("alpha", "var_offset")):
        with model.borrowed():
            problem = Problem(model, examples, np.arange(128), loss, model.state, 128, 128)
            groups = {kind: {"norm": "norm"} for kind in kinds}
            found = Learner(problem, Start(start, groups), 60, 0.4).advance(60)
            costs[kinds] = cost(found)
    assert found.var_offsets["norm"] > 2
    assert costs["alpha", "var_offset"] < 0.5 * costs["alpha",]


def test_the_best_of_several_starts_goes_on(task):
    """Costs are given, so that the second start is the best after its trial."""
    model, examples, start, names = task
    asked = []

    def cost(weights):
        asked.append(weights)
        return [3.0, 1.0, 2.0][len(asked) - 1] if len(asked) <= 3 else 0.5 / len(asked)

    others = [PatchWeights(dict.fromkeys(names, a), start.lambdas, start.slopes) for a in (0.2, 0.5, 0.8)]
    starts = [Start(weights, all_of(names)) for weights in others]
    taken = []
    with model.borrowed():
        problem = Problem(model, examples, np.arange(100), loss, model.state, 16, 16, on_batch=taken.append)
        found = learn(problem, starts, cost, Course(16, 2, 6))
    assert found.start is starts[1]
    assert found.weights is asked[-1]
    assert sum(taken) == 16 * (3 * 2 + 4)


def test_learning_ends_where_nothing_is_gained(task):
    model, examples, start, names = task
    calls = []

    def cost(weights):
        calls.append(weights)
        return float(len(calls))  # ever worse

    with model.borrowed():
        problem = Problem(model, examples, np.arange(100), loss, model.state, 16, 16)
        found = learn(problem, [Start(start, all_of(names))], cost, Course(16, 0, 8))
    assert found.weights is calls[0]
    assert len(calls) == 1 + 2  # and no more


def test_outputs_that_are_never_finite_are_no_result(task):
    model, examples, start, names = task
    with model.borrowed():
        problem = Problem(model, examples, np.arange(100), loss, model.state, 16, 16)
        assert learn(problem, [Start(start, all_of(names))], lambda w: float("inf"), Course(16, 0, 8)) is None


def test_is_reproducible_and_stops_when_told(task):
    model, examples, start, names = task
    starts = [Start(start, all_of(names))]
    cost = cost_on(model, examples, np.arange(100, 200))
    with model.borrowed():
        problem = Problem(model, examples, np.arange(100), loss, model.state, 64, 64)
        first, again = (learn(problem, starts, cost, Course(64, 0, 4)) for _ in range(2))
        assert first == again
        assert first.weights.alphas != start.alphas
        stopped = learn(replace(problem, stop=lambda: True), starts, cost, Course(64, 0, 4))
    nearest = set(stopped.weights.alphas.values())
    assert len(nearest) == 1
    assert nearest.pop() == pytest.approx(0.01)  # of those that can be learned


@pytest.mark.parametrize(
    ("examples", "starts", "set_size"), [(2000, 4, 1), (400, 4, 1), (60, 3, 1), (210, 4, 250)]
)
def test_learning_costs_about_ten_passes(examples, starts, set_size):
    course = Course.of(examples, starts, set_size)
    passes = STEP_COST * course.num_examples(starts) / examples
    assert passes <= (10 if set_size == 1 else 20) + 3 * STEP_COST * course.batch_size / examples
    assert course.steps > course.trial_steps >= 2


@pytest.mark.parametrize("metric", ["cross-entropy", "unlabeled"])
def test_examples_at_a_time_change_the_memory_and_not_the_result(task, metric, monkeypatch):
    model, examples, start, names = task
    sizes, forward = [], type(model).forward

    def watched(self, x):
        sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(type(model), "forward", watched)
    by_name = {name: name for name in names}
    objective = ObjectiveSpec.of(metric, None, 64).objective(model, examples, np.arange(200))
    found = {}
    with model.borrowed():
        model.set_state(
            model.state.with_re_estimated(re_estimate_statistics(model, examples, indices=np.arange(200)))
        )
        for part_size in (20, 100):
            sizes.clear()
            problem = Problem(model, examples, np.arange(200), objective.loss, model.state, 100, part_size)
            groups = {kind: by_name for kind, _ in start.kinds()}
            found[part_size] = Learner(problem, Start(start, groups), 3, 0.4).advance(3)
            assert max(sizes) == part_size
    for kind, before in start.kinds():
        some, others = (list(weights.of(kind).values()) for weights in found.values())
        np.testing.assert_allclose(some, others, rtol=1e-3, atol=1e-4)
        assert some != list(before.values())


def test_half_precision_has_the_range_of_gradients(checkpoint, foggy):
    model = bnpatch.load(checkpoint, amp=True)
    seen = []
    model.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_autocast_dtype("cpu")))
    examples = bnpatch.open_examples(foggy, model)
    x = next(examples.batches(2)).x
    seen.clear()
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)  # as it is on most devices
    try:
        model.forward(x)
        model.predict(x)
    finally:
        torch.set_autocast_dtype("cpu", before)
    assert seen == [torch.bfloat16, torch.float16]


def test_a_loss_without_gradient_is_said_so(task):
    model, examples, start, names = task
    problem = Problem(
        model, examples, np.arange(50), lambda model, batches: iter([torch.ones(())]), model.state
    )
    with model.borrowed(), pytest.raises(NoGradientError):
        learn(problem, [Start(start, all_of(names))], lambda weights: 1.0, Course(50, 0, 4))
    assert all(parameter.requires_grad for parameter in model.module.parameters())
