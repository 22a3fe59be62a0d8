"""What an engine asks of a model before it trains."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.engine import may_leave_out_parameters


class Branches(nn.Module):
    """A model whose second branch is computed if ``decide`` of its middle says so."""

    def __init__(self, decide=lambda x: True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.branch, self.head = nn.Dropout(), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.decide = decide

    def forward(self, x):
        x = self.dropout(self.norm(self.conv(x)))
        if not self.training or self.decide(x):
            x = x + self.branch(x)
        return self.head(x.mean((2, 3)))


def may_leave_out(module):
    return may_leave_out_parameters(bnpatch.load(module, device="cpu", preprocessing={"img_size": 8}))


@pytest.mark.parametrize(
    ("decide", "may"),
    [
        (lambda x: True, False),  # dropout alone leaves out no parameters
        (lambda x: False, True),
        (lambda x: torch.rand(()) < 1, True),
        (lambda x: torch.rand(1).item() < 1, True),
        (lambda x: random.random() < 1, True),
        (lambda x: np.random.rand() < 1, True),
        (lambda x: x.mean() < 1e9, True),
    ],
)
def test_a_model_that_decides_what_to_compute_may_leave_out_parameters(decide, may):
    """Whatever it decided when it was asked: here always that the branch be computed, but for the second."""
    assert may_leave_out(Branches(decide)) is may


def test_a_model_that_is_asked_what_it_leaves_out_stays_as_it_is():
    class Lazy(Branches):
        def forward(self, x):
            if self.training and not hasattr(self, "seen"):
                self.register_buffer("seen", torch.zeros(()))
            return super().forward(x)

    model = bnpatch.load(Lazy(), device="cpu", preprocessing={"img_size": 8})
    model.module.train()
    model.module.norm.eval()  # as of layers that are frozen
    before = copy.deepcopy(model.module.state_dict())
    assert not may_leave_out_parameters(model)
    assert [name for name, child in model.module.named_modules() if not child.training] == ["norm"]
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_model_that_can_not_be_asked_may_leave_out_parameters():
    def refuse(x):
        raise RuntimeError("a batch of two is too small")

    assert may_leave_out(Branches(refuse))
    module = Branches()
    module.cached = module.head.weight * 2  # torch copies no such tensor
    assert may_leave_out(module)


def test_a_batch_of_one_example_is_no_defect():
    """Its pooled map has one value per channel, of which no norm can compute a variance."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    model = bnpatch.load(pooled, device="cpu", preprocessing={"img_size": 4})
    x = np.random.default_rng(0).normal(size=(8, 3, 4, 4)).astype(np.float32)
    examples = bnpatch.open_examples((x, np.arange(8) % 2), model)
    with pytest.raises(BnpatchError, match=r"a batch has one example only .*; raise --batch-size"):
        bnpatch.fine_tune(model, examples, examples, FineTuneSettings(batch_size=1, epochs=1))
