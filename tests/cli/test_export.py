"""``bnpatch export``, and the way of an ONNX file through the commands."""

import json
import re
import shutil

import onnx
import pytest

import bnpatch
from tests.command_line import QUICK, one_line
from tests.models.onnx_graph import graph


def cross_entropy(cli, *args):
    """Of the model, or of the model with a recipe."""
    code, out, _ = cli("evaluate", *args, "--json")
    assert code == 0
    content = json.loads(out)
    if "--recipe" in args:
        return content["comparisons"]["cross-entropy"]["after"]["value"]
    return content["scores"]["cross-entropy"]["value"]


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


@pytest.mark.slow
def test_one_input_for_alphas_that_differ_is_refused_and_one_for_each_is_not(cli, exported):
    model = bnpatch.load(exported)
    model.set_alphas({name: 0.1 + 0.01 * number for number, name in enumerate(model.alphas())})
    model.recipe().save("recipe.json")
    command = ("export", exported, "--recipe", "recipe.json", "-o", "adjustable.onnx", "--alpha-input")
    code, _, err = cli(*command, "global")
    assert code == 2
    assert "the alphas differ; leave one adjustable for each: --alpha-input per-site" in one_line(err)
    assert cli(*command, "per-site")[0] == 0


def test_a_recipe_found_with_floats_is_exported_at_their_size(cli, tmp_path):
    """They are not resized, so the recipe has no preprocessing, but their shape."""
    onnx.save(graph(["n", 3, "h", "w"], last="flat"), tmp_path / "model.onnx")
    recipe = bnpatch.load(tmp_path / "model.onnx").recipe(
        provenance={"preprocessing": None, "data": {"input_shape": [3, 4, 6]}}
    )
    recipe.save(tmp_path / "recipe.json")
    args = ("export", "model.onnx", "--recipe", "recipe.json", "-o", "patched.onnx", "--json")
    content = json.loads(cli(*args)[1])
    assert content["sizes"] == [[3, 4, 6], [3, 36, 38]]
    assert json.loads(cli(*args, "--img-size", 8)[1])["sizes"][0] == [3, 8, 8]


@pytest.mark.parametrize(
    "provenance",
    [
        {"data": "text"},
        {"data": {"input_shape": 5}},
        {"data": {"input_shape": [3, "a", 2]}},
        {"data": {"input_shape": [3, 10**9, 2]}},
        {"preprocessing": {"a": 1}},
        {"preprocessing": [1]},
    ],
)
def test_a_recipe_of_a_damaged_shape_or_preprocessing_is_said(cli, provenance, tmp_path):
    onnx.save(graph(["n", 3, "h", "w"], last="flat"), tmp_path / "model.onnx")
    bnpatch.load(tmp_path / "model.onnx").recipe(provenance=provenance).save(tmp_path / "recipe.json")
    code, _, err = cli("export", "model.onnx", "--recipe", "recipe.json", "-o", "patched.onnx")
    assert code == 2
    assert "the recipe is damaged or not one of bnpatch (" in one_line(err)
    assert "make it again with bnpatch tune-alpha" in one_line(err)
