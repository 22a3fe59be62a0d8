"""``bnpatch tune-alpha``: what it prints, what it writes, and how it ends."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import bnpatch
from bnpatch.core.recipe import Recipe
from bnpatch.data.dataset import split
from tests.command_line import QUICK, one_line
from tests.data.test_examples import BROKEN, break_images


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


@pytest.mark.slow
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


def test_no_gain_is_exit_code_0_and_plain(cli, checkpoint, clean):
    """No answers are better than all right: the labels are what the model says."""
    images = clean[0][:120]
    answers = bnpatch.load(checkpoint).predict(torch.from_numpy(images)[:, None]).argmax(1)
    np.savez("right.npz", x=images, y=answers)
    code, out, _ = cli("tune-alpha", checkpoint, "--data", "right.npz", *QUICK)
    assert code == 0
    assert "No significant gain" in out
    assert set(Recipe.load("bnpatch-out/recipe.json").alphas.values()) == {0.0}


@pytest.mark.slow
def test_what_held_out_images_do_not_support_is_not_in_the_patched_model(cli, checkpoint, foggy):
    """A gain in tuning; of the other images, the answers of the unpatched model are said to be right."""
    images, labels = foggy
    answers = bnpatch.load(checkpoint).predict(torch.from_numpy(images[300:])[:, None]).argmax(1)
    np.savez("tuning.npz", x=images[:300], y=labels[:300])
    np.savez("held_out.npz", x=images[300:], y=answers)
    data = ["--data", "tuning.npz", "--test-data", "held_out.npz"]
    code, out, _ = cli("tune-alpha", checkpoint, *data, *QUICK, "--fail-unless-gain")
    assert code == 1
    assert "alpha: best in tuning, but a loss in accuracy on held-out examples" in " ".join(out.split())
    assert set(Recipe.load("bnpatch-out/recipe.json").alphas.values()) == {0.0}
    assert set(bnpatch.load("bnpatch-out/patched.pt").alphas().values()) == {0.0}
    assert all(alpha > 0 for alpha in Recipe.load("bnpatch-out/candidate-recipe.json").alphas.values())


@pytest.mark.slow
def test_broken_images_are_counted_and_strict_stops(cli, checkpoint, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val")
    break_images(tmp_path / "val")
    code, _, err = cli("tune-alpha", checkpoint, "--data", "val", *QUICK)
    assert code == 0
    assert f"because they can't be read: {len(BROKEN)} (" in err
    code, _, err = cli("tune-alpha", checkpoint, "--data", "val", "--strict", *QUICK)
    assert code == 2
    assert "cannot read 0/" in one_line(err)


@pytest.mark.parametrize("labelled", [True, pytest.param(False, marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_trials_are_logged_to_a_tracker(cli, checkpoint, folder):
    code, _, err = cli(
        "tune-alpha", checkpoint, "--data", folder, *QUICK, "--trials", 4, "--log", "tensorboard"
    )
    assert code == 0, err
    with Path("bnpatch-out", "trials.csv").open() as file:
        trials = [row for row in csv.DictReader(file) if row["candidate"] == "alpha"]
    assert len(list(Path("bnpatch-out", "tensorboard", "bnpatch").iterdir())) == len(trials)
    code, _, err = cli("tune-alpha", checkpoint, "--data", folder, "--log", "paper")
    assert code == 2
    assert one_line(err) == "there is no tracker 'paper'; choose tensorboard, mlflow, wandb"
