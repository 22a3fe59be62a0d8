"""The layer in training, against an oracle made of the paper's definitions."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.norm_spec import NormSpec
from bnpatch.nn.functional import weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import calibrated
from bnpatch.nn.training_norm import GeneralNorm, convert_norms, grouped_norm, renorm
from tests import reference
from tests.nn.norms import parameters, sample
from tests.nn.pairwise import pairwise

SPECS = {
    "batch": (1, None),
    "ghost": (1, 3),
    "instance": (1, 1),
    "group": (2, 1),
    "batch/group": (2, None),
    "batch/group of two": (3, 2),
    "layer": (6, 1),
}
SHAPES = [(6, 6, 5, 4), (6, 6, 7), (6, 6, 2, 3, 2)]
EPS = 1e-2


def groups_of(num_examples, size, joined):
    """The groups that grouped_norm promises, written down by hand: strided, the rest together at the end."""
    size = size or num_examples
    count = max(1, num_examples // size)
    whole = min(count * size, num_examples)
    rest = list(range(whole, num_examples))
    if joined and len(rest) == 1:
        count, last = count - 1, [*range(whole - size, whole), *rest]
        return [list(range(first, whole - size, count)) for first in range(count)] + [last]
    return [list(range(first, whole, count)) for first in range(count)] + ([rest] if rest else [])


def layer(spec, num_channels=6, dtype=torch.float64, rank=2, **options):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    bn = kind(num_channels, eps=EPS, **options).to(dtype)
    for own, value in zip(
        (bn.running_mean, bn.running_var, bn.weight, bn.bias), parameters(num_channels, dtype), strict=True
    ):
        own.data.copy_(value)
    return convert_norms(bn, spec)


@pytest.mark.parametrize(
    ("spec", "num_examples", "layout"),
    pairwise(SPECS, [2, 5, 6, 7], [torch.contiguous_format, torch.channels_last]),
)
def test_training_equals_the_oracle(spec, num_examples, layout):
    channels, examples = SPECS[spec]
    x = sample((num_examples, 6, 5, 4), layout=layout)
    norm = layer(NormSpec(channels, examples)).train()
    groups = groups_of(num_examples, examples, joined=channels == 1)
    expected = reference.grouped_norm(x, norm.weight.detach(), norm.bias.detach(), EPS, channels, groups)
    assert not np.isnan(expected).any()
    np.testing.assert_allclose(norm(x).detach(), expected, rtol=0, atol=1e-11)  # float64 rounding


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "1d", "3d"])
@pytest.mark.parametrize(("channels", "examples"), SPECS.values(), ids=SPECS)
def test_training_equals_the_oracle_in_every_rank(shape, channels, examples):
    x = sample(shape)
    norm = layer(NormSpec(channels, examples), rank=len(shape) - 2).train()
    groups = groups_of(6, examples, joined=channels == 1)
    expected = reference.grouped_norm(x, norm.weight.detach(), norm.bias.detach(), EPS, channels, groups)
    np.testing.assert_allclose(norm(x).detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("layout", "groups"),
    # Both layouts where groups hold several examples, with and without channels pooled; one layout elsewhere.
    [
        *itertools.product([torch.contiguous_format, torch.channels_last], [(1, 2), (2, 2)]),
        *itertools.product([torch.contiguous_format], [(1, 4), (2, 1), (2, 5), (4, 3)]),
    ],
)
def test_gradients(layout, groups):
    channels, examples = groups
    x = sample((5, 4, 2, 2), layout=layout).requires_grad_()
    _, _, weight, bias = parameters(4)

    def f(x, weight, bias):
        return grouped_norm(x, weight, bias, EPS, channels, examples)[0]

    assert torch.autograd.gradcheck(f, (x, weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_groups_in_lower_precision(dtype):
    """Output and gradients within a few roundings of those in float64."""
    x, (_, _, weight, bias) = sample((4, 6, 5, 4), dtype), parameters(6, torch.float32)
    dy = sample((4, 6, 5, 4), dtype, seed=3)
    found, wanted = [], []
    for results, to in ((found, dtype), (wanted, torch.float64)):
        inputs = [t.detach().clone().requires_grad_() for t in (x.to(to), weight, bias)]
        y = grouped_norm(*inputs, EPS, 3, 2)[0]
        y.backward(dy.to(to))
        assert y.dtype == to
        results += [y, *(t.grad for t in inputs)]
    for a, b in zip(found, wanted, strict=True):
        scale = b.abs().max().item()
        unit = torch.finfo(dtype).eps if a.dtype == dtype else 1e-6
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=4 * unit * scale)


@pytest.mark.parametrize("examples", [None, 6, 9])
def test_a_group_of_the_whole_batch_is_batch_norm_bit_for_bit(examples):
    x = sample((6, 6, 5, 4), torch.float32)
    norm = layer(NormSpec(1, examples), dtype=torch.float32).train()
    plain = copy.deepcopy(norm).give_back()
    assert type(plain) is nn.BatchNorm2d
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, expected = norm(ours), plain(theirs)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name


@pytest.mark.parametrize(("channels", "side"), [(1, 5), (2, 5), (6, 5), (2, 1)])
def test_one_example_per_group_is_group_norm(channels, side):
    x = sample((4, 6, side, side))
    norm = layer(NormSpec(channels, 1, alpha=1.0)).train()
    expected = F.group_norm(x, 6 // channels, norm.weight, norm.bias, EPS)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)  # float64 rounding
    torch.testing.assert_close(norm.eval()(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_examples", [6, 7, 8])
@pytest.mark.parametrize(("channels", "examples"), [(1, 3), (1, 1), (2, 1), (2, None), (3, 4)])
def test_running_moments_are_those_of_whole_batches(channels, examples, num_examples):
    """After one step with momentum m: m parts of the batch's E[x] and E[x^2], whatever the groups."""
    x, momentum = sample((num_examples, 6, 5, 4)), 0.3
    norm = layer(NormSpec(channels, examples), momentum=momentum).train()
    mean, var = (t.clone() for t in norm.parameters_of_norm()[2:])
    norm(x)
    new_mean, new_var = norm.parameters_of_norm()[2:]
    by_group = x.transpose(0, 1).reshape(6 // channels, -1)
    first, second = (
        (1 - momentum) * old.view(-1, channels).mean(1) + momentum * of.mean(1)
        for old, of in ((mean, by_group), (var + mean**2, by_group**2))
    )
    torch.testing.assert_close(new_mean, first.repeat_interleave(channels), rtol=0, atol=1e-12)
    torch.testing.assert_close(new_var, (second - first**2).repeat_interleave(channels), rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 1


def test_without_momentum_running_moments_are_plain_averages():
    batches = [sample((4, 6, 5, 4), seed=seed) for seed in range(3)]
    norm = layer(NormSpec.ghost(2), momentum=None).train()
    for x in batches:
        norm(x)
    values = torch.cat(batches).transpose(0, 1).reshape(6, -1)
    mean, var = norm.parameters_of_norm()[2:]
    torch.testing.assert_close(mean, values.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, values.var(1, correction=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize(("channels", "examples"), [(1, 3), (2, None)])
def test_evaluation_weighs_examples(channels, examples, alpha):
    norm = layer(NormSpec(channels, examples, alpha))
    norm.train()(sample((6, 6, 5, 4)))
    x = sample((4, 6, 5, 4), seed=5)
    weight, bias, mean, var = norm.parameters_of_norm()
    expected = weighted_norm(x, Moments(mean, var), weight, bias, EPS, alpha, channels)
    torch.testing.assert_close(norm.eval()(x), expected, rtol=0, atol=1e-12)


def test_pooled_channels_at_alpha_zero_are_what_batch_norm_computes():
    norm = layer(NormSpec.batch_group(3))
    norm.train()(sample((6, 6, 5, 4)))
    x = sample((4, 6, 5, 4), seed=5)
    mean, var = norm.parameters_of_norm()[2:]
    assert torch.equal(mean.view(2, 3), mean[::3, None].expand(2, 3))
    assert torch.equal(norm.eval()(x), F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, EPS))


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (1.5, 0.2), (1e9, 1e9)])
def test_batch_renorm_equals_its_definition(bounds):
    x, (mean, var, weight, bias) = sample((4, 6, 5, 3)), parameters(6)
    y, batch = renorm(x, Moments(mean, var), weight, bias, EPS, *bounds)
    values = x.transpose(0, 1).flatten(1)
    batch_std, std = (values.var(1, correction=0) + EPS).sqrt(), (var + EPS).sqrt()
    r = (batch_std / std).clamp(1 / bounds[0], bounds[0])
    d = ((values.mean(1) - mean) / std).clamp(-bounds[1], bounds[1])
    normalized = (x - values.mean(1).view(-1, 1, 1)) / batch_std.view(-1, 1, 1)
    expected = (normalized * r.view(-1, 1, 1) + d.view(-1, 1, 1)) * weight.view(-1, 1, 1) + bias.view(
        -1, 1, 1
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(batch.var, values.var(1, correction=0), rtol=0, atol=1e-12)
    if bounds[0] == 1.0:  # no correction: Batch Norm
        torch.testing.assert_close(y, F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS))
    if bounds[0] == 1e9:  # free: what inference computes
        torch.testing.assert_close(y, F.batch_norm(x, mean, var, weight, bias, False, 0.0, EPS))


def test_the_corrections_of_batch_renorm_are_constants_to_the_gradient():
    x, (mean, var, weight, bias) = sample((4, 6, 5, 3)).requires_grad_(), parameters(6)
    with torch.no_grad():
        values = x.transpose(0, 1).flatten(1)
        std = (var + EPS).sqrt()
        r = (values.var(1, correction=0) + EPS).sqrt() / std
        d = (values.mean(1) - mean) / std
    dy = sample((4, 6, 5, 3), seed=2)
    (found,) = torch.autograd.grad(renorm(x, Moments(mean, var), weight, bias, EPS, 1e9, 1e9)[0], x, dy)
    plain = F.batch_norm(x, None, None, weight * r, bias + weight * d, True, 0.0, EPS)
    torch.testing.assert_close(found, torch.autograd.grad(plain, x, dy)[0])


def test_the_bounds_of_batch_renorm_grow():
    norm = layer(NormSpec.batch_renorm(r_max=3, d_max=5, warmup=4)).train()
    x = sample((4, 6, 5, 3))
    start = F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, EPS)
    torch.testing.assert_close(norm(x), start)  # at first it is Batch Norm
    for _ in range(4):
        norm(x)
    mean, var = (t.clone() for t in norm.parameters_of_norm()[2:])
    expected, _ = renorm(x, Moments(mean, var), norm.weight, norm.bias, EPS, 3.0, 5.0)
    torch.testing.assert_close(norm(x), expected)


