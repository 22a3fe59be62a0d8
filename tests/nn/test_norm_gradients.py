import pytest
import torch
from torch import nn

from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.nn.functional import example_moments, weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.nn.norms import LAYOUTS, Sizes, batch_norm, parameters, running, sample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (0.0, 0.7, 1.0), (0.3, 0.0, 0.0), (0.3, -0.7, -1.0)])
def test_gradients_reach_alpha_slope_offset_weights_and_input(layout, start):
    x = sample((2, 4, 3, 2), layout=layout).requires_grad_()
    mean, var, weight, bias = parameters(4)
    weights = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start)
    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), *weights)

    def f(x, weight, bias, *example):
        return weighted_norm(x, Moments(mean, var), weight, bias, 1e-3, ExampleWeight(*example))

    assert torch.autograd.gradcheck(f, inputs)


def test_a_learned_alpha_learns_from_zero():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), torch.tensor(0.0, requires_grad=True))
    layer(sample((2, 6, 4, 4), torch.float32)).square().sum().backward()
    assert layer.alpha.grad != 0


def test_alpha_may_be_a_parameter_that_somebody_else_holds():
    alpha = nn.Parameter(torch.tensor(0.2))
    layer = ExampleWeightedNorm.take_over(batch_norm(6), alpha)
    assert layer.alpha is alpha
    assert "alpha" not in layer.state_dict()
    layer(sample((2, 6, 4, 4), torch.float32)).sum().backward()
    assert alpha.grad is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.3, 0.7, 1.0)])
@pytest.mark.parametrize("channels_per_group", [1, 2])
def test_gradients_reach_running_moments_and_weights(layout, start, channels_per_group):
    x = sample((2, 4, 3, 2), layout=layout)
    moments = running(4)
    weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start]
    layer = ExampleWeightedNorm.take_over(
        batch_norm(4, dtype=torch.float64), channels_per_group=channels_per_group
    )

    def f(mean, var, alpha, slope, offset):
        layer.alpha, layer.slope, layer.var_offset = alpha, slope, offset
        layer.running = Moments(mean, var)
        return layer(x)

    moments = (moments.mean.requires_grad_(), moments.var.requires_grad_())
    assert torch.autograd.gradcheck(f, (*moments, *weights))


def test_running_moments_are_learned_at_a_fixed_alpha_of_zero_and_where_nothing_is_weighed():
    for shape, alpha in (((3, 6, 4, 4), 0.0), ((3, 6, 1, 1), 0.4)):
        moments = running(dtype=torch.float32)
        layer = ExampleWeightedNorm.take_over(batch_norm(6), alpha, running=moments)
        x = sample(shape, torch.float32)
        plain = layer(x)
        moments.var.requires_grad_()
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)  # float32 in another order
        layer(x).square().sum().backward()
        assert moments.var.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["slope", "var_offset"])
def test_a_learned_slope_or_offset_learns_from_zero_and_may_belong_to_somebody_else(kind):
    weight = nn.Parameter(torch.tensor(0.0))
    layer = ExampleWeightedNorm.take_over(batch_norm(6), ExampleWeight(0.2, **{kind: weight}))
    x = sample((2, 6, 4, 4), torch.float32)
    layer(x).square().sum().backward()
    assert getattr(layer, kind) is weight
    assert weight.grad != 0
    assert kind not in layer.state_dict()
    constant = ExampleWeightedNorm.take_over(batch_norm(6), 0.2)(x)
    torch.testing.assert_close(layer(x), constant, rtol=1e-6, atol=1e-6)  # alpha is rounded to float32


@pytest.mark.parametrize("layout", LAYOUTS[4])
def test_the_gradient_of_the_moments_is_exact(layout):
    def moments(x):
        found = example_moments(x)
        return found.mean, found.var

    x = sample((2, 3, 4, 2), layout=layout).requires_grad_()
    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradgradcheck(moments, x)


def test_per_example_gradients_by_vmap():
    x = sample((3, 4, 5, 2))

    def loss(x):
        moments = example_moments(x)
        return (moments.mean.sin() * moments.var).sum()

    each = torch.func.vmap(torch.func.grad(lambda one: loss(one[None])))(x)
    torch.testing.assert_close(each, torch.func.grad(loss)(x))


def test_the_gradient_of_the_moments_takes_one_pass():
    x = sample((2, 6, 8, 8)).requires_grad_()
    moments = example_moments(x)
    with Sizes() as sizes:
        (moments.mean.sum() + moments.var.sum()).backward()
    assert sizes.made.count(x.numel()) == 1
