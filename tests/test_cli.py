"""The command line as a user meets it: what it prints where, what it writes, how it ends."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.data.dataset import split
from bnpatch_cli import main
from tests.data.test_examples import BROKEN, break_images

QUICK = ["--granularity", "global", "--holdout", "0.5", "-j", "0"]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bnpatch", *map(str, args)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def run_in(folder, *args):
    """What a command that must end well prints to stdout and to stderr, started in this folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["bnpatch", *map(str, args)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def tuned(checkpoint, folder, tmp_path_factory):
    """A folder with the results of a search, at another size of images than the checkpoint's own."""
    place = tmp_path_factory.mktemp("tuned")
    run_in(place, "tune-alpha", checkpoint, "--data", folder, "--img-size", 48, *QUICK)
    return place / "bnpatch-out"


@pytest.fixture(scope="module")
def flat(folder, tmp_path_factory):
    """Images without labels, in a plain folder."""
    place = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted(folder.glob("*/*.png"))[:20]):
        shutil.copy(path, place / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def plain(checkpoint, flat, tmp_path_factory):
    """The checkpoint as the command exports it without a recipe, and what the command says."""
    place = tmp_path_factory.mktemp("plain")
    out, _ = run_in(place, "export", checkpoint, "--data", flat, "-o", "model.onnx")
    return place / "model.onnx", out


def one_line(err):
    """The error, which must be the only thing that says error, and without a traceback."""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.rstrip().endswith(line)
    return line.removeprefix("error: ")


def test_tune_alpha_writes_what_it_promises(cli, checkpoint, foggy, tmp_path):
    np.savez("foggy.npz", x=foggy[0], y=foggy[1])
    code, out, err = cli("tune-alpha", checkpoint, "--data", "foggy.npz", *QUICK)
    assert code == 0
    # Ten seeds of the classifier gained 21 to 36 points, each more than five standard errors.
    assert re.search(
        r"accuracy +\d+\.\d\d% +\d+\.\d\d% +[+-]\d+\.\d\d +\[[+-]\d+\.\d\d, [+-]\d+\.\d\d\] +gain", out
    )
    assert "calibration error" in out
    listed = out[out.index("candidates (selection)") : out.index("held-out")]
    assert re.search(r"baseline +\d+\.\d\d% *\n> alpha +\d+\.\d\d% +\+\d+\.\d\d\n", listed)  # and no interval
    assert "the held-out evaluation is the number to believe" in out
    assert re.search(r"\d+ answers became right, \d+ became wrong", out)
    assert "300 examples that the search did not see" in out
    assert "from the checkpoint's training arguments" in err
    assert "300 to tune on, 300 judged by" in err

    results = tmp_path / "bnpatch-out"
    assert {p.name for p in results.iterdir()} == {
        "recipe.json",
        "patched.pt",
        "alpha-curve.png",
        "trials.csv",
        "report.html",
    }
    recipe = Recipe.load(results / "recipe.json")
    (alpha,) = set(recipe.alphas.values())
    assert recipe.provenance["command"] == " ".join(
        map(str, ["tune-alpha", checkpoint, "--data", "foggy.npz", *QUICK])
    )
    trials = list(csv.DictReader((results / "trials.csv").open()))
    assert float(trials[0]["weight"]) == 0
    assert trials[0]["examples"] == "300"
    whole = [float(trial["weight"]) for trial in trials if trial["examples"] == "300"]
    assert any(weight == pytest.approx(alpha) for weight in whole)
    assert Image.open(results / "alpha-curve.png").size[0] > 600
    assert set(bnpatch.load(results / "patched.pt").alphas().values()) == {alpha}


def cross_entropy(cli, *args):
    """Of the model, or of the model with a recipe."""
    code, out, _ = cli("evaluate", *args, "--json")
    assert code == 0
    content = json.loads(out)
    if "--recipe" in args:
        return content["comparisons"]["cross-entropy"]["after"]["value"]
    return content["scores"]["cross-entropy"]["value"]


def test_the_patched_checkpoint_scores_as_the_recipe_does(cli, checkpoint, folder, tuned):
    _, patched, _ = cli("evaluate", tuned / "patched.pt", "--data", folder, "--json")
    recipe = ("--recipe", tuned / "recipe.json")
    _, compared, _ = cli("evaluate", checkpoint, "--data", folder, *recipe, "--json")
    scores = json.loads(patched)["scores"]
    assert set(scores) == {"accuracy", "top5", "cross-entropy"}
    for name, score in scores.items():
        assert score == json.loads(compared)["comparisons"][name]["after"]
    code, out, _ = cli("evaluate", checkpoint, "--data", folder)
    assert code == 0
    assert re.search(r"accuracy +\d+\.\d\d% +\[\d+\.\d\d%, \d+\.\d\d%\]", out)


def test_top5_of_five_classes_is_computed_but_not_shown(cli, foggy):
    model = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, "model.pt")
    few = foggy[1] < 5
    np.savez("foggy.npz", x=foggy[0][few][:20], y=foggy[1][few][:20])
    command = ("evaluate", "model.pt", "--data", "foggy.npz", "--img-size", "32")
    code, out, _ = cli(*command)
    assert code == 0
    assert re.findall(r"^[a-z][\w-]*", out, re.MULTILINE) == ["metric", "accuracy", "cross-entropy"]
    assert json.loads(cli(*command, "--json")[1])["scores"]["top5"]["value"] == 1


