import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.nn.functional import example_moments, weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from tests import reference
from tests.nn.norms import LAYOUTS, TOLERANCE, batch_norm, parameters, sample
from tests.nn.pairwise import pairwise

SHAPES = {
    "1d": (5, 6, 7),
    "2d": (4, 6, 5, 3),
    "3d": (3, 6, 2, 3, 4),
    "batch of one": (1, 6, 4, 4),
    "one value": (4, 6),
    "one value, 1x1": (4, 6, 1, 1),
}


CASES = [(shape, layout) for shape in SHAPES.values() for layout in LAYOUTS[len(shape)]]


@pytest.mark.parametrize(
    ("case", "alpha", "dtype", "channels_per_group", "slope", "offset"),
    pairwise(CASES, [0.0, 0.03, 0.5, 1.0], TOLERANCE, [1, 2, 6], [0.0, 0.6, -1.3], [0.0, 2.0, -3.0]),
)
def test_equals_the_oracle(case, alpha, dtype, channels_per_group, slope, offset):
    shape, layout = case
    x, (mean, var, weight, bias) = sample(shape, dtype, layout), parameters(shape[1], dtype)
    example = ExampleWeight(alpha, slope, offset)
    y = weighted_norm(x, Moments(mean, var), weight, bias, 0.1, example, channels_per_group)
    assert y.dtype == dtype
    assert y.shape == x.shape
    expected = reference.weighted_norm(
        *(t.double().numpy() for t in (x, mean, var, weight, bias)),
        *(0.1, alpha, channels_per_group, slope, offset),
    )
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(layout):
    x = sample((2, 6, 4, 4), torch.float32, layout)
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.3)
    assert layer(x).stride() == x.stride()


