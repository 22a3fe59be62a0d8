"""Frozen Batch Norm that projects wrote themselves, and what other tools make of patched layers."""

import pytest
import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.nn.surgery import inventory, patch, unpatch
from tests.nn.norms import images, settle


class Frozen(nn.Module):
    """Batch Norm whose statistics and parameters are buffers, with an eps that only its code has."""

    def __init__(self, channels, eps=1e-5, error=0.0):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))
        self.constants = eps, error

    def forward(self, x):
        eps, error = self.constants
        scale = self.weight * (self.running_var + eps + error).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class ByBatch(Frozen):
    def forward(self, x):
        return super().forward(x - x.mean((0, 2, 3), keepdim=True) if self.training else x)


def network(norm):
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_frozen_norm_of_ones_own_is_patched_as_batch_norm_is(eps):
    own, plain = network(Frozen(6, eps)), network(nn.BatchNorm2d(6, eps=eps))
    x = images(4, 3, 8, 8)
    before = own(x)
    assert [layer.kind for layer in inventory(own).norm_layers] == ["Frozen"]
    assert torch.equal(patch(own)(x), before)
    torch.testing.assert_close(patch(own, 0.3)(x), patch(plain, 0.3)(x))
    assert torch.equal(own.train()(x), own.eval()(x))  # frozen in training, too
    assert torch.equal(unpatch(own)(x), before)
    assert type(own[1]) is Frozen


@pytest.mark.parametrize("norm", [Frozen(6, error=1e-4), ByBatch(6)], ids=["another formula", "by the batch"])
def test_a_class_that_computes_something_else_is_skipped(norm):
    module = network(norm)
    found = inventory(module)
    assert not found.norm_layers
    (left,) = found.skipped_norms
    assert "torch's BatchNorm2d takes the same tensors" in left.reason
    plain = nn.BatchNorm2d(6)
    assert not plain.load_state_dict(norm.state_dict(), strict=False).unexpected_keys  # what it says is true
    module[1] = plain
    assert len(inventory(patch(module, 0.3)).norm_layers) == 1


class ByHand(nn.Module):
    """The scale and shift that are left of a Batch Norm; the sign tells it from another module."""

    def __init__(self, sign=1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.sign = sign

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1) + self.sign * self.bias.view(1, -1, 1, 1)


def test_a_scale_and_a_shift_by_hand_are_said():
    (left,) = inventory(network(ByHand())).skipped_norms
    assert (left.name, left.kind) == ("1", "ByHand")
    assert "don't tell the running statistics" in left.reason
    assert not inventory(network(ByHand(sign=-1))).skipped_norms


@pytest.mark.parametrize("norm", [Frozen, FrozenBatchNorm2d, FrozenBatchNormAct2d])
@pytest.mark.slow
def test_frozen_norms_are_exported(norm, tmp_path):
    module = patch(network(norm(6)), 0.3)
    done = bnpatch.export_onnx(module, tmp_path / "model.onnx", images(2, 3, 8, 8))
    assert done.patched == ("1",)
    x = images(2, 3, 8, 8) - 1  # some values are negative, so that an activation shows
    torch.testing.assert_close(
        bnpatch.load(tmp_path / "model.onnx").predict(x), module(x), rtol=1e-4, atol=1e-4
    )
    assert type(unpatch(module)[1]) is norm  # the module is as it was


TRACERS = {
    "fx": torch.fx.symbolic_trace,
    "features": lambda module: create_feature_extractor(module, ["4"]),
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
def test_what_torch_fx_traced_can_be_patched_but_not_the_other_way_round(tracer):
    module, x = network(nn.BatchNorm2d(6)), images(4, 3, 8, 8)
    traced = patch(tracer(module), 0.3)  # the remedy
    with pytest.raises(BnpatchError, match=r"torch\.fx can't trace a patched layer.*before patching"):
        tracer(patch(module, 0.3))
    found = traced(x)
    torch.testing.assert_close(found["4"] if isinstance(found, dict) else found, module(x))


@pytest.mark.filterwarnings("ignore:the running variance of a patched layer")  # torch.jit looks at all
def test_torchscript_traces_and_does_not_compile():
    module, x = patch(network(nn.BatchNorm2d(6)), 0.3), images(4, 3, 8, 8)
    with pytest.raises(BnpatchError, match=r"can't compile a patched layer; use torch\.jit\.trace"):
        torch.jit.script(module)
    assert torch.equal(torch.jit.trace(module, x)(x), module(x))


def test_synchronizing_batch_norm_leaves_patched_layers():
    module, x = patch(network(nn.BatchNorm2d(6)), 0.3), images(4, 3, 8, 8)
    expected = module(x)
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(module)(x), expected)