def test_json_is_alone_on_stdout(cli, checkpoint, folder):
    code, out, err = cli("tune-alpha", checkpoint, "--data", folder, "--json", *QUICK)
    content = json.loads(out)
    assert code == 0
    model = bnpatch.load(checkpoint)
    val = bnpatch.open_examples(folder, model)
    as_it_is = bnpatch.evaluate(model, val, indices=split(val.strata, 0.5, 0)[1])
    before = content["held_out"]["cross-entropy"]["before"]["value"]
    assert before == pytest.approx(as_it_is.values["cross-entropy"].mean(), rel=1e-5)
    assert content["data"]["held_out_examples"] == 60
    assert "model" in err
    code, out, _ = cli("inspect", checkpoint, "--json")
    assert code == 0
    content = json.loads(out)
    assert [norm_layer["alpha"] for norm_layer in content["sites"]] == [0.0] * len(content["sites"])
    assert content["outputs"] == 10


def test_inspect(cli, checkpoint, tmp_path):
    code, out, _ = cli("inspect", checkpoint)
    norm_layers = bnpatch.load(checkpoint).inventory().norm_layers
    assert code == 0
    assert "12 norm layers to weigh examples at" in out
    assert "3 more see one value per channel and stay plain: layer4.0.bn1" in out
    code, out, _ = cli("inspect", checkpoint, "--sites")
    assert all(norm_layer.name in out for norm_layer in norm_layers)
    torch.save(timm.create_model("test_efficientnet_gn").state_dict(), tmp_path / "gn.pt")
    code, out, _ = cli("inspect", "gn.pt")
    assert code == 0
    assert "0 norm layers" in out
    assert "GroupNormAct" in out
    assert "estimated" in out


def test_inspect_advises_on_training(cli, checkpoint, folder, tmp_path):
    code, out, err = cli("inspect", checkpoint, "--data", folder, "-j", 0, "--sites")
    assert code == 0
    assert "15 BatchNorm2d" in err
    assert (
        "scales and shifts of 2 of 15 norm layers reach the output past no other norm: layer4.0.bn2, " in out
    )
    assert "layer4.0.downsample.2" in out
    assert "for batches of 32 in training (assumed)" in out
    assert re.search(r"Ghost Batch Norm +yes", out)
    assert re.search(r"of 15 norm layers go beyond what was possible in training", out)
    assert re.search(r"layer1\.0\.bn1 +\d+\.\d +\d+\.\d +none", out)

    state = bnpatch.load(checkpoint).module.state_dict()
    torch.save({"state_dict": state, "args": {"batch_size": 6}}, tmp_path / "small.pt")
    code, out, _ = cli("inspect", "small.pt", "--img-size", 32)
    assert "for batches of 6 in training (from the checkpoint)" in out
    assert re.search(r"Ghost Batch Norm +with care", out)
    assert "go beyond" not in out
    code, out, _ = cli("inspect", checkpoint, "--train-batch-size", 2, "--json")
    content = json.loads(out)
    assert content["norms"] == {"BatchNorm2d": 15}
    assert content["unnormalized"] == ["layer4.0.bn2", "layer4.0.downsample.2"]
    assert len(content["single_value_sites"]) == 3
    assert (content["train_batch_size"], content["train_batch_size_source"]) == (2, "as asked")
    assert {t["name"]: t["fits"] for t in content["techniques"]}["Batch/Group Norm"] == "yes"
    assert content["output_ranges"] is None
    assert content["norms_by_function_calls"] == 0
    code, out, _ = cli("inspect", checkpoint, "--data", folder, "-j", 0, "--json")
    ranges = json.loads(out)["output_ranges"]
    assert len(ranges) == 15
    assert all(r["observed"] > 0 and r["inference_bound"] is None for r in ranges)