def test_without_scale_and_shift():
    x, (mean, var, *_) = sample((3, 6, 4, 4)), parameters(6)
    y = weighted_norm(x, Moments(mean, var), None, None, 1e-5, 0.2)
    expected = reference.weighted_norm(x, mean, var, np.ones(6), np.zeros(6), 1e-5, 0.2)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize(
    ("dtype", "of_running"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.float32)],
)
def test_at_alpha_zero_running_statistics_may_have_another_precision(dtype, of_running):
    x, (mean, var, *_) = sample((3, 6, 4, 4), dtype), parameters(6, of_running)
    y = weighted_norm(x, Moments(mean, var), None, None, 1e-5, 0.0)
    expected = reference.weighted_norm(
        *(t.double() for t in (x, mean, var)), np.ones(6), np.zeros(6), 1e-5, 0.0
    )
    assert y.dtype == dtype
    np.testing.assert_allclose(y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


def test_alpha_one_is_instance_norm_and_in_groups_group_norm():
    x, (mean, var, weight, bias) = sample((3, 6, 4, 4)), parameters(6)
    for channels_per_group in (1, 3):
        y = weighted_norm(x, Moments(mean, var), weight, bias, 1e-5, 1.0, channels_per_group)
        expected = F.group_norm(x, 6 // channels_per_group, weight, bias, 1e-5)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_alpha_zero_is_batch_norm_bit_for_bit(shape, layout, dtype):
    bn = batch_norm(shape[1], max(1, len(shape) - 2), dtype)
    x = sample(shape, dtype, layout)
    expected = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    assert torch.equal(ExampleWeightedNorm.take_over(bn)(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("slope", "offset"), [(0.0, 0.0), (0.8, 0.0), (0.8, 1.5)])
def test_no_example_depends_on_its_batch(layout, slope, offset):
    x = sample((5, 6, 4, 4), torch.float32, layout)
    layer = ExampleWeightedNorm.take_over(batch_norm(6), ExampleWeight(0.4, slope, offset))
    together = layer(x)
    stranger = torch.cat([x[:2], 100 * x[2:]]).contiguous(memory_format=layout)
    assert torch.equal(layer(stranger)[:2], together[:2])
    alone = torch.cat([layer(x[i : i + 1].contiguous(memory_format=layout)) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)  # the order of sums may differ


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_an_empty_batch_passes(alpha):
    layer = ExampleWeightedNorm.take_over(batch_norm(6), alpha)
    assert layer(torch.zeros(0, 6, 4, 4)).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_must_be_a_weight(alpha):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ExampleWeightedNorm.take_over(batch_norm(6), alpha)


def test_the_variance_loses_digits_as_the_mean_grows():
    """Where the accuracy of E[x^2] - mean^2 goes: fine at 10 std, three digits at 100, none at 1000."""
    worst = {}
    for ratio in (10, 100, 1000):
        x = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + ratio
        var = example_moments(x.float()).var
        assert (var >= 0).all()
        worst[ratio] = ((var - example_moments(x).var) / example_moments(x).var).abs().max()
    assert worst[10] < 1e-4
    assert worst[100] < 1e-2
    assert worst[1000] < 1  # of the right order of magnitude, and no more than that
    constant = torch.full((1, 1, 8, 8), 1e4)
    assert example_moments(constant).var.item() <= 1e8 * 1e-6  # rounding of 1e8, not below zero


def test_half_precision_statistics_do_not_overflow():
    x = torch.full((1, 2, 64, 64), 300.0, dtype=torch.float16)  # 300^2 is past the largest float16
    x[:, :, ::2] = -300.0
    moments = example_moments(x)
    assert moments.var.dtype == torch.float32
    torch.testing.assert_close(moments.var, torch.full((1, 2), 9e4), rtol=1e-6, atol=0)


def test_one_value_per_example_is_plain_unless_asked_for():
    x = sample((4, 6, 1, 1), torch.float32)
    bn = batch_norm(6)
    expected = bn(x)
    layer = ExampleWeightedNorm.take_over(bn, 0.5)
    assert torch.equal(layer(x), expected)
    layer.include_1x1 = True
    weighed = reference.weighted_norm(x, *(t.detach() for t in state(bn)), bn.eps, 0.5)
    np.testing.assert_allclose(layer(x).detach(), weighed, atol=1e-5)  # float32 rounding


def state(bn):
    return bn.running_mean, bn.running_var, bn.weight, bn.bias


def test_training_is_the_original_classes_own():
    plain, patched = batch_norm(6).train(), ExampleWeightedNorm.take_over(batch_norm(6).train(), 0.5)
    x = sample((4, 6, 3, 3), torch.float32)
    assert torch.equal(patched(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(patched.state_dict()[name], value), name
    assert not torch.equal(patched.eval()(x), plain.eval()(x))
    assert torch.equal(patched.train()(x), plain.train()(x))


def test_wrong_inputs_get_the_original_errors():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.5)
    for x in (torch.zeros(2, 6, 3), torch.zeros(2, 5, 3, 3), torch.zeros(6)):
        with pytest.raises((ValueError, RuntimeError)):
            layer(x)


def test_half_keeps_alpha_exact():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.3).half()
    assert layer.alpha == 0.3
    assert layer.parameters_of_norm()[3].dtype == torch.float16


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_complete(clone):
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.3)
    copied = clone(layer)
    x = sample((2, 6, 4, 4), torch.float32)
    assert torch.equal(copied(x), layer(x))
    copied.running_mean += 1
    assert not torch.equal(copied(x), layer(x))
    assert type(copied.give_back()) is nn.BatchNorm2d


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("slope", "offset"), [(0.0, 0.0), (0.7, 0.0), (0.7, 1.5)])
def test_cuda_equals_cpu_without_synchronizing(dtype, layout, slope, offset):
    layer = ExampleWeightedNorm.take_over(batch_norm(6), ExampleWeight(0.3, slope, offset))
    x = sample((4, 6, 5, 5), dtype, layout)
    running = Moments(*layer.parameters_of_norm()[2:])
    affine = (layer.weight, layer.bias, layer.eps)
    expected = weighted_norm(x.double(), running, *affine, ExampleWeight(0.3, slope, offset))
    layer.cuda()
    x = x.cuda()
    layer(x)  # the first call may set up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y.cpu().double(), expected.double(), rtol=0, atol=5 * TOLERANCE[dtype])


def test_reading_the_variance_of_a_patched_layer_warns():
    """Code that fuses or re-parameterizes reads it, and would lose alpha silently."""
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.0)
    assert layer.running_var is layer.as_origin().running_var
    layer.alpha = 0.3
    with pytest.warns(BnpatchWarning, match="its alpha is lost"):
        layer.running_var  # noqa: B018


def test_alpha_does_not_take_on_the_context_in_which_it_is_set():
    layer = ExampleWeightedNorm.take_over(batch_norm(6))
    with torch.inference_mode(), torch.device("meta"):
        layer.alpha = 0.3
    x = sample((2, 6, 4, 4), torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert layer.alpha == 0.3
