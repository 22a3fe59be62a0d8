import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bnpatch
from bnpatch.evaluation import evaluate
from bnpatch.metrics import CROSS_ENTROPY
from bnpatch.search.learn import Course, NoGradientError, Shared, learn
from bnpatch.setting import Setting


@pytest.fixture
def task(checkpoint, foggy):
    model = bnpatch.load(checkpoint)
    examples = bnpatch.open_examples(foggy, model)
    names = list(model.alphas())
    return model, examples, Setting(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)), names


def loss(model, batch):
    return F.cross_entropy(model.forward(batch.x), batch.targets)


def cost_on(model, examples, indices):
    return lambda: evaluate(model, examples, [CROSS_ENTROPY], indices=indices).mean(CROSS_ENTROPY)


def test_gains_on_examples_that_it_does_not_learn_from(task):
    model, examples, start, names = task
    cost = cost_on(model, examples, np.arange(400, 600))
    before = cost()
    with model.borrowed():
        found = learn(
            model,
            examples,
            np.arange(400),
            loss,
            cost,
            start=start,
            shared=Shared({name: name for name in names}, {}),
            course=Course(25, 128),
            checks=5,
        )
        model.set(found)
        assert cost() < 0.6 * before
    assert len(set(found.alphas.values())) > 5
    assert found.lambdas == start.lambdas
    assert model.alphas() == start.alphas  # borrowed
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_sites_of_a_group_share_their_weight(task):
    model, examples, start, names = task
    groups = {name: "odd" if index % 2 else "even" for index, name in enumerate(names)}
    with model.borrowed():
        found = learn(
            model, examples, np.arange(200), loss, cost_on(model, examples, np.arange(200, 300)),
            start=start, shared=Shared(groups, {}), course=Course(4, 128),
        )  # fmt: skip
    assert len(set(found.alphas.values())) == 2


def test_the_start_is_kept_where_nothing_is_better(task):
    model, examples, start, names = task
    calls = []

    def cost():
        calls.append(model.setting())
        return float(len(calls))  # ever worse

    with model.borrowed():
        found = learn(
            model, examples, np.arange(100), loss, cost,
            start=start, shared=Shared({n: n for n in names}, {}), course=Course(8, 128), checks=8,
        )  # fmt: skip
    assert found == start
    assert len(calls) == 1 + 3  # and no more, as nothing is gained


def test_is_reproducible_and_stops_when_told(task):
    model, examples, start, names = task
    shared = Shared({name: name for name in names}, {})
    run = {"start": start, "shared": shared, "course": Course(3, 128), "checks": 3}
    cost = cost_on(model, examples, np.arange(100, 200))
    with model.borrowed():
        first = learn(model, examples, np.arange(100), loss, cost, **run)
        again = learn(model, examples, np.arange(100), loss, cost, **run)
        assert first == again
        assert learn(model, examples, np.arange(100), loss, cost, **run, stop=lambda: True) == start


def test_a_loss_without_gradient_is_said_so(task):
    model, examples, start, names = task
    with model.borrowed(), pytest.raises(NoGradientError):
        learn(
            model, examples, np.arange(50), lambda model, batch: torch.ones(()), lambda: 1.0,
            start=start, shared=Shared({name: name for name in names}, {}), course=Course(4, 50),
        )  # fmt: skip
    assert all(parameter.requires_grad for parameter in model.module.parameters())
