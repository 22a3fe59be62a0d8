"""``bnpatch bench``."""

import json
import re
import shutil

import onnx
import onnx.parser
import pytest
import timm

import bnpatch
from tests.command_line import one_line


@pytest.mark.slow
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
