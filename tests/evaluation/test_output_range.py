import math

import numpy as np
import pytest
import torch
from torch import nn

from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.data.sources import open_examples
from bnpatch.evaluation.output_range import OutputRange, inference_bound, output_ranges, training_bound
from bnpatch.models.load import load
from bnpatch.nn.functional import mixture
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import patch
from tests.nn.norms import images, settle

X = 3 * images(7, 3, 6, 6)


class Net(nn.Sequential):
    """Batch Norm on 6 x 6 maps and on single values, and one that no input reaches."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()
        )
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x):
        for layer in list(self)[:5]:
            x = layer(x)
        return x


@pytest.fixture
def module():
    torch.manual_seed(0)
    return settle(Net())


def ranges(module, batch_size=64):
    model = load(module)
    examples = open_examples((X.numpy(), np.zeros(len(X), int)), model)
    return output_ranges(model, examples, train_batch_size=8, batch_size=batch_size)


def by_hand(module, x):
    """``max |y - beta| / |gamma|`` of the layer's output."""
    shape = (1, -1, 1, 1)
    return ((module(x) - module.bias.view(shape)) / module.weight.view(shape)).abs().max().item()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("batch_size", [64, 2])
def test_ranges_are_those_of_the_outputs(module, alpha, batch_size):
    patch(module, alpha)
    first, second = ranges(module, batch_size)
    with torch.no_grad():
        maps = module[0](X)
        pooled = module[2](module[1](maps))
        assert first.observed == pytest.approx(by_hand(module[1], maps), rel=1e-5)
        assert second.observed == pytest.approx(by_hand(module[3], pooled), rel=1e-5)
    assert (first.name, second.name) == ("1", "3")
    assert first.training_bound == pytest.approx(math.sqrt(8 * 36 - 1))
    assert second.training_bound == pytest.approx(math.sqrt(7))
    assert first.inference_bound == (pytest.approx(math.sqrt(36 / alpha - 1)) if alpha else math.inf)
    assert second.inference_bound == math.inf  # single values stay plain
    assert first.observed < first.inference_bound


def test_an_outlier_is_beyond_training_as_it_is_and_within_the_inference_bound_when_weighed(module):
    far = X.clone()
    far[0, :, 0, 0] = 1e4
    model = load(module)
    examples = open_examples((far.numpy(), np.zeros(len(X), int)), model)
    assert output_ranges(model, examples, train_batch_size=8)[0].is_beyond_training
    model.set_alphas({"1": 0.2})
    weighed = output_ranges(model, examples, train_batch_size=8)[0]
    assert 0.9 * weighed.inference_bound < weighed.observed <= weighed.inference_bound


def test_leaves_no_trace(module):
    module.train()
    ranges(module)
    assert module.training
    assert not any(m._forward_pre_hooks or isinstance(m, ExampleWeightedNorm) for m in module.modules())


@pytest.mark.parametrize("offset", [0.0, -2.0, 2.0])
def test_with_a_slope_the_bound_is_that_of_the_smallest_weight(module, offset):
    patch(module, 0.2, slope=1.0, var_offset=offset)
    with_slope = ranges(module, batch_size=2)[0]
    norm = module[1]
    x = module[0](torch.cat([X]))
    running = Moments(norm.running_mean, norm.as_origin().running_var)
    used = mixture(x, running, norm.eps, ExampleWeight(0.2, 1.0, offset))
    of_mean, of_var = (weight.min().item() for weight in (used.weight, used.var_weight))
    assert (of_mean == of_var) is (offset == 0)
    assert with_slope.inference_bound == pytest.approx(math.sqrt(35 / of_var + 1 / of_mean - 1), rel=1e-5)
    assert with_slope.observed == pytest.approx(by_hand(norm, x), rel=1e-5)
    assert with_slope.observed <= with_slope.inference_bound


def standardized(values, weights):
    mean = (weights * values).sum()
    return (values - mean) / ((weights * values**2).sum() - mean**2).sqrt()


@pytest.mark.parametrize("n", [2, 9, 1000])
def test_one_value_against_equal_others_attains_the_training_bound(n):
    values = torch.zeros(n, dtype=torch.float64)
    values[0] = 1
    assert standardized(values, torch.full_like(values, 1 / n))[0].item() == pytest.approx(training_bound(n))


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0])
def test_one_value_against_equal_others_attains_the_inference_bound(alpha):
    size = 9
    # The example's values, then one that stands for the running statistics: mean 0, no variance.
    values = torch.zeros(size + 1, dtype=torch.float64)
    values[0] = 1
    weights = torch.full_like(values, alpha / size)
    weights[-1] = 1 - alpha
    assert standardized(values, weights)[0].item() == pytest.approx(inference_bound(size, alpha))


def test_bounds_agree_where_the_example_weighs_as_in_training():
    batch, size = 32, 49
    assert inference_bound(size, 1 / batch) == pytest.approx(training_bound(batch * size))
    assert inference_bound(size, 0.0) == math.inf


def test_beyond_what_training_allowed():
    assert OutputRange("a", 6.0, 5.9, math.inf).is_beyond_training
    assert OutputRange("a", math.nan, 5.9, math.inf).is_beyond_training
    assert not OutputRange("a", 5.8, 5.9, math.inf).is_beyond_training
