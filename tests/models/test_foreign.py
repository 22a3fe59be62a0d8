import json
import os
import pathlib
import pickle
import sys
import types
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.checkpoint import read_checkpoint
from bnpatch.models.foreign import reading

STATE = {"0.weight": torch.ones(4), "0.bias": torch.zeros(4)}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
XML = '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
OTHERS = {
    "a Git LFS pointer, not the file itself; run git lfs pull": LFS.encode(),
    "an HTML page; download the file itself": b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "an HTML page": b"\xef\xbb\xbf<HTML lang=en>",
    "an XML document": XML.encode(),
    "a gzip archive; unpack it": b"\x1f\x8b\x08\x00" + bytes(60),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "a TensorFlow Lite file": b"\x1c\0\0\0TFL3" + bytes(60),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ".pt2"])
@pytest.mark.parametrize("message", OTHERS)
def test_other_kinds_of_files_are_called_what_they_are(message, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(OTHERS[message])
    with pytest.raises(BnpatchError, match=message) as error:
        bnpatch.load(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes as files")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ".pt2"])
def test_pipes_and_devices_are_refused(suffix, tmp_path):
    """Reading them would never end."""
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    device = tmp_path / f"zeros{suffix}"
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(BnpatchError, match="no regular file but a pipe or a device; copy it into a file"):
            bnpatch.load(path)


def test_a_zip_archive_without_weights_is_called_so(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.pth", b"something")
    with pytest.raises(BnpatchError, match=r"is a zip archive that torch\.save did not write; unpack it"):
        read_checkpoint(path)


def test_an_archive_that_would_fill_the_memory(tmp_path, monkeypatch):
    """A file of kilobytes can claim gigabytes: its members are compressed."""
    monkeypatch.setenv("BNPATCH_MAX_UNPACKED_MB", "1")
    torch.save({"0.weight": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w") as made:
        for name in plain.namelist():
            made.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    message = r"model\.pt unpacks to 4 MB more than its size .* limit is 1; .* BNPATCH_MAX_UNPACKED_MB to a"
    with pytest.raises(BnpatchError, match=message):
        read_checkpoint(path)
    assert read_checkpoint(tmp_path / "plain.pt").state_dict.keys() == {"0.weight"}
    monkeypatch.setenv("BNPATCH_MAX_UNPACKED_MB", "5")  # the remedy
    assert read_checkpoint(path).state_dict.keys() == {"0.weight"}


class PathOf:
    """Pickled as a path of a system and a version of Python that need not be here."""

    def __init__(self, cls):
        self.cls = cls

    def __reduce__(self):
        return self.cls, ("runs", "best")


@pytest.fixture
def local_paths(monkeypatch):
    """The classes as Python 3.13 has them, in pathlib._local."""
    module = types.ModuleType("pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        setattr(module, name, type(name, (), {"__module__": "pathlib._local"}))
    monkeypatch.setitem(sys.modules, "pathlib._local", module)
    monkeypatch.setattr(pathlib, "_local", module, raising=False)
    return module


@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
@pytest.mark.parametrize("where", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("unsafe", [False, True])
def test_paths_of_every_system(name, where, unsafe, tmp_path, local_paths, monkeypatch):
    path = tmp_path / "model.pt"
    cls = getattr(pathlib if where == "pathlib" else local_paths, name)
    torch.save({"state_dict": STATE, "args": {"output": PathOf(cls)}}, path)
    if sys.version_info < (3, 13):
        monkeypatch.delitem(sys.modules, "pathlib._local")
    assert read_checkpoint(path, unsafe=unsafe).args["output"].name == "best"


def test_a_pickle_that_torch_did_not_write(tmp_path):
    """Torch's advice to load it unsafely would not help."""
    path = tmp_path / "model.pt"
    for content in (pickle.dumps({"a": 1}, protocol=4), b"hello, this is no checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(BnpatchError, match=r"damaged or not a checkpoint .*copy it again") as error:
            read_checkpoint(path)
        assert "weights_only" not in str(error.value)


class Foreign:
    """A class that only the author has."""


def test_a_class_that_is_not_here_and_the_remedies(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": STATE, "config": Foreign()}, path)
    with pytest.raises(BnpatchError, match=r"pickled .*Foreign.*; save a state dict .* or add --unsafe-load"):
        read_checkpoint(path)
    assert read_checkpoint(path, unsafe=True).state_dict.keys() == STATE.keys()
    monkeypatch.delattr(sys.modules[__name__], "Foreign")
    with pytest.raises(BnpatchError, match=r"needs Python code that is not here: .*run where it can be"):
        read_checkpoint(path, unsafe=True)
    torch.save(STATE, path)
    assert read_checkpoint(path).state_dict.keys() == STATE.keys()


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b'{"a": 1}', b"{}"]
)
def test_headers_of_safetensors(header, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BnpatchError, match=r"model\.safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "value", [[1], "text", {"preprocessing": "text", "recipe": 3}, {"preprocessing": {"a": 1}}, "output"]
)
def test_a_damaged_checkpoint_of_bnpatch(value, tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    if value == "output":
        model = bnpatch.load(checkpoint)
        model.save(tmp_path / "good.pt", model.recipe())
        good = torch.load(tmp_path / "good.pt", weights_only=True)["bnpatch"]
        value = {**good, "output": torch.zeros(2)}
    torch.save({**content, "bnpatch": value}, tmp_path / "model.pt")
    if isinstance(value, dict):
        with pytest.raises(BnpatchError, match=r"model\.pt is damaged or not a checkpoint of bnpatch"):
            bnpatch.load(tmp_path / "model.pt")
    else:
        assert bnpatch.load(tmp_path / "model.pt").arch


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": [3, "32", 32]},
        {"input_size": [3, 0, 32]},
        {"input_size": 32},
        {"input_size": [160, 160]},
        {"input_size": [2**62, 32, 32]},
        {"mean": [float("inf")]},
        {"std": ["wide"]},
        {"interpolation": ["bilinear"]},
        {"crop_pct": "0.9"},
        {"crop_pct": 0},
        {"crop_mode": "left"},
        {"size": 32},
    ],
)
def test_a_preprocessing_that_bnpatch_did_not_write(change):
    good = Preprocessing((3, 32, 32), (0.5,), (0.5,)).to_json()
    assert Preprocessing.from_json(json.loads(json.dumps(good)), "here").input_size == (3, 32, 32)
    with pytest.raises(BnpatchError), reading(pathlib.Path("a.pt"), "a checkpoint", "make it again"):
        Preprocessing.from_json({**good, **change}, "here")


def test_a_key_that_cannot_be_printed(tmp_path):
    torch.save({10**5000: 1}, tmp_path / "a.pt")
    with pytest.raises(BnpatchError, match=r"a\.pt is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("error", [RecursionError, MemoryError, KeyError, OverflowError, ValueError])
def test_whatever_a_parser_raises_names_the_file(error):
    with (
        pytest.raises(BnpatchError, match=r"a\.json is damaged or not JSON \(.*\); mend it"),
        reading(pathlib.Path("a.json"), "JSON", "mend it"),
    ):
        raise error


def test_a_counter_of_batches_that_is_no_number_is_left_out(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    counter = next(name for name in content["state_dict"] if name.endswith("num_batches_tracked"))
    content["state_dict"][counter] = torch.arange(3)
    torch.save(content, tmp_path / "model.pt")
    assert bnpatch.load(tmp_path / "model.pt").module.get_buffer(counter).shape == ()


def test_a_null_character_in_a_name():
    with pytest.raises(BnpatchError, match=r"cannot read .*null"):
        read_checkpoint("a\0.pt")


def test_the_content_of_a_file_counts_more_than_its_name(checkpoint, tmp_path):
    """safetensors may be named .pt, and what torch.save wrote .safetensors."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.pt")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        found = bnpatch.load(tmp_path / name).module.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_weights_in_several_files_are_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BnpatchError, match=r"are in several files.*max_shard_size"):
        bnpatch.load(tmp_path)


@pytest.mark.parametrize(
    "cfg", [{"mean": [{}]}, {"std": ["a\0b"]}, {"crop_pct": "0.9"}, {"input_size": [1, 32]}, {"mean": [None]}]
)
def test_a_folder_of_the_hub_whose_configuration_is_damaged(tmp_path, cfg):
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    good = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    for found in (good, {**good, **cfg}):
        config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": found}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if found is good:
            assert bnpatch.load(tmp_path).preprocessing.input_size == (1, 32, 32)
    with pytest.raises(BnpatchError, match=r"config\.json|give the file of the weights"):
        bnpatch.load(tmp_path)
