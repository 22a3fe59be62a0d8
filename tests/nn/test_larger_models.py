"""Backbones inside larger models: detection, segmentation, a user's own wrapper of two encoders."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import bnpatch
from tests.nn.norms import images, settle

detection, segmentation = torchvision.models.detection, torchvision.models.segmentation


class TwoEncoders(nn.Module):
    """An image encoder with Batch Norm and a text encoder with Layer Norm, compared."""

    def __init__(self):
        super().__init__()
        self.visual = timm.create_model("test_resnet", num_classes=0)
        self.text = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), 1, enable_nested_tensor=False
        )
        self.project = nn.Linear(self.visual.num_features, 32)

    def forward(self, x):
        tokens = torch.linspace(-1, 1, 64).view(1, 2, 32)
        return {"logits": self.project(self.visual(x)) @ self.text(tokens)[0].T}


MODELS = {
    "fasterrcnn_resnet50_fpn": lambda: detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        norm_layer=torchvision.ops.FrozenBatchNorm2d,
        min_size=64,
        max_size=64,
    ),
    "ssdlite320_mobilenet_v3_large": lambda: detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None
    ),
    "lraspp_mobilenet_v3_large": lambda: segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None
    ),
    "two encoders": TwoEncoders,
}


def tensors(output):
    """All tensors in what a model returns, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors(part)]


DETECTORS = {"fasterrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in DETECTORS else name for name in MODELS]
)
def test_the_baseline_is_exact_and_a_weight_counts(name):
    torch.manual_seed(0)
    model = settle(MODELS[name]())
    expected_sites = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d))
    ]
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        before, keys = tensors(model(x)), list(model.state_dict())
        # An untrained detector may find nothing, before and after
        backbone = getattr(model, "backbone", model)
        features = tensors(backbone(x))
        bnpatch.patch(model)
        assert [norm_layer.name for norm_layer in bnpatch.inventory(model).norm_layers] == expected_sites
        assert len(expected_sites) > 10
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), before, strict=True))
        assert list(model.state_dict()) == keys
        bnpatch.patch(model, 0.2)
        assert all(torch.isfinite(t).all() for t in tensors(model(x)))
        assert not all(torch.equal(a, b) for a, b in zip(tensors(backbone(x)), features, strict=True))
        bnpatch.unpatch(model)
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), before, strict=True))


def test_frozen_batch_norm_trains_as_it_did():
    """It normalizes by its running statistics in training too, patched or not, and has no parameters."""
    torch.manual_seed(0)
    layer = torchvision.ops.FrozenBatchNorm2d(8)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), layer)).train()
    x = images(2, 3, 8, 8)
    before = model(x)
    bnpatch.patch(model, 0.0)
    assert torch.equal(model(x), before)
    bnpatch.patch(model, 0.3)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    after.sum().backward()
    assert model[0].weight.grad is not None
    assert list(model[1].parameters()) == []
