import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bnpatch
from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import CROSS_ENTROPY
from bnpatch.models.running_stats import target_moments
from bnpatch.search.gradient_search import Course, Groups, NoGradientError, learn
from bnpatch.search.objective import Goal


@pytest.fixture
def task(tiny, dim):
    model = tiny
    examples = bnpatch.open_examples(dim, model)
    names = list(model.alphas())
    return model, examples, PatchWeights(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)), names


def loss(model, batches):
    count = sum(len(batch.indices) for batch in batches)
    for batch in batches:
        yield F.cross_entropy(model.forward(batch.x), batch.targets, reduction="sum") / count


def cost_on(model, examples, indices):
    def cost(weights):
        model.set_weights(weights)
        return evaluate(model, examples, [CROSS_ENTROPY], indices=indices).mean(CROSS_ENTROPY)

    return cost


def test_gains_on_examples_that_it_does_not_learn_from(task):
    model, examples, start, names = task
    cost = cost_on(model, examples, np.arange(400, 600))
    with model.borrowed():
        before = cost(start)
        found = learn(
            model,
            examples,
            np.arange(400),
            loss,
            cost,
            start=start,
            base=model.state,
            groups=Groups({name: name for name in names}, {}),
            course=Course(25, 128),
            checks=5,
        )
        assert cost(found) < 0.8 * before  # ten seeds: 0.06 to 0.42 of it, of deviation 0.11
    assert len(set(found.alphas.values())) == 3
    assert found.lambdas == start.lambdas
    assert model.alphas() == start.alphas  # borrowed
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_sites_of_a_group_share_their_weight(task):
    model, examples, start, names = task
    groups = {name: "odd" if index % 2 else "even" for index, name in enumerate(names)}
    with model.borrowed():
        found = learn(
            model, examples, np.arange(200), loss, cost_on(model, examples, np.arange(200, 300)),
            start=start, base=model.state,
            groups=Groups(groups, {}), course=Course(4, 128),
        )  # fmt: skip
    assert len(set(found.alphas.values())) == 2


def test_the_start_is_kept_where_nothing_is_better(task):
    model, examples, start, names = task
    calls = []

    def cost(weights):
        calls.append(weights)
        return float(len(calls))  # ever worse

    with model.borrowed():
        found = learn(
            model, examples, np.arange(100), loss, cost,
            start=start, base=model.state,
            groups=Groups({n: n for n in names}, {}), course=Course(8, 128), checks=8,
        )  # fmt: skip
    assert found == start
    assert len(calls) == 1 + 3  # and no more, as nothing is gained


def test_is_reproducible_and_stops_when_told(task):
    model, examples, start, names = task
    groups = Groups({name: name for name in names}, {})
    run = {"start": start, "base": model.state, "groups": groups, "course": Course(3, 128), "checks": 3}
    cost = cost_on(model, examples, np.arange(100, 200))
    with model.borrowed():
        first = learn(model, examples, np.arange(100), loss, cost, **run)
        again = learn(model, examples, np.arange(100), loss, cost, **run)
        assert first == again
        assert learn(model, examples, np.arange(100), loss, cost, **run, stop=lambda: True) == start


@pytest.mark.parametrize("metric", ["cross-entropy", "unlabeled"])
def test_examples_at_a_time_change_the_memory_and_not_the_result(task, metric, monkeypatch):
    model, examples, start, names = task
    sizes, forward = [], type(model).forward

    def watched(self, x):
        sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(type(model), "forward", watched)
    groups = Groups({name: name for name in names}, {name: name for name in names})
    judge = Goal.of(metric, None, 64).judge(model, examples, np.arange(200))
    found = {}
    with model.borrowed():
        model.set_target(target_moments(model, examples, indices=np.arange(200)))
        for batch_size in (20, 100):
            sizes.clear()
            found[batch_size] = learn(
                model, examples, np.arange(200), judge.loss, lambda weights: -len(sizes),
                start=start, base=model.state,
            groups=groups, course=Course(3, 100), batch_size=batch_size,
            )  # fmt: skip
            assert max(sizes) == batch_size
    for kind in ("alphas", "lambdas"):
        some, others = (list(getattr(weights, kind).values()) for weights in found.values())
        np.testing.assert_allclose(some, others, rtol=1e-3)
        assert some != list(getattr(start, kind).values())


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
    with model.borrowed(), pytest.raises(NoGradientError):
        learn(
            model, examples, np.arange(50),
            lambda model, batches: iter([torch.ones(())]), lambda weights: 1.0,
            start=start, base=model.state,
            groups=Groups({name: name for name in names}, {}), course=Course(4, 50),
        )  # fmt: skip
    assert all(parameter.requires_grad for parameter in model.module.parameters())