def test_images_that_are_only_looked_at_need_no_labels(cli, checkpoint, flat, plain):
    assert cli("inspect", checkpoint, "--data", flat, "-j", 0)[0] == 0
    assert plain[0].exists()  # exported with these images


def test_inspect_of_an_onnx_file_says_what_needs_torch(cli, plain):
    code, out, err = cli("inspect", plain[0], "--train-batch-size", 8, "--json")
    assert code == 0
    assert json.loads(out)["norms"] == {"BatchNormalization": 15}
    assert "techniques" not in json.loads(out)
    assert "need a torch model" in err


def test_no_gain_is_exit_code_0_and_plain(cli, checkpoint, clean):
    """No answers are better than all right: the labels are what the model says."""
    images = clean[0][:120]
    answers = bnpatch.load(checkpoint).predict(torch.from_numpy(images)[:, None]).argmax(1)
    np.savez("right.npz", x=images, y=answers)
    code, out, _ = cli("tune-alpha", checkpoint, "--data", "right.npz", *QUICK)
    assert code == 0
    assert "No significant gain" in out


def test_broken_images_are_counted_and_strict_stops(cli, checkpoint, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val")
    break_images(tmp_path / "val")
    code, _, err = cli("tune-alpha", checkpoint, "--data", "val", *QUICK)
    assert code == 0
    assert f"because they can't be read: {len(BROKEN)} (" in err
    code, _, err = cli("tune-alpha", checkpoint, "--data", "val", "--strict", *QUICK)
    assert code == 2
    assert "cannot read 0/" in one_line(err)


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
    "vit.pt": (write_net_without_norm, "norms can be patched; they are skipped: LayerNorm"),
    "nan.pt": (write_nan, "are not finite"),
    "pickled.pt": (lambda path: torch.save(torch.nn.BatchNorm2d(3), path), "add --unsafe-load if you trust"),
    "model.onnx": (lambda path: path.touch(), "model.onnx is empty"),
    "text.onnx": (lambda path: path.write_text("hello"), "is not an ONNX model"),
    "missing.onnx": (None, "missing.onnx does not exist"),
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
    code, out, err = cli("tune-alpha", name, "--data", folder)
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
    "missing": (None, "there is no missing"),
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
    code, out, err = cli("tune-alpha", checkpoint, "--data", name)
    assert code == 2
    assert message in one_line(err)
    assert out == ""
    assert not list(tmp_path.glob("bnpatch-out/*"))


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
        (["--augment", "fog"], "no augmentation 'fog'"),
        (["--keep-data", "nope"], "there is no nope"),
        (["--margin", "1"], "a margin of 1 is not a fraction"),
        (["--storage", "nope/x"], "storage"),
        (["--mean", "a,b"], "--mean 'a,b' is not a list of numbers"),
        (["--std", "0"], "is not positive"),
        (["--mean", ","], "is not a list of numbers"),
        (["--mean", ".1,.2"], "--mean has 2 values, the model 1 channels"),
        (["--interpolation", "magic"], "no interpolation 'magic'"),
        (["--data", "torch/cifar10"], "cannot open the data set torch/cifar10"),
        (["--device", "tpu9"], "no device 'tpu9'"),
        (["--class-map", "nope.txt"], "cannot read the class map nope.txt"),
        (["--use-ema"], "no averaged weights"),
        (["--test-data", "nope"], "there is no nope"),
        (["-o", "/dev/null/out"], "cannot write /dev/null/out"),
    ],
)
def test_bad_options(cli, checkpoint, folder, options, message):
    code, _, err = cli("tune-alpha", checkpoint, "--data", folder, *options)
    assert code == 2
    assert message in one_line(err)


@pytest.mark.parametrize("labelled", [True, False])
def test_images_to_keep(cli, checkpoint, folder, flat, tmp_path, labelled):
    keep = ["--keep-data", folder if labelled else flat, "--margin", "0.9"]
    code, out, err = cli("tune-alpha", checkpoint, "--data", folder, *keep, *QUICK, "--trials", 2)
    assert code == 0, err
    assert f"{60 if labelled else 10} to keep" in out
    assert "the margin is 90" in " ".join(out.split())
    assert ("answers kept" in out) != labelled
    about = Recipe.load(tmp_path / "bnpatch-out" / "recipe.json").provenance
    assert about["data"]["keep_name"] == str(keep[1])
    assert about["kept"]["margin"] == 0.9
    assert about["kept"]["verdict"] in out
    report = (tmp_path / "bnpatch-out" / "report.html").read_text()
    assert about["kept"]["verdict"] in report


