import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

import bnpatch
from bnpatch.models.running_stats import calibrate
from bnpatch.nn.tracing import functional_norms
from tests.nn.norms import images, settle

X = images(6, 3, 12, 12, seed=2)


class Block(nn.Module):
    """Normalizes by calls, as code that was ported from elsewhere does."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.gamma, self.beta = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("rm", torch.randn(channels) * 0.1)
        self.register_buffer("rv", torch.rand(channels) + 0.5)

    def forward(self, x):
        x = F.batch_norm(self.conv(x), self.rm, self.rv, self.gamma, self.beta)
        return F.group_norm(x.relu(), 2, self.gamma, self.beta)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.bn = Block(), nn.BatchNorm2d(8)
        self.std = timm.layers.StdConv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.std(self.bn(self.block(x)).relu())
        x = F.instance_norm(x) + F.batch_norm(x, None, None, training=True)
        return self.head(x.relu().mean((2, 3)))


def found(model):
    return functional_norms(model, lambda: model(X))


@pytest.mark.parametrize("patched", [False, True])
def test_calls_are_seen_with_the_module_that_they_are_in(patched):
    torch.manual_seed(0)
    model = settle(Net())
    expected = model(X)
    if patched:
        bnpatch.patch(model, 0.1)  # its own calls are none of them
    seen = {(left.name, left.kind): left.reason for left in found(model)}
    assert seen.keys() == {
        ("block", "F.batch_norm"), ("block", "F.group_norm"), ("", "F.instance_norm"), ("", "F.batch_norm"),
    }  # fmt: skip
    assert "export the model" in seen["block", "F.batch_norm"]
    assert "export the model" in seen["block", "F.group_norm"]
    assert "by its own batch" in seen["", "F.batch_norm"]
    assert "on purpose" in seen["", "F.instance_norm"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if not patched:
        assert torch.equal(model(X), expected)


def test_models_without_such_calls_have_none():
    for layer in (
        timm.layers.StdConv2d(3, 8, 1),
        nn.BatchNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.InstanceNorm2d(3),
    ):
        assert found(nn.Sequential(layer).eval()) == ()


def test_several_calls_are_counted_and_a_failure_leaves_no_hook():
    class Twice(nn.Module):
        def forward(self, x):
            return F.group_norm(F.group_norm(x, 1), 3)

    (left,) = found(Twice())
    assert (left.name, left.kind) == ("", "F.group_norm x 2")
    model = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(RuntimeError):
        found(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_calls_are_sites_of_the_export(tmp_path):
    torch.manual_seed(0)

    class Classifier(nn.Sequential):
        pass

    module = Classifier(Block(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval()
    expected = module(X).detach()
    bnpatch.export_onnx(module, tmp_path / "model.onnx", X[:2])
    model = bnpatch.load(tmp_path / "model.onnx")
    (norm_layer,) = model.inventory().norm_layers
    assert (norm_layer.kind, norm_layer.num_channels) == ("BatchNormalization", 8)
    assert norm_layer.name.startswith("0.")  # and then torch's name of the operator
    (waiting,) = model.uncalibrated()
    assert waiting == "0.group_norm"
    torch.testing.assert_close(model.predict(X), expected, rtol=1e-4, atol=1e-5)  # float32
    calibrate(model, X)
    torch.testing.assert_close(model.predict(X), expected, rtol=1e-4, atol=1e-5)
    model.set_alphas({norm_layer.name: 0.3, waiting: 0.5})
    assert not torch.allclose(model.predict(X), expected, atol=1e-2)
