import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import norm_act
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.nn.surgery import inventory, patch
from bnpatch.nn.tracing import NormPaths, norm_paths, unnormalized_norms

get_model = torchvision.models.get_model

# By hand, from the code of the architectures: what is behind the last norm that all paths share.
ARCHITECTURES = {
    "resnet18": (
        lambda: get_model("resnet18"),
        {"layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"},
    ),
    "resnet50": (
        lambda: get_model("resnet50"),
        {"layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3"},
    ),
    "densenet121": (lambda: get_model("densenet121"), {"features.norm5"}),
    "inception_v3": (
        lambda: get_model("inception_v3", init_weights=False),
        {
            f"Mixed_7c.branch{branch}.bn"
            for branch in ("1x1", "3x3_2a", "3x3_2b", "3x3dbl_3a", "3x3dbl_3b", "_pool")
        },
    ),
    "googlenet": (
        lambda: get_model("googlenet", init_weights=False),
        {f"inception5b.branch{branch}.bn" for branch in ("1", "2.1", "3.1", "4.1")},
    ),
    "mobilenet_v2": (lambda: get_model("mobilenet_v2"), {"features.18.1"}),
    "vgg11_bn": (lambda: get_model("vgg11_bn"), {"features.26"}),
    "efficientnet_b0": (lambda: get_model("efficientnet_b0"), {"features.8.1"}),
    "test_resnet": (lambda: timm.create_model("test_resnet"), {"layer4.0.bn2", "layer4.0.downsample.2"}),
    "resnetv2_18, normalized at its end": (lambda: timm.create_model("resnetv2_18"), {"norm"}),
    "test_efficientnet": (lambda: timm.create_model("test_efficientnet"), {"bn2"}),
}


LARGE = {"resnet50", "densenet121", "inception_v3", "googlenet", "vgg11_bn", "efficientnet_b0"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in ARCHITECTURES],
)
def test_architectures(case):
    make, expected = ARCHITECTURES[case]
    model = make()
    x = torch.zeros(1, 3, *(2 * [96 if case == "inception_v3" else 32]))
    assert unnormalized_norms(model, x) == expected
    ran = norm_paths(model, x)
    assert ran.unnormalized | ran.normalized <= {
        norm_layer.name for norm_layer in inventory(model).norm_layers
    }
    assert not ran.unnormalized & ran.normalized
    assert unnormalized_norms(patch(model, 0.1), x) == expected