def test_options_are_checked_before_the_model_is_loaded(cli):
    for options in (["--metric", "f1"], ["--augment", "fog"], ["--holdout", "1"]):
        code, _, err = cli("tune-alpha", "no-such.pt", "--data", "nowhere", *options)
        assert code == 2
        assert options[1] in one_line(err)
        assert "no-such.pt" not in err


def test_bad_usage_is_exit_code_2(cli, checkpoint):
    for args in (["tune-alpha"], ["tune-alpha", checkpoint], ["nope"], ["evaluate", checkpoint, "--data"]):
        assert cli(*args)[0] == 2


def test_a_full_disk_leaves_nothing_half_written(cli, checkpoint, folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = cli("tune-alpha", checkpoint, "--data", folder, *QUICK)
    assert code == 2
    assert "patched.pt: no space left on device" in one_line(err)
    assert {p.name for p in (tmp_path / "bnpatch-out").iterdir()} == {
        "recipe.partial.json",
        "trials.partial.csv",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a recipe"),
        ("other", "the recipe is for another model"),
        ("alpha", "alpha must lie in [0, 1]"),
        (None, "cannot read recipe.json"),
    ],
)
def test_bad_recipes(cli, checkpoint, folder, tmp_path, content, message):
    recipe = bnpatch.load(checkpoint).recipe()
    if content == "other":
        recipe = bnpatch.load(timm.create_model("test_resnet")).recipe()
    text = json.dumps(recipe.to_json())
    if content == "alpha":
        text = text.replace('"alpha": 0.0', '"alpha": 1.5')
    if content is not None:
        (tmp_path / "recipe.json").write_text("{" if content == "{" else text)
    code, _, err = cli("evaluate", checkpoint, "--data", folder, "--recipe", "recipe.json")
    assert code == 2
    assert message in one_line(err)


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
def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "bnpatch_cli", "--debug", "inspect", "nope.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_debug_may_stand_anywhere(cli, capsys):
    with pytest.raises(bnpatch.BnpatchError):
        cli("inspect", "nope.pt", "--debug")


@pytest.mark.slow
def test_onnx_from_the_checkpoint_to_the_patched_file(cli, checkpoint, folder, plain):
    """What someone does who has only an .onnx file."""
    shutil.copy(plain[0], "model.onnx")
    code, out, _ = cli("inspect", "model.onnx")
    assert code == 0
    assert "12 norm layers to weigh examples at" in out
    content = json.loads(cli("inspect", "model.onnx", "--json")[1])
    assert content["opset"] == 20
    assert content["bytes"] > 100_000
    code, out, _ = cli("tune-alpha", "model.onnx", "--data", folder, *QUICK)
    assert code == 0
    assert "gain" in out
    recipe = ("--recipe", "bnpatch-out/recipe.json")
    code, out, _ = cli("export", "model.onnx", *recipe, "-o", "again.onnx", "--data", folder)
    assert code == 0
    assert re.search(r"deviates from the model by at most \d\.\de-\d\d", out)
    tuned = cross_entropy(cli, "bnpatch-out/patched.onnx", "--data", folder)
    assert cross_entropy(cli, "again.onnx", "--data", folder) == pytest.approx(tuned, rel=1e-4)
    # The recipe of the file is one of the checkpoint, too.
    assert cross_entropy(cli, checkpoint, "--data", folder, *recipe) == pytest.approx(tuned, rel=1e-3)


def test_a_failed_comparison_is_exit_code_1_and_leaves_no_file(cli, plain, tmp_path, monkeypatch):
    from bnpatch.models import export

    monkeypatch.setattr(export, "TOLERANCE", dict.fromkeys(export.TOLERANCE, -1.0))
    code, _, err = cli("export", plain[0], "-o", "model.onnx")
    assert code == 1
    assert "more than rounding" in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_recipe_brings_its_preprocessing(cli, checkpoint, folder, tuned):
    recipe = ("--recipe", tuned / "recipe.json")
    code, compared, err = cli("evaluate", checkpoint, "--data", folder, *recipe, "--json")
    assert code == 0
    assert "48 x 48" in err
    assert "from the recipe" in err
    assert "tuned on a part of these examples" in err
    assert "32 x 32" in cli("evaluate", checkpoint, "--data", folder, *recipe, "--img-size", 32)[2]
    code, out, _ = cli("export", checkpoint, *recipe, "-o", "patched.onnx", "--data", folder)
    assert code == 0
    assert re.search(r"deviates from the model by at most \d\.\de-\d\d", out)
    _, exported, err = cli("evaluate", "patched.onnx", "--data", folder, "--json")
    assert "48 x 48" in err
    after = json.loads(compared)["comparisons"]["cross-entropy"]["after"]["value"]
    assert json.loads(exported)["scores"]["cross-entropy"]["value"] == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("weight", ["alpha", "lambda"])
