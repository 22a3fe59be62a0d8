"""``bnpatch evaluate``: scores, comparisons with a recipe, and what it says of the data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from tests.command_line import QUICK, one_line


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a recipe"),
        ("other", "the recipe is for another model"),
        ("alpha", "it must lie in [0, 1]"),
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


@pytest.mark.parametrize("weight", ["alpha", pytest.param("lambda", marks=pytest.mark.slow)])
def test_a_recipe_is_not_applied_twice(cli, checkpoint, folder, weight):
    model = bnpatch.load(checkpoint)
    if weight == "alpha":
        model.set_alphas(0.1)
    else:
        model.set_state(
            model.state.with_re_estimated(
                {name: Moments(f.source.mean + 1, f.source.var) for name, f in model.facts().items()}
            )
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


def test_an_image_size_may_be_a_rectangle(cli, checkpoint, folder):
    shown = cli("evaluate", checkpoint, "--data", folder, "--img-size", "24,40", "-j", 0)[2]
    assert "40 x 24 out of" in shown
    for wrong in ("24,", "0", "24,32,40", "big"):
        assert "write one side" in one_line(cli("inspect", checkpoint, "--img-size", wrong)[2])


def test_near_copies_without_groups_give_a_warning(cli, checkpoint, folder):
    for path in sorted(folder.glob("*/*.png"))[:40]:
        for copy in range(3):
            place = Path("val") / path.parent.name / f"{path.stem}-{copy}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    err = cli("evaluate", checkpoint, "--data", "val", "-j", 0)[2]
    assert "near-copies of each other: they make about 40 groups" in err.replace("\n", " ")
    assert "near-copies" not in cli("evaluate", checkpoint, "--data", folder, "-j", 0)[2]
    _, out, err = cli("tune-alpha", checkpoint, "--data", "val", *QUICK)
    assert (out + err).replace("\n", " ").count("near-copies of each other") == 1  # and not again as a note


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
