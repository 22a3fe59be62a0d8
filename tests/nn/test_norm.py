import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.moments import Moments, mix
from bnpatch.nn.functional import example_moments, weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from tests import reference
from tests.nn.pairwise import pairwise

SHAPES = {
    "1d": (5, 6, 7),
    "2d": (4, 6, 5, 3),
    "3d": (3, 6, 2, 3, 4),
    "batch of one": (1, 6, 4, 4),
    "one value": (4, 6),
    "one value, 1x1": (4, 6, 1, 1),
}
LAYOUTS = {3: [torch.contiguous_format], 2: [torch.contiguous_format]}
LAYOUTS[4] = [torch.contiguous_format, torch.channels_last]
LAYOUTS[5] = [torch.contiguous_format, torch.channels_last_3d]
CASES = [(shape, layout) for shape in SHAPES.values() for layout in LAYOUTS[len(shape)]]

# Relative to the largest output, which is near 5. float64: rounding. float32: about twenty roundings, and
# a variance by E[x^2] - mean^2 at mean = std. Half precision: the rounding of the output, whose unit in
# the last place is 2^-8 and 2^-11 of it, once; statistics are in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def sample(shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 1.5 + 1.2
    return x.to(dtype).contiguous(memory_format=layout)


def parameters(num_channels, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    mean, weight, bias = (torch.randn(num_channels, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(num_channels, generator=g, dtype=torch.float64) + 0.3
    return [t.to(dtype) for t in (mean, var, weight, bias)]


def batch_norm(num_channels, rank=2, dtype=torch.float32):
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](num_channels).to(dtype).eval()
    for own, value in zip(
        (bn.running_mean, bn.running_var, bn.weight, bn.bias), parameters(num_channels, dtype), strict=True
    ):
        own.data.copy_(value)
    return bn


@pytest.mark.parametrize(
    ("case", "alpha", "dtype", "channels_per_group", "slope"),
    pairwise(CASES, [0.0, 0.03, 0.5, 1.0], TOLERANCE, [1, 2, 6], [0.0, 0.6, -1.3]),
)
def test_equals_the_oracle(case, alpha, dtype, channels_per_group, slope):
    shape, layout = case
    x, (mean, var, weight, bias) = sample(shape, dtype, layout), parameters(shape[1], dtype)
    y = weighted_norm(x, Moments(mean, var), weight, bias, 0.1, alpha, channels_per_group, slope)
    assert y.dtype == dtype
    assert y.shape == x.shape
    expected = reference.weighted_norm(
        *(t.double().numpy() for t in (x, mean, var, weight, bias)), 0.1, alpha, channels_per_group, slope
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
@pytest.mark.parametrize("slope", [0.0, 0.8])
def test_no_example_depends_on_its_batch(layout, slope):
    x = sample((5, 6, 4, 4), torch.float32, layout)
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.4, slope=slope)
    together = layer(x)
    stranger = torch.cat([x[:2], 100 * x[2:]]).contiguous(memory_format=layout)
    assert torch.equal(layer(stranger)[:2], together[:2])
    alone = torch.cat([layer(x[i : i + 1].contiguous(memory_format=layout)) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)  # the order of sums may differ


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_an_empty_batch_passes(alpha):
    layer = ExampleWeightedNorm.take_over(batch_norm(6), alpha)
    assert layer(torch.zeros(0, 6, 4, 4)).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("start", "slope"), [(0.0, 0.0), (0.0, 0.7), (0.3, 0.0), (0.3, -0.7)])
def test_gradients_reach_alpha_slope_weights_and_input(layout, start, slope):
    x = sample((2, 4, 3, 2), layout=layout).requires_grad_()
    mean, var, weight, bias = parameters(4)
    weights = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (start, slope))
    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), *weights)

    def f(x, weight, bias, alpha, slope):
        return weighted_norm(x, Moments(mean, var), weight, bias, 1e-3, alpha, slope=slope)

    assert torch.autograd.gradcheck(f, inputs)


def test_a_learned_alpha_learns_from_zero():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), torch.tensor(0.0, requires_grad=True))
    layer(sample((2, 6, 4, 4), torch.float32)).square().sum().backward()
    assert layer.alpha.grad != 0


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
@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_cuda_equals_cpu_without_synchronizing(dtype, layout, slope):
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.3, slope=slope)
    x = sample((4, 6, 5, 5), dtype, layout)
    running = Moments(*layer.parameters_of_norm()[2:])
    expected = weighted_norm(x.double(), running, layer.weight, layer.bias, layer.eps, 0.3, slope=slope)
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


def test_alpha_may_be_a_parameter_that_somebody_else_holds():
    alpha = nn.Parameter(torch.tensor(0.2))
    layer = ExampleWeightedNorm.take_over(batch_norm(6), alpha)
    assert layer.alpha is alpha
    assert "alpha" not in layer.state_dict()
    layer(sample((2, 6, 4, 4), torch.float32)).sum().backward()
    assert alpha.grad is not None