def test_a_recipe_is_not_applied_twice(cli, checkpoint, folder, weight):
    model = bnpatch.load(checkpoint)
    if weight == "alpha":
        model.set_alphas(0.1)
    else:
        model.set_target(
            {name: Moments(f.source.mean + 1, f.source.var) for name, f in model.facts().items()}
        )
        model.set_weights(PatchWeights(lambdas=dict.fromkeys(model.alphas(), 0.5)))
    model.recipe().save("recipe.json")
    model.save("patched.pt", model.recipe())
    assert cli("evaluate", checkpoint, "--data", folder, "--recipe", "recipe.json")[0] == 0
    for command in (["evaluate", "patched.pt", "--data", folder], ["bench", "patched.pt", "--seconds", 0]):
        code, out, err = cli(*command, "--recipe", "recipe.json")
        assert code == 2
        assert "patched already" in one_line(err)
        assert out == ""


def test_what_an_export_must_not_do(cli, checkpoint, plain):
    model, said = plain
    before = model.read_bytes()
    for args, message in {
        (model, "-o", model): "is the model itself",
        (checkpoint, "-o", "model.pt"): "does not end in .onnx",
        (checkpoint, "-o", "no/such/folder.txt"): "does not end in .onnx",
    }.items():
        code, _, err = cli("export", *args)
        assert code == 2
        assert message in one_line(err)
    assert model.read_bytes() == before
    assert "nothing is patched" in said


def test_class_names_are_learned_from_the_folders(cli, folder, tmp_path):
    """A class folder with another name later on is warned of before anything is scored."""
    state = timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    assert cli("tune-alpha", "bare.pt", "--data", folder, "--img-size", 32, *QUICK)[0] == 0
    assert bnpatch.load("bnpatch-out/patched.pt").class_names == tuple("0123456789")
    shutil.copytree(folder, tmp_path / "val")
    (tmp_path / "val" / "3").rename(tmp_path / "val" / "three")
    _, _, err = cli("evaluate", "bnpatch-out/patched.pt", "--data", "val")
    assert "the class folder 'three' is not among the model's class names" in err


def test_bench_compares_the_model_with_its_patch(cli, checkpoint, folder, tmp_path):
    code, out, err = cli("bench", checkpoint, "--seconds", 0)
    assert code == 0
    assert "15 of 15 norm layers: alpha = 0.01, for want of a recipe" in err
    assert re.search(r"as it is +\d+\.\d\d ms +\d+\.\d +1\.00x *\n", out)
    assert re.search(r"patched +\d+\.\d\d ms +\d+\.\d +\d+\.\d\dx +\[\d+\.\d\dx, \d+\.\d\dx\]", out)

    model = bnpatch.load(checkpoint)
    model.set_alphas({"bn1": 0.2})
    model.recipe().save(tmp_path / "recipe.json")
    model.save(tmp_path / "patched.pt", model.recipe())
    recipe = ("--recipe", "recipe.json")
    code, out, err = cli("bench", checkpoint, *recipe, "--seconds", 0, "-b", 4, "--threads", 1, "--json")
    content = json.loads(out)
    assert code == 0
    assert "1 of 15 norm layers: the recipe" in err
    assert content["patched_sites"] == 1
    assert content["threads"] == 1
    assert content["original"]["ratio"] == 1
    assert content["patched"]["batch_size"] == 4
    assert content["patched"]["low"] <= content["patched"]["ratio"] <= content["patched"]["high"]

    assert "1 of 15 norm layers: the model's own weights" in cli("bench", "patched.pt", "--seconds", 0)[2]
    assert (
        "15 of 15 norm layers: alpha = 0.5" in cli("bench", "patched.pt", "--alpha", 0.5, "--seconds", 0)[2]
    )