class Net(nn.Module):
    """Two Batch Norms, and between them and the output whatever a test says."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.compute = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.compute(self, x)


X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def written_in_place(net, x):
    y = torch.zeros_like(net.a(x))  # of the shape of a's output, not of its values
    y[:, 1:] = net.b(x)[:, 1:]
    return y.clone()


def functional(net, x):
    y = net.a(x)
    return F.batch_norm(y, net.b.running_mean, net.b.running_var, net.b.weight, net.b.bias)


def control_flow(net, x):
    return net.a(x) if net.b(x).mean() > 1e6 else net.b(x)


def constant(net, x):
    for _ in range(50):  # memory of what came from a is free again, and likely to be used again
        net.a(x).relu()
        x = x + torch.tensor([[[[1.0]]]]).expand(x.shape).clone()
    return net.b(x)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda net, x: net.b(net.a(x)), {"b"}),
        (lambda net, x: net.a(x) + net.b(net.a(x)), {"a", "b"}),
        (lambda net, x: F.relu_(net.a(x)).mul_(net.b(x)), {"a", "b"}),
        (lambda net, x: {"out": [net.a(x)], "more": net.b(x)}, {"a", "b"}),
        (lambda net, x: torch.cat([net.a(x), F.layer_norm(net.b(x), [3])], 1), {"a"}),
        (lambda net, x: F.group_norm(net.a(x), 2) * net.b(x), {"b"}),
        (lambda net, x: F.instance_norm(net.a(x)) * net.b(x), {"b"}),
        (lambda net, x: net.a(net.b(net.a(x))), {"a"}),
        (written_in_place, {"b"}),
        (functional, {"b"}),
        (control_flow, {"b"}),
        (constant, {"b"}),
    ],
)
def test_data_flow(forward, expected):
    assert unnormalized_norms(Net(forward), X) == expected


@pytest.mark.parametrize(
    ("layer", "stops"),
    [
        (lambda: nn.GroupNorm(2, 4), True),
        (lambda: nn.LayerNorm([4, 3, 3]), True),
        (lambda: nn.InstanceNorm2d(4), True),
        (lambda: nn.RMSNorm([4, 3, 3]), True),
        (lambda: timm.layers.LayerNorm2d(4), True),
        (lambda: timm.layers.RmsNorm2d(4), True),
        (lambda: timm.layers.EvoNorm2dS0(4, group_size=2), True),
        (lambda: timm.layers.FilterResponseNormAct2d(4), True),
        (lambda: torchvision.ops.FrozenBatchNorm2d(4), True),
        (lambda: norm_act.FrozenBatchNormAct2d(4), True),
        (lambda: norm_act.BatchNormAct2d(4), True),
        (lambda: timm.layers.grn.GlobalResponseNorm(4), False),
        (lambda: nn.LocalResponseNorm(2), False),
        (lambda: timm.layers.LayerScale2d(4), False),
        (lambda: timm.layers.StdConv2d(4, 4, 1), False),
        (lambda: nn.Conv2d(4, 4, 1), False),
        (lambda: nn.Softmax(1), False),
    ],
)
def test_what_stops_a_path(layer, stops):
    between = layer()
    channels_last = isinstance(between, timm.layers.grn.GlobalResponseNorm)

    def forward(net, x):
        y = net.a(x)
        return net.between(y.movedim(1, -1) if channels_last else y)

    paths = norm_paths(Net(forward, between=between), X)
    assert ("a" in paths.normalized) is stops
    assert ("a" in paths.unnormalized) is not stops
    assert ("b" in paths.unnormalized | paths.normalized) is False  # it didn't run


def test_norms_that_are_no_sites_have_paths_too():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm([3, 3]), nn.ReLU())
    assert norm_paths(model, X) == NormPaths(frozenset({"1"}), frozenset({"0"}), 0)
    assert unnormalized_norms(model, X) == frozenset()


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        (lambda net, x: net.b(net.a(x)), 0),
        (functional, 1),
        (lambda net, x: F.group_norm(F.layer_norm(net.a(x), [3]), 2), 2),
        (lambda net, x: F.batch_norm(x, None, None, training=True), 1),
    ],
)
def test_counts_norms_that_no_patch_of_modules_reaches(forward, calls):
    model = Net(forward)
    assert norm_paths(model, X).num_function_calls == calls
    assert norm_paths(patch(model), X).num_function_calls == calls


@pytest.mark.parametrize("name", ["test_nfnet", "test_resnet", "test_efficientnet_gn", "test_convnext3"])
def test_norms_of_modules_and_of_weights_are_no_function_calls(name):
    model, x = timm.create_model(name), torch.zeros(1, 3, 96, 96)
    assert norm_paths(model, x).num_function_calls == 0
    if inventory(model).norm_layers:
        assert norm_paths(patch(model, 0.1), x).num_function_calls == 0


def test_a_model_compiled_by_torchscript_has_operators_still():
    assert norm_paths(torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))), X).unnormalized == {"0"}


def test_a_shared_norm_has_one_name():
    bn = nn.BatchNorm2d(4)
    assert unnormalized_norms(nn.Sequential(bn, nn.ReLU(), bn), X) == {"0"}


def test_leaves_the_model_as_it_was():
    model = Net(lambda net, x: net.b(net.a(x))).train()
    model.b.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unnormalized_norms(model, X)
    assert (model.training, model.a.training, model.b.training) == (True, True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_says_why_it_does_not_know():
    with pytest.raises(BnpatchError, match=r"does not run on an input of shape \(2, 4, 3, 3\)"):
        unnormalized_norms(get_model("resnet18"), X)
    with pytest.raises(BnpatchError, match="returns a float"):
        unnormalized_norms(Net(lambda net, x: net.a(x).mean().item()), X)
