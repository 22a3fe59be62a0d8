import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.models.running_stats import re_estimate_statistics, recover_fused
from bnpatch.nn.fused_conv import RecoveredNorm
from tests.nn.norms import images, settle

SIZE = 32
# Images that differ in contrast and brightness, or the example would have nothing to say.
X = images(24, 3, SIZE, SIZE, seed=5) * torch.linspace(0.2, 3, 24).view(-1, 1, 1, 1) + images(24, 3, 1, 1)
DATA = (X, np.zeros(len(X), np.int64))


class Plain(nn.Module):
    """Convolutions and Batch Norm, squeeze and excite with biases, and a Layer Norm after a bias."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.gn = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(self.gn(self.conv3(x)).relu().mean((2, 3)))


def fused(seed=0):
    """The model, and the same with its Batch Norm fused; trained, in that its statistics are those of X."""
    torch.manual_seed(seed)
    model = settle(Plain())
    for norm, conv in ((model.bn1, model.conv1), (model.bn2, model.conv2)):
        seen = []
        handle = conv.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach()))
        model(X)
        handle.remove()
        norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
        norm.running_var.copy_(seen[0].var((0, 2, 3), correction=0))
    folded = copy.deepcopy(model)
    for i in (1, 2):
        conv, norm = getattr(folded, f"conv{i}"), getattr(folded, f"bn{i}")
        setattr(folded, f"conv{i}", fuse_conv_bn_eval(conv, norm))
        setattr(folded, f"bn{i}", nn.Identity())
    return model, folded


def load(module):
    return bnpatch.load(module, preprocessing={"img_size": SIZE})


def recovered(module):
    model = load(module)
    recover_fused(model, bnpatch.open_examples(DATA, model))
    return model


def test_a_recovered_site_does_what_the_batch_norm_would():
    original, folded = fused()
    model = load(folded)
    assert model.fused_convs() == ("conv1", "conv2")
    before, keys = model.predict(X), list(folded.state_dict())
    assert recover_fused(model, bnpatch.open_examples(DATA, model), batch_size=7) == 2
    assert [norm_layer.name for norm_layer in model.inventory().norm_layers] == [
        "conv1.folded",
        "conv2.folded",
    ]
    assert model.fused_convs() == ()
    assert torch.equal(model.predict(X), before)
    assert list(folded.state_dict()) == keys
    model.set_alphas(0.0)
    assert torch.equal(model.predict(X), before)
    assert list(folded.state_dict()) == keys
    for alpha in (0.1, 0.6):
        model.set_alphas(alpha)
        with torch.no_grad():
            expected = bnpatch.patch(original, alpha)(X)
        torch.testing.assert_close(model.predict(X), expected, rtol=1e-3, atol=1e-3)  # up to eps
        assert not torch.allclose(expected, before, atol=0.01)
    bnpatch.unpatch(folded)
    assert torch.equal(folded(X), before)
    assert isinstance(folded.conv1.folded, RecoveredNorm)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_types_and_training(clone):
    model = recovered(fused()[1])
    model.set_alphas(0.3)
    copied = clone(model.module)
    torch.testing.assert_close(copied(X), model.predict(X))
    copied.conv1.folded.running_mean += 1  # has its own
    assert not torch.allclose(copied(X), model.predict(X))
    assert clone(model.module).half().conv1.folded.parameters_of_norm()[3].dtype == torch.float16
    again = load(clone(model.module))
    assert again.recipe().to_json() == model.recipe().to_json()


@pytest.mark.slow
def test_the_recipe_makes_it_again_and_fits_the_export(tmp_path):
    model = recovered(fused()[1])
    examples = bnpatch.open_examples((0.5 * X, DATA[1]), model)
    model.set_state(model.state.with_re_estimated(re_estimate_statistics(model, examples)))
    model.set_weights(
        PatchWeights({"conv1.folded": 0.2, "conv2.folded": 0.0}, {"conv1.folded": 0.0, "conv2.folded": 0.6})
    )
    expected = model.predict(X)
    fresh = bnpatch.apply(fused()[1], model.recipe())
    assert torch.equal(fresh(X), expected)
    done = bnpatch.export_onnx(model, tmp_path / "patched.onnx", X[:2])
    assert done.patched == ("conv1.folded", "conv2.folded")
    assert torch.equal(model.predict(X), expected)
    plain = load(fused()[1])
    bnpatch.export_onnx(plain, tmp_path / "plain.onnx", X[:2])
    in_onnx = bnpatch.load(tmp_path / "plain.onnx")
    assert in_onnx.fused_convs() == ("conv1", "conv2")
    in_onnx.apply(model.recipe())
    torch.testing.assert_close(in_onnx.predict(X), expected, rtol=1e-4, atol=1e-4)  # float32
    with pytest.raises(BnpatchError, match=r"parameters of norm layer 'conv1\.folded' differ"):
        load(fused(seed=1)[1]).apply(model.recipe())


def test_a_borrowed_model_keeps_what_was_recovered():
    model = recovered(fused()[1])
    recipe = model.recipe().to_json()
    assert all("calibrated" in norm_layer for norm_layer in recipe["sites"])
    with model.borrowed():
        model.set_alphas(0.5)
    assert model.recipe().to_json() == recipe


def test_a_module_of_ones_own():
    module = fused()[1]
    before = module(X)
    with pytest.raises(BnpatchError, match=r"no running statistics: gn"):
        bnpatch.patch(module, 0.1)
    assert bnpatch.recover_fused(module, X) == 2
    bnpatch.patch(module, {"conv1.folded": 0.1})
    assert not torch.equal(module(X), before)


def test_nothing_to_recover_is_said():
    model = load(fused()[0])
    with pytest.raises(BnpatchError, match="no convolution that a Batch Norm may have been fused into"):
        recover_fused(model, bnpatch.open_examples(DATA, model))
    with pytest.raises(BnpatchError, match=r"no norm 'squeez\.folded'"):
        model.set_running({"squeez.folded": Moments(np.zeros(8), np.ones(8))})


@pytest.mark.slow
def test_a_transformer_that_embeds_patches_has_nothing_folded(tmp_path):
    model = load(settle(timm.create_model("test_vit", num_classes=5, img_size=SIZE, depth=1)))
    nn.init.normal_(model.module.patch_embed.proj.bias)
    assert model.fused_convs() == ()
    bnpatch.export_onnx(model, tmp_path / "vit.onnx", X[:2])
    assert bnpatch.load(tmp_path / "vit.onnx").fused_convs() == ()


@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        pytest.param("repvgg_a0", 15, marks=pytest.mark.slow),
        pytest.param("mobileone_s0", 30, marks=pytest.mark.slow),
        ("fastvit_t8", 10),
    ],
)
def test_reparameterized_models_of_timm(name, fewest):
    model = load(reparameterize_model(settle(timm.create_model(name, num_classes=5))))
    names = model.fused_convs()
    assert len(names) >= fewest
    assert not any(".se." in name for name in names)
    before = model.predict(X[:4])
    recover_fused(model, bnpatch.open_examples((X[:4], DATA[1][:4]), model))
    assert torch.equal(model.predict(X[:4]), before)
    model.set_alphas({f"{n}.folded": 0.2 for n in names})
    after = model.predict(X[:4])
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_what_torch_fuses_for_quantization():
    """Conv-BN-ReLU becomes one module of torch.ao, whose convolution is inside it."""
    model = settle(torchvision.models.quantization.resnet18(weights=None, quantize=False)).eval()
    norm_layers = len(bnpatch.inventory(model).norm_layers)
    x = images(8, 3, 64, 64)
    before = model(x)
    model.fuse_model()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not bnpatch.inventory(model).norm_layers
    fused_model = load(model)
    assert len(fused_model.fused_convs(x[:1])) == norm_layers
    assert recover_fused(fused_model, (x, np.zeros(8, np.int64))) == norm_layers
    before = fused_model.predict(x)
    fused_model.set_alphas(0.2)
    assert not torch.allclose(fused_model.predict(x), before)