WITHOUT_NORMS = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[N, 1, 4, 4] x) => (float[N, 16] y) { y = Flatten (x) }
"""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model.pt", "--recipe", "nope.json"], "cannot read nope.json"),
        (["model.pt", "--recipe", "recipe.json", "--alpha", "0.1"], "leave one out"),
        (["model.pt", "--recipe", "other.json"], "the recipe is for another model"),
        (["without.onnx"], "has no norm that could be patched"),
        (["missing.pt"], "cannot read missing.pt"),
    ],
)
def test_bad_benches(cli, checkpoint, args, message):
    shutil.copy(checkpoint, "model.pt")
    onnx.save(onnx.parser.parse_model(WITHOUT_NORMS), "without.onnx")
    model = bnpatch.load(checkpoint)
    model.set_alphas(0.1)
    model.recipe().save("recipe.json")
    model.save("patched.pt", model.recipe())
    bnpatch.load(timm.create_model("test_resnet")).recipe().save("other.json")
    code, out, err = cli("bench", *args, "--seconds", 0)
    assert code == 2
    assert message in one_line(err)
    assert out == ""


def test_an_image_size_may_be_a_rectangle(cli, checkpoint, folder):
    shown = cli("evaluate", checkpoint, "--data", folder, "--img-size", "24,40", "-j", 0)[2]
    assert "40 x 24 out of" in shown
    for wrong in ("24,", "0", "24,32,40", "big"):
        assert "write one side" in one_line(cli("inspect", checkpoint, "--img-size", wrong)[2])


def test_groups_by_folder_expression_and_table(cli, checkpoint, folder, tmp_path):
    """120 images in 40 scenes of three, which may be of several classes."""
    names = []
    for number, path in enumerate(sorted(folder.glob("*/*.png"))):
        name = f"{path.parent.name}/scene{number % 40}/{path.stem}.png"
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "val" / name)
        names.append(name)
    Path("groups.csv").write_text("".join(f"{name},{name.split('/')[1]}\n" for name in names))
    found = []
    for rule in ("parent", "groups.csv"):
        code, out, err = cli("evaluate", checkpoint, "--data", "val", "--group-by", rule, "--json", "-j", 0)
        assert code == 0
        assert "examples       120 in 40 groups" in err
        assert json.loads(out)["groups"] == 40
        found.append(json.loads(out)["scores"])
    assert found[0] == found[1]
    alone = json.loads(cli("evaluate", checkpoint, "--data", "val", "--json", "-j", 0)[1])
    assert "groups" not in alone
    assert alone["scores"]["accuracy"] != found[0]["accuracy"]

    code, out, err = cli("tune-alpha", checkpoint, "--data", "val", "--group-by", r"(scene\d+)/", *QUICK)
    assert code == 0
    assert "60 in 20 groups to tune on, 60 in 20 groups judged by" in err
    assert "60 examples in 20 groups" in (tmp_path / "bnpatch-out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("scene", "has no parentheses"),
        ("(scene", "is no regular expression"),
        ("(scene)", "finds nothing in "),
        ("none.csv", "cannot read none.csv"),
        ("parent", "the groups have one example each"),
    ],
)
def test_bad_groups(cli, checkpoint, folder, rule, message):
    for command in ("tune-alpha", "evaluate"):
        code, _, err = cli(command, checkpoint, "--data", folder, "--group-by", rule)
        assert code == 2
        assert message in one_line(err)


def test_near_copies_without_groups_give_a_warning(cli, checkpoint, folder):
    for path in sorted(folder.glob("*/*.png"))[:40]:
        for copy in range(3):
            place = Path("val") / path.parent.name / f"{path.stem}-{copy}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    err = cli("evaluate", checkpoint, "--data", "val", "-j", 0)[2]
    assert "near-copies of each other: they make about 40 groups" in err.replace("\n", " ")
    assert "near-copies" not in cli("evaluate", checkpoint, "--data", folder, "-j", 0)[2]


@pytest.mark.parametrize("class_map", [False, True])
def test_the_order_that_was_assumed_is_said(cli, checkpoint, folder, class_map):
    """Numbers of classes in another order mean nothing; where something names them, nothing is assumed."""
    content = torch.load(checkpoint)
    content.pop("class_names")
    torch.save(content, "unnamed.pt")
    Path("classes.txt").write_text("".join(f"{number}\n" for number in range(10)))
    more = ["--class-map", "classes.txt"] if class_map else []
    code, _, err = cli("evaluate", "unnamed.pt", "--data", folder, *more)
    assert code == 0
    assert ("folders are taken in order: 0 = 0, 1 = 1, 2 = 2, ... (else --class-map)" in err) is not class_map
