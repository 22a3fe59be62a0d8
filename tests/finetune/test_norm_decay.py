"""Decay of scales and shifts, against what torch's own optimizers do, and against the update by hand."""

import pytest
import timm
import torch
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.finetune.norm_decay import NormDecay, decay_norms, parameter_groups
from bnpatch.nn.surgery import inventory
from bnpatch.nn.training_norm import convert_norms

RATE, LR, STEPS = 0.3, 0.1, 4


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 1),
    )
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net


def trained(net, optimizer):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8, generator=generator)).tanh().sum().backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "coupled", "options"),
    [
        (torch.optim.SGD, True, {"momentum": 0.9, "nesterov": True}),
        # A shift before a later norm may have no gradient but rounding: eps keeps that from a step of lr.
        (torch.optim.Adam, True, {"eps": 1e-2}),
        (torch.optim.AdamW, False, {"eps": 1e-2}),
        (torch.optim.RMSprop, True, {"eps": 1e-2}),
    ],
)
def test_toward_zero_everywhere_is_the_optimizers_own_decay(kind, coupled, options):
    """The hook's coupled decay is L2 as SGD and Adam have it, the decoupled one is AdamW's."""
    ours, theirs = model(), model()
    groups = parameter_groups(ours, RATE, NormDecay(RATE, gamma_toward=0, coupled=coupled))
    optimizer = kind(groups, lr=LR, **options)
    decay_norms(optimizer)
    norms, others = [theirs[1], theirs[4]], [theirs[i].weight for i in (0, 3, 5)]
    expected = trained(
        theirs,
        kind(
            [
                {"params": [*others, *(p for n in norms for p in n.parameters())], "weight_decay": RATE},
                {"params": [theirs[5].bias], "weight_decay": 0.0},
            ],
            lr=LR,
            **options,
        ),
    )
    for name, p in trained(ours, optimizer).items():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("toward", [0.0, 1.0])
def test_one_step_of_plain_sgd_by_hand(coupled, toward):
    net = model()
    optimizer = torch.optim.SGD(parameter_groups(net, 0.0, NormDecay(RATE, toward, coupled)), lr=LR)
    decay_norms(optimizer)
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    norm = net[1]
    expected = [
        p.detach() - LR * (p.grad + RATE * (p.detach() - target))
        for p, target in ((norm.weight, toward), (norm.bias, 0.0))
    ]
    optimizer.step()
    torch.testing.assert_close([norm.weight.data, norm.bias.data], expected)


def test_follows_the_schedule_and_survives_a_reload():
    net = model()
    optimizer = torch.optim.SGD(parameter_groups(net, 0.0, NormDecay(RATE, coupled=False)), lr=LR)
    reloaded = torch.optim.SGD(parameter_groups(net), lr=LR)
    decay_norms(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = net[1].weight.detach().clone()
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(net[1].weight, before)
    assert len(reloaded.param_groups) < len(optimizer.param_groups)
    again = torch.optim.SGD(parameter_groups(net, 0.0, NormDecay(RATE, coupled=False)), lr=LR)
    again.load_state_dict(optimizer.state_dict())
    assert [g.get("norm_decay") for g in again.param_groups] == [
        g.get("norm_decay") for g in optimizer.param_groups
    ]


def test_only_the_chosen_sites_decay():
    net = convert_norms(timm.create_model("test_resnet", num_classes=10), NormSpec.ghost(4))
    norm_layers = {norm_layer.name: norm_layer for norm_layer in inventory(net).norm_layers}
    chosen = sorted(norm_layers)[:3]
    groups = parameter_groups(net, 0.1, NormDecay(RATE, norm_layers=frozenset(chosen)))
    decaying = {id(p) for group in groups if group.get("norm_decay") for p in group["params"]}
    assert decaying == {id(p) for name in chosen for p in norm_layers[name].parameters()[:2]}
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in net.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in net.parameters() if p.ndim > 1}


def test_frozen_and_unused_parameters_are_left_alone():
    net = model()
    net[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(parameter_groups(net, 0.0, NormDecay(RATE)), lr=LR)
    decay_norms(optimizer)
    before = [p.detach().clone() for p in (net[1].weight, net[4].weight)]
    net[:3](torch.ones(2, 3, 8, 8)).sum().backward()  # the last norm takes no part
    optimizer.step()
    assert torch.equal(net[1].weight, before[0])
    assert torch.equal(net[4].weight, before[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": -1.0}, "weight decay of -1"),
        ({"rate": float("nan")}, "weight decay of nan"),
        ({"rate": 0.1, "gamma_toward": 0.5}, "toward 0.5"),
        ({"rate": 0.1, "norm_layers": ["layer9.bn"]}, r"no norm layer 'layer9\.bn'"),
    ],
)
def test_bad_input(values, message):
    with pytest.raises(BnpatchError, match=message):
        parameter_groups(model(), 0.0, NormDecay(**values))
