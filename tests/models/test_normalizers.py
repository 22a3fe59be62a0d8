"""Models that normalize images themselves, as projects on robustness build them."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import Normalize

import bnpatch
from tests.models.small import assert_close
from tests.nn.norms import settle

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
BYTES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SIZE = {"preprocessing": {"img_size": 32}}


def classifier():
    torch.manual_seed(0)
    return settle(timm.create_model("test_resnet", num_classes=3)).eval()


class Layer(nn.Module):
    """Subtracts a mean, and divides by a deviation."""

    def __init__(self, names=("mean", "std"), scale=1.0):
        super().__init__()
        self.names = names
        for name, values in zip(names, (MEAN, STD), strict=True):
            self.register_buffer(name, scale * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, x):
        mean, std = (getattr(self, name) for name in self.names)
        return (x - mean) / std


class Wrapped(Layer):
    """A model with the buffers of such a layer."""

    def __init__(self):
        super().__init__(("mu", "sigma"))
        self.model = classifier()

    def forward(self, x):
        return self.model(super().forward(x))


def before(layer):
    return nn.Sequential(OrderedDict(normalize=layer, model=classifier()))


MODULES = {
    "a layer": lambda: before(Layer()),
    "other names": lambda: before(Layer(("new_mean", "new_std"))),
    "of bytes": lambda: before(Layer(scale=255)),
    "a wrapper": Wrapped,
    "torchvision's": lambda: before(Normalize(MEAN, STD)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_normalizes_images_gets_them_as_they_are(name):
    module = MODULES[name]().eval()
    loaded = bnpatch.load(module, **SIZE)
    assert "the module normalizes images itself" in loaded.preprocessing.source
    expected = module(BYTES.float() if name == "of bytes" else BYTES / 255)
    assert_close(loaded.predict(BYTES), expected)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "torchvision's"])
def test_the_layer_in_a_state_dict_is_the_preprocessing(name, tmp_path):
    """Also where a copy of the model, which an attacker uses, has the layer again."""
    module = MODULES[name]().eval()
    state = module.state_dict()
    for content in (
        state,
        {"model": {f"module.{p}{k}": t for p in ("", "attacker.") for k, t in state.items()}},
    ):
        torch.save(content, tmp_path / "model.pt")
        loaded = bnpatch.load(tmp_path / "model.pt", **SIZE)
        assert "but mean and std of the weights' " in loaded.preprocessing.source
        expected = module(BYTES.float() if name == "of bytes" else BYTES / 255)
        assert_close(loaded.predict(BYTES), expected)


def test_lists_that_tell_how_to_prepare_images_are_no_layer():
    module = classifier()
    module.mean, module.std = list(MEAN), list(STD)
    assert bnpatch.load(module).preprocessing.std != (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "buffers",
    [
        {"mean": (0.5, 0.5)},  # no std
        {"mean": (0.5, 0.5), "std": (0.5, 0.5)},  # of two channels
        {"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)},
        {"mean": (-0.5,) * 3, "std": (0.5,) * 3},
        {"mean": (300.0,) * 3, "std": (50.0,) * 3},
        {"mean": (float("nan"),) * 3, "std": (0.5,) * 3},
    ],
)
def test_other_buffers_are_no_layer(buffers):
    module = classifier()
    before = bnpatch.load(module).preprocessing
    for name, values in buffers.items():
        module.register_buffer(name, torch.tensor(values))
    assert bnpatch.load(module).preprocessing == before


def test_two_layers_that_differ_are_not_taken(tmp_path):
    state = {f"model.{key}": tensor for key, tensor in classifier().state_dict().items()}
    for name, mean in (("one", 0.5), ("two", 0.4)):
        state |= {f"{name}.mean": torch.full((3,), mean), f"{name}.std": torch.full((3,), 0.2)}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(bnpatch.BnpatchError, match=r"beside them are one\.mean, one\.std"):
        bnpatch.load(tmp_path / "model.pt")
