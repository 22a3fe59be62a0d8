import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bnpatch.core.moments import Moments, mix
from bnpatch.nn.norm import ExampleWeightedNorm
from tests import reference
from tests.nn.norms import TOLERANCE, batch_norm, running, sample
from tests.nn.pairwise import pairwise


@pytest.mark.parametrize(
    ("layout", "weight", "alpha", "channels_per_group"),
    pairwise([torch.contiguous_format, torch.channels_last], [0.0, 0.3, 1.0], [0.0, 0.2, 1.0], [1, 3]),
)
def test_running_moments_that_are_given_take_the_place_of_the_buffers(
    layout, weight, alpha, channels_per_group
):
    bn, x, target = batch_norm(6, dtype=torch.float64), sample((3, 6, 4, 5), layout=layout), running()
    own = Moments(bn.running_mean.clone(), bn.running_var.clone())
    layer = ExampleWeightedNorm.take_over(
        bn, alpha, channels_per_group=channels_per_group, running=mix(weight, target, own)
    )
    mean, var = reference.mixed(weight, (target.mean, target.var), (own.mean, own.var))
    expected = reference.weighted_norm(
        x, mean, var, bn.weight.detach(), bn.bias.detach(), bn.eps, alpha, channels_per_group
    )
    y = layer(x).detach()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)  # float64 rounding
    assert y.stride() == x.stride()


def test_running_moments_that_are_given_move_along_and_are_no_part_of_the_state_dict():
    bn = batch_norm(6)
    keys, x = list(bn.state_dict()), sample((2, 6, 4, 4), torch.float32)
    before = bn(x)
    layer = ExampleWeightedNorm.take_over(bn, 0.2, running=running(dtype=torch.float32))
    assert list(layer.state_dict()) == keys
    assert layer.double().running.mean.dtype == layer.double().running.var.dtype == torch.float64
    assert nn.Sequential(layer).half()[0].running.mean.dtype == torch.float16
    assert layer.to("meta").running.var.device.type == "meta"
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.2, running=running(dtype=torch.float32))
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        copied, y = clone(layer), layer(x)
        assert torch.equal(copied(x), y)
        copied.running.mean.add_(1)
        assert torch.equal(layer(x), y)
        assert not torch.equal(copied(x), y)
    origin = layer.give_back()
    assert torch.equal(origin(x), before)
    assert vars(origin).keys() == vars(batch_norm(6)).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_half_precision_layer_takes_running_moments_of_float32(dtype, alpha):
    moments, x = running(dtype=torch.float32), sample((3, 6, 4, 4), dtype)
    layer = ExampleWeightedNorm.take_over(batch_norm(6).to(dtype), alpha, running=moments)
    expected = reference.weighted_norm(
        *(t.detach().double() for t in (x, moments.mean, moments.var, layer.weight, layer.bias)),
        layer.eps,
        alpha,
    )
    y = layer(x).detach()
    assert y.dtype == dtype
    atol = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(y.double(), expected, rtol=0, atol=atol)


def test_group_norm_computes_what_it_did_at_one():
    gn, x = nn.GroupNorm(2, 6).double().eval(), sample((3, 6, 4, 4))
    nn.init.normal_(gn.weight, generator=torch.Generator().manual_seed(0))
    before, moments = gn(x), running()
    layer = ExampleWeightedNorm.take_over(gn, 1.0, baseline_alpha=1.0, channels_per_group=3, running=moments)
    assert torch.equal(layer(x), before)
    for alpha in (0.0, 0.6, 0.999999):
        layer.alpha = alpha
        expected = reference.weighted_norm(
            *(t.detach() for t in (x, moments.mean, moments.var, gn.weight, gn.bias)), gn.eps, alpha, 3
        )
        np.testing.assert_allclose(layer(x).detach(), expected, rtol=0, atol=1e-10)  # float64 rounding
    single = x[:, :, :1, :1]
    assert torch.equal(layer(single), gn(single))  # the group still has three values, and stays Group Norm
    layer.alpha = 1.0
    assert layer.running_var is None  # and no warning: nothing would get lost
