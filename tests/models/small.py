"""A small model that uses a norm twice, inputs for it, and checks that it stays as it was."""

import numpy as np
import timm
import torch
import torchvision
from torch import nn

import bnpatch
from tests.nn.norms import images, settle


class Small(nn.Module):
    """Two convolutions, a norm that is used twice, one of single values, and a classifier."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), norm(8)
        self.norm3, self.head = norm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        x = self.norm2(0.5 * x + 1)
        return self.head(self.norm3(x.mean((2, 3), keepdim=True)).flatten(1))


def group_norm(channels):
    return nn.GroupNorm(2, channels)


def small(norm=nn.BatchNorm2d, seed=0):
    torch.manual_seed(seed)
    return settle(Small(norm))


INPUTS = images(40, 3, 10, 10, seed=3) * 2 + 0.5
DATA = (INPUTS, np.zeros(len(INPUTS), np.int64))


def snapshot(model):
    module = model.module
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    classes = [(name, type(m), m.training) for name, m in module.named_modules()]
    hooks = sum(len(m._forward_pre_hooks) for m in module.modules())
    running = {name: (m.mean.clone(), m.var.clone()) for name, m in model.statistics_in_use().items()}
    return tensors, classes, hooks, model.weights, running


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1:4] == before[1:4]
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name
    assert after[4].keys() == before[4].keys()
    for name, pair in before[4].items():
        assert all(torch.equal(a, b) for a, b in zip(after[4][name], pair, strict=True))


def opened(module):
    model = bnpatch.load(module)
    return model, bnpatch.open_examples(DATA, model)


def assert_close(found, expected, relative=1e-4):
    """Up to so much of the largest output: float32 through fifteen layers, in another order, gives 1e-5."""
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


def bare(tmp_path, library="timm", name="test_resnet", file="model.pt", **kwargs):
    """A settled model and its bare state dict in a file."""
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    model = settle(create(name, **kwargs))
    path = tmp_path / file
    torch.save(model.state_dict(), path)
    return model, path
