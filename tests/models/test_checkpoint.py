import argparse
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.models.checkpoint import read_checkpoint


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


STATE = small().state_dict()
OTHER = {key: value + 1 for key, value in STATE.items()}


def prefixed(prefix, state=STATE):
    return {f"{prefix}{key}": value for key, value in state.items()}


LAYOUTS = {
    "a bare state dict": STATE,
    "timm": {
        "epoch": 3,
        "arch": "net",
        "state_dict": STATE,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "version": 2,
        "args": argparse.Namespace(model="net", opt_betas=None, output=pathlib.PosixPath("out")),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": OTHER,
        "metric": np.float64(71.5),
    },
    "torchvision": {
        "model": STATE,
        "optimizer": {},
        "epoch": 3,
        "args": argparse.Namespace(model="net"),
        "model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.", OTHER)},
    },
    "PyTorch's ImageNet example": {
        "epoch": 1,
        "arch": "net",
        "state_dict": prefixed("module."),
        "best_acc1": torch.tensor(70.0),
    },
    "Lightning": {
        "state_dict": prefixed("model."),
        "hyper_parameters": {"model_name": "net"},
        "pytorch-lightning_version": "2.5",
        "callbacks": {},
    },
    "compiled": {"net": prefixed("_orig_mod."), "arch": "net"},
    "compiled and parallel": {"model_state_dict": prefixed("module._orig_mod."), "arch": "net"},
    "a backbone": prefixed("backbone."),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_finds_weights_and_architecture(name, tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save(LAYOUTS[name], path)
    found = read_checkpoint(path)
    assert found.state_dict.keys() == STATE.keys()
    assert torch.equal(found.state_dict["0.weight"], STATE["0.weight"])
    assert found.arch == (None if name in ("a bare state dict", "a backbone") else "net")


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_takes_averaged_weights_when_asked(name, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(LAYOUTS[name], path)
    assert torch.equal(read_checkpoint(path, use_ema=True).state_dict["0.weight"], OTHER["0.weight"])
    torch.save(STATE, path)
    with pytest.raises(BnpatchError, match="no averaged weights; leave out --use-ema"):
        read_checkpoint(path, use_ema=True)


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    assert torch.equal(read_checkpoint(path).state_dict["1.weight"], STATE["1.weight"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BnpatchError, match="damaged or not a safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "stored",
    [{"class_to_idx": {"b": 1, "a": 0}}, {"class_names": ["a", "b"]}, {"classes": ("a", "b")}],
)
def test_finds_class_names(stored, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": STATE, **stored}, path)
    assert read_checkpoint(path).class_names == ("a", "b")


def test_old_densenet_names_are_read(tmp_path):
    path = tmp_path / "model.pt"
    old = "features.denseblock1.denselayer1.norm.1.weight"
    torch.save({old: torch.ones(1)}, path)
    assert list(read_checkpoint(path).state_dict) == ["features.denseblock1.denselayer1.norm1.weight"]


def test_a_pickled_module_needs_trust(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(small(), path)
    with pytest.raises(BnpatchError, match=r"pickled torch\.nn.* can run any code; .* --unsafe-load"):
        read_checkpoint(path)
    assert isinstance(read_checkpoint(path, unsafe=True).module, nn.Sequential)
    torch.save({"model": small()}, path)
    assert isinstance(read_checkpoint(path, unsafe=True).module, nn.Sequential)


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def test_safe_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "x": Bomb()}, "model.pt")
    with pytest.raises(BnpatchError, match="--unsafe-load"):
        read_checkpoint("model.pt")
    assert not pathlib.Path("exploded").exists()


def write_torchscript(path):
    torch.jit.save(torch.jit.script(small()), path)


def write_exported(path):
    torch.export.save(torch.export.export(small().eval(), (torch.zeros(1, 3, 4, 4),)), path)


def write_truncated(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


BAD = {
    "is empty": lambda path: path.touch(),
    "is a folder": lambda path: path.mkdir(),
    "no such file": lambda path: None,
    "damaged or not a checkpoint": write_truncated,
    "not a checkpoint": lambda path: path.write_text("hello, this is no checkpoint at all"),
    "is a TorchScript archive": write_torchscript,
    r"is a torch\.export program": write_exported,
    "holds a list, not weights": lambda path: torch.save([1, 2], path),
    "has no weights that bnpatch can find among its keys epoch": lambda path: torch.save({"epoch": 1}, path),
    r"weights 0\.weight are not finite": lambda path: torch.save(
        {**STATE, "0.weight": torch.tensor([np.nan])}, path
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses_in_one_line(message, tmp_path):
    path = tmp_path / "model.pt"
    BAD[message](path)
    with pytest.raises(BnpatchError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert error.value.remedy
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "loop.pt"
    path.symlink_to(path)  # the tests may run as root, who may read anything that exists
    with pytest.raises(BnpatchError, match=r"cannot read .*loop\.pt"):
        read_checkpoint(path)