def test_conversion_keeps_parameters_and_can_be_undone():
    model = timm.create_model("test_resnet", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_norms(model, NormSpec.ghost(4))
    convert_norms(model, NormSpec.ghost(2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.train()(torch.randn(8, 3, 32, 32)).square().sum().backward()
    optimizer.step()  # the parameters are the very same objects
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if "bn1.weight" in k)
    assert {type(s.module) for s in bnpatch.inventory(model).norm_layers} == {GeneralNorm}
    bnpatch.unpatch(model)
    assert {type(s.module).__module__ for s in bnpatch.inventory(model).norm_layers} <= {
        "torch.nn.modules.batchnorm",
        "timm.layers.norm_act",
    }
    assert not any("spec" in vars(module) for module in model.modules())


def test_the_fused_activation_of_timm_stays():
    torch.manual_seed(0)
    norm = timm.layers.BatchNormAct2d(6, act_layer=nn.ReLU)
    converted = convert_norms(norm, NormSpec.ghost(2)).train()
    assert (converted(sample((4, 6, 5, 5), torch.float32)) >= 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spec", [NormSpec.ghost(2), NormSpec.batch_group(3), NormSpec.batch_renorm()])
def test_an_activation_may_write_into_the_output(spec, layout):
    x, results = sample((4, 6, 5, 4), layout=layout), []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        net = nn.Sequential(layer(spec), nn.ReLU(inplace)).train()
        net(leaf).square().sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_frozen_layers_are_not_converted():
    frozen = timm.layers.FrozenBatchNormAct2d(6)
    with pytest.raises(BnpatchError, match="frozen"):
        convert_norms(frozen, NormSpec.ghost(2))


def test_layers_without_buffers_for_running_moments_are_not_converted():
    moments = Moments(torch.zeros(6), torch.ones(6))
    norms = [nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False)]
    net = calibrated(nn.Sequential(*norms, nn.BatchNorm2d(6)), {"0": moments, "1": moments})
    convert_norms(net, NormSpec.ghost(2))
    assert [type(layer) for layer in net] == [ExampleWeightedNorm, ExampleWeightedNorm, GeneralNorm]
    with pytest.raises(BnpatchError, match="keep no running statistics"):
        convert_norms(net[:2], NormSpec.ghost(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_running_moments_from_elsewhere_become_those_that_training_averages(channels):
    norm, x = bnpatch.patch(nn.BatchNorm2d(6)).double().eval(), sample((4, 6, 5, 3))
    norm.running = Moments(*parameters(6)[:2])
    norm.channels_per_group = channels
    expected = norm(x)
    general = convert_norms(norm, NormSpec(channels))
    assert general.running is None
    torch.testing.assert_close(general(x), expected, rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (4, 6)])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_other_running_moments_are_pooled_when_they_are_used(shape, alpha):
    norm = layer(NormSpec.batch_group(3), rank=max(1, len(shape) - 2)).eval()
    x, (mean, var, *_) = sample(shape), parameters(6)
    norm.alpha, norm.running = alpha, Moments(mean, var)
    weight, bias = (p.detach() for p in norm.parameters_of_norm()[:2])
    expected = reference.weighted_norm(x, mean, var, weight, bias, EPS, alpha, 3)
    np.testing.assert_allclose(norm(x).detach(), expected, rtol=0, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_alike(clone):
    norm = layer(NormSpec.ghost(2)).train()
    copied = clone(norm)
    x = sample((6, 6, 4, 4))
    assert torch.equal(copied(x), norm(x))
    assert torch.equal(copied.running_mean, norm.running_mean)


def test_wrong_inputs_get_the_original_errors():
    norm = layer(NormSpec.ghost(2)).train()
    for x in (torch.zeros(4, 5, 3, 3).double(), torch.zeros(4, 6, 3).double()):
        with pytest.raises((ValueError, RuntimeError)):
            norm(x)