def test_alpha_does_not_take_on_the_context_in_which_it_is_set():
    layer = ExampleWeightedNorm.take_over(batch_norm(6))
    with torch.inference_mode(), torch.device("meta"):
        layer.alpha = 0.3
    x = sample((2, 6, 4, 4), torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert layer.alpha == 0.3


def running(num_channels=6, dtype=torch.float64, seed=7):
    """Running moments unlike those of :func:`batch_norm`."""
    mean, var, *_ = parameters(num_channels, dtype, seed)
    return Moments(mean, var)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("start", "slope"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("channels_per_group", [1, 2])
def test_gradients_reach_running_moments_alpha_and_slope(layout, start, slope, channels_per_group):
    x = sample((2, 4, 3, 2), layout=layout)
    moments = running(4)
    alpha, slope = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (start, slope))
    layer = ExampleWeightedNorm.take_over(
        batch_norm(4, dtype=torch.float64), channels_per_group=channels_per_group
    )

    def f(mean, var, alpha, slope):
        layer.alpha, layer.slope, layer.running = alpha, slope, Moments(mean, var)
        return layer(x)

    moments = (moments.mean.requires_grad_(), moments.var.requires_grad_())
    assert torch.autograd.gradcheck(f, (*moments, alpha, slope))


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


def test_the_slope_is_data_like_alpha(monkeypatch):
    """It changes nothing at the baseline; 0 is not even computed; and it leaves with the layer."""
    x = sample((3, 6, 4, 4), torch.float32)
    bn = batch_norm(6)
    plain, layer = bn(x), ExampleWeightedNorm.take_over(bn, 0.0, slope=0.7)
    assert torch.equal(layer(x), plain)
    layer.alpha = 0.2
    sloped = layer(x)
    layer.slope = 0.0
    with monkeypatch.context() as patching:
        patching.setattr("bnpatch.core.moments._log", None)
        constant = layer(x)
        layer.alpha, layer.slope = 1.0, 0.7
        layer(x)
        layer.alpha = 0.2
    assert (sloped - constant).abs().max() > 0.01
    layer.slope = 0.7
    assert layer.double().slope == 0.7
    assert "slope=0.7" in repr(layer)
    assert vars(layer.give_back()).keys() == vars(batch_norm(6)).keys()


@pytest.mark.parametrize("slope", [-2.0, 0.7])
def test_group_norm_computes_what_it_did_whatever_the_slope(slope):
    gn, x = nn.GroupNorm(2, 6).eval(), sample((3, 6, 4, 4), torch.float32)
    before = gn(x)
    layer = ExampleWeightedNorm.take_over(
        gn, 1.0, baseline_alpha=1.0, channels_per_group=3, running=running(dtype=torch.float32), slope=slope
    )
    assert torch.equal(layer(x), before)
    layer.alpha = 0.9
    assert (layer(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_slope_changes_a_weight_of_zero_or_one(alpha):
    x, (mean, var, weight, bias) = sample((3, 6, 4, 4), torch.float32), parameters(6, torch.float32)
    y = [
        weighted_norm(x, Moments(mean, var), weight, bias, 1e-5, torch.tensor(alpha), 1, slope)
        for slope in (0.0, torch.tensor(3.0), torch.tensor(-3.0))
    ]
    assert torch.equal(y[1], y[0])
    assert torch.equal(y[2], y[0])


@pytest.mark.parametrize("slope", [-4.1, 5, float("nan"), float("inf")])
def test_a_slope_has_bounds(slope):
    with pytest.raises(BnpatchError, match=r"slope = .* is too steep; it must lie in \[-4, 4\]"):
        ExampleWeightedNorm.take_over(batch_norm(6), 0.1, slope=slope)


def test_a_learned_slope_learns_from_zero_and_may_belong_to_somebody_else():
    slope = nn.Parameter(torch.tensor(0.0))
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.2, slope=slope)
    x = sample((2, 6, 4, 4), torch.float32)
    layer(x).square().sum().backward()
    assert layer.slope is slope
    assert slope.grad != 0
    assert "slope" not in layer.state_dict()
    constant = ExampleWeightedNorm.take_over(batch_norm(6), 0.2)(x)
    torch.testing.assert_close(layer(x), constant, rtol=1e-6, atol=1e-6)  # alpha is rounded to float32


def test_a_layer_that_was_pickled_under_former_names_without_a_slope_has_none():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.2)
    x, state = sample((2, 6, 4, 4), torch.float32), dict(vars(layer))
    del state["_slope"], state["_is_constant"]
    state |= {"weigh_single_values": state.pop("include_1x1"), "identity": state.pop("baseline_alpha")}
    state["_is_identity"] = state.pop("_is_baseline")
    copied = ExampleWeightedNorm.__new__(ExampleWeightedNorm)
    copied.__setstate__(state)
    assert copied.slope == 0.0
    assert torch.equal(copied(x), layer(x))


class Sizes(TorchDispatchMode):
    """Lists the numbers of values of the tensors that operators make; views make none."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if not op.is_view:
            parts = made if isinstance(made, tuple | list) else (made,)
            self.made += [part.numel() for part in parts if isinstance(part, torch.Tensor)]
        return made


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
