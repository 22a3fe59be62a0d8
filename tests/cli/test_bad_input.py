"""Bad models, data, options and usage: one line, exit code 2, and nothing written."""

import os
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import bnpatch
from tests.command_line import one_line
from tests.onnx.build import bn_model


def write_net_without_norm(path):
    torch.save(timm.create_model("test_vit").state_dict(), path)


def write_nan(path):
    state = timm.create_model("test_resnet").state_dict()
    state["fc.bias" if "fc.bias" in state else next(iter(state))][0] = float("nan")
    torch.save(state, path)


MODELS = {
    "missing.pt": (None, "cannot read missing.pt: no such file"),
    "empty.pt": (lambda path: path.touch(), "empty.pt is empty"),
    "folder.pt": (lambda path: path.mkdir(), "folder.pt is a folder"),
    "truncated.pt": ("truncated", "truncated.pt is damaged or not a checkpoint"),
    "strange.pt": (lambda path: torch.save({"w": torch.zeros(3)}, path), "strange.pt fit no architecture"),
    "vit.pt": (write_net_without_norm, "none can be patched; skipped: LayerNorm"),
    "nan.pt": (write_nan, "are not finite"),
    "pickled.pt": (lambda path: torch.save(torch.nn.BatchNorm2d(3), path), "add --unsafe-load if you trust"),
    "model.onnx": (lambda path: path.touch(), "model.onnx is empty"),
    "text.onnx": (lambda path: path.write_text("hello"), "is not an ONNX model"),
    "missing.onnx": (None, "missing.onnx: no such file"),
    "bad.pt2": (lambda path: path.write_text("hello"), "damaged or not a torch.export program"),
    "timm:resnt50": (None, "did you mean"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(cli, name, folder, checkpoint, tmp_path):
    make, message = MODELS[name]
    if make == "truncated":
        (tmp_path / name).write_bytes(checkpoint.read_bytes()[:-1000])
    elif make:
        make(tmp_path / name)
    check_refused(cli("tune-alpha", name, "--data", folder), message, tmp_path)


def check_refused(said, message, tmp_path):
    code, out, err = said
    assert code == 2
    assert message in one_line(err)
    assert out == ""
    assert not list(tmp_path.glob("bnpatch-out/*"))


def write_other_classes(path):
    for name in "abc":
        (path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(path / name / "a.png")


def write_one_class(path):
    (path / "3").mkdir(parents=True)
    for index in range(4):
        Image.new("L", (8, 8), index).save(path / "3" / f"{index}.png")


def write_only_broken(path):
    for name in "01":
        (path / name).mkdir(parents=True)
        for index in range(3):
            (path / name / f"{index}.png").write_bytes(b"nothing")


DATA = {
    "missing": (None, "there is no 'missing'"),
    "empty": (lambda path: path.mkdir(), "empty has no images"),
    "mismatch": (write_other_classes, "has 3 class folders, the model has 10 outputs"),
    "one": (write_one_class, "all examples are of one class"),
    "broken": (write_only_broken, "none of the images can be read, 0/"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(cli, name, checkpoint, tmp_path):
    make, message = DATA[name]
    if make:
        make(tmp_path / name)
    check_refused(cli("tune-alpha", checkpoint, "--data", name), message, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "torchvision:resnet18"], "the weights do not fit torchvision:resnet18"),
        (["--arch", "resnt18"], "no architecture 'resnt18'"),
        (["--metric", "f1"], "no metric 'f1'"),
        (["--trials", "0"], "0 trials find nothing"),
        (["--holdout", "1"], "not a fraction"),
        (["--max-overhead", "0.5"], "not possible"),
        (["--max-passes", "0"], "0.0 passes find nothing"),
        (["--class-prior", "1,2"], "a class prior is for tuning without labels"),
        (["--augment", "rain"], "no augmentation 'rain'"),
        (["--keep-data", "nope"], "there is no 'nope'"),
        (["--margin", "1"], "a margin of 1 is not a fraction"),
        (["--storage", "nope/x"], "is no database"),
        (["--mean", "a,b"], "--mean 'a,b' is not a list of numbers"),
        (["--std", "0"], "is not positive"),
        (["--mean", ","], "is not a list of numbers"),
        (["--mean", ".1,.2"], "--mean has 2 values, the model 1 channel"),
        (["--interpolation", "magic"], "no interpolation 'magic'"),
        (["--data", "torch/cifar10"], "cannot open the data set torch/cifar10"),
        (["--device", "tpu9"], "no device 'tpu9'"),
        (["--class-map", "nope.txt"], "cannot read the class map nope.txt"),
        (["--use-ema"], "no averaged weights"),
        (["--test-data", "nope"], "there is no 'nope'"),
        (["-o", "/dev/null/out"], "cannot write /dev/null/out"),
    ],
)
def test_bad_options(cli, checkpoint, folder, options, message):
    code, _, err = cli("tune-alpha", checkpoint, "--data", folder, *options)
    assert code == 2
    assert message in one_line(err)


def test_options_are_checked_before_the_model_is_loaded(cli):
    for options in (["--metric", "f1"], ["--augment", "rain"], ["--holdout", "1"]):
        code, _, err = cli("tune-alpha", "no-such.pt", "--data", "nowhere", *options)
        assert code == 2
        assert options[1] in one_line(err)
        assert "no-such.pt" not in err


def test_bad_usage_is_exit_code_2(cli, checkpoint):
    for args in (["tune-alpha"], ["tune-alpha", checkpoint], ["nope"], ["evaluate", checkpoint, "--data"]):
        assert cli(*args)[0] == 2


def test_a_defect_of_our_own_is_one_line_too(cli, checkpoint, folder, monkeypatch):
    monkeypatch.setattr(bnpatch.TorchModel, "inventory", lambda self: 1 / 0)
    code, _, err = cli("tune-alpha", checkpoint, "--data", folder)
    assert code == 2
    assert "ZeroDivisionError: division by zero; this is a defect of bnpatch" in one_line(err)


def test_help_has_examples_and_is_quick(cli):
    for command in ("tune-alpha", "evaluate", "inspect", "bench"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert f"bnpatch {command} " in out
    bnpatch_, torch_, onnxruntime_ = cli("--version")[1].splitlines()
    assert bnpatch_.split(",")[0] == f"bnpatch {bnpatch.__version__}"
    assert torch_ == f"torch {torch.__version__} on cpu"
    assert onnxruntime_ == f"onnxruntime {onnxruntime.__version__}"


@pytest.mark.slow
def test_debug_shows_the_traceback_and_what_libraries_log(tmp_path):
    proto = bn_model()
    proto.graph.node[0].input[0] = "nowhere"
    (tmp_path / "damaged.onnx").write_bytes(proto.SerializeToString())
    command = [sys.executable, "-m", "bnpatch_cli", "--debug", "inspect", tmp_path / "damaged.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "onnx_ir.serde:Input 'nowhere' of node" in done.stderr


def test_debug_may_stand_anywhere(cli, capsys):
    with pytest.raises(bnpatch.BnpatchError):
        cli("inspect", "nope.pt", "--debug")


@pytest.mark.parametrize("given", [None, "0"])
def test_torch_uses_large_pages_unless_the_environment_says_otherwise(cli, monkeypatch, given):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "0")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert cli("--version")[0] == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (given or "1")
