"""Weights that training stored in parts: the loaded model computes what the model in training does."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import bnpatch
from bnpatch.models.reparametrized import computed
from tests.models.small import assert_close
from tests.nn.norms import images, settle


def pruned(module):
    for layer in (module.layer1[0].conv1, module.fc):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_structured(module.layer1[0].conv2, "weight", amount=0.3, dim=0)
    prune.l1_unstructured(module.fc, "bias", amount=1)


def normalized(module):
    weight_norm(module.fc)
    weight_norm(module.layer1[0].conv1, dim=1)
    weight_norm(module.layer1[0].conv2, dim=None)


def parametrized(module):
    parametrizations.weight_norm(module.fc)
    parametrizations.weight_norm(module.layer1[0].conv1, dim=1)


def spectral(module):
    spectral_norm(module.fc)
    spectral_norm(module.layer1[0].conv1)


@pytest.mark.parametrize("change", [pruned, normalized, parametrized, spectral])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_in_parts_are_computed(change, tmp_path):
    torch.manual_seed(0)
    plain = settle(timm.create_model("test_resnet", num_classes=3)).eval()
    module = copy.deepcopy(plain)
    change(module)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in module.parameters():  # other than what the plain model had
            parameter.mul_(1.5)
        expected = module.eval()(x)
    assert (expected - plain(x)).abs().max() > 0.01 * expected.abs().max()
    assert not module.state_dict().keys() <= plain.state_dict().keys()
    torch.save(
        {"state_dict": {f"module.{key}": t for key, t in module.state_dict().items()}}, tmp_path / "m.pt"
    )
    loaded = bnpatch.load(tmp_path / "m.pt", arch="timm:test_resnet", preprocessing={"img_size": 32})
    assert_close(loaded.predict(x), expected)


def test_a_transposed_convolution_has_the_axis_of_its_outputs():
    module = spectral_norm(nn.ConvTranspose2d(3, 5, 2))
    module(torch.ones(1, 3, 2, 2))
    expected = module.eval()(torch.ones(1, 3, 2, 2))
    plain = nn.ConvTranspose2d(3, 5, 2)
    plain.load_state_dict(computed(module.state_dict()))
    assert_close(plain(torch.ones(1, 3, 2, 2)), expected)


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight_orig": torch.ones(2, 3)},
        {"a.weight_orig": torch.ones(2, 3), "a.weight_mask": torch.ones(3, 2)},
        {"a.weight_orig": torch.ones(2, 3), "a.weight_u": torch.ones(9), "a.weight_v": torch.ones(9)},
        {"a.weight_g": torch.ones(2), "a.weight_v": torch.ones(2, 3)},
        {"a.weight_g": torch.ones(2, 1), "a.weight_v": torch.ones(3, 3)},
        {"a.weight": torch.ones(2), "a.weight_orig": torch.ones(2), "a.weight_mask": torch.ones(2)},
    ],
)
def test_what_are_no_parts_stays(state):
    assert computed(state).keys() == state.keys()
