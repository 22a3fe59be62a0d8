"""The command, with a corruption that stands for all: it inverts the image."""

import csv
import json

import pytest

import bnpatch


@pytest.fixture(autouse=True)
def inverted(monkeypatch):
    monkeypatch.setattr("bnpatch.data.corruptions.corrupt", lambda image, *_: 255 - image)
    for module in ("data.corruptions", "evaluation.robustness", "data.standard_corruptions"):
        monkeypatch.setattr(f"bnpatch.{module}.check_installed", lambda: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")


def test_robustness(cli, checkpoint, folder, tmp_path):
    model = bnpatch.load(checkpoint)
    model.set_alphas(0.2)
    model.recipe().save(tmp_path / "recipe.json")
    ask = [
        "robustness",
        checkpoint,
        "--data",
        folder,
        "-o",
        "out",
        "--kinds",
        "fog,snow",
        "--severities",
        "1,5",
    ]
    code, out, err = cli(*ask, "--recipe", "recipe.json")
    assert code == 0, err
    assert "corruption error" in out
    assert "note: The severities are made for images of 224 pixels; on images of 32 x 32" in out
    lines = list(csv.DictReader((tmp_path / "out" / "robustness.csv").open()))
    assert [(line["kind"], line["severity"]) for line in lines] == [
        ("clean", "0"),
        *((kind, severity) for severity in "15" for kind in ("fog", "snow")),
    ]
    assert "bnpatch robustness" in (tmp_path / "out" / "robustness.html").read_text()
    code, out, _ = cli(*ask, "--recipe", "recipe.json", "--json")
    content = json.loads(out)
    assert content["kinds"]["fog"]["before"]["value"] == pytest.approx(float(lines[1]["error"]))
    assert content["clean"]["change"]["value"] == pytest.approx(float(lines[0]["change"]))
    code, _, err = cli(*ask)
    assert code == 2
    assert "keeps the scores of another run: the recipe changed" in err


def test_an_unpatched_model_is_scored_alone(cli, checkpoint, folder):
    code, out, _ = cli(
        "robustness",
        checkpoint,
        "--data",
        folder,
        "--kinds",
        "fog",
        "--severities",
        3,
        "--limit",
        20,
        "-o",
        "o",
    )
    assert code == 0
    assert "The model is not patched, so there is nothing to compare the model with" in out


def test_mistakes_show_before_the_model_is_loaded(cli, folder):
    assert "no corruption 'rain'" in cli("robustness", "none.pt", "--data", folder, "--kinds", "rain")[2]
    for text in ("6", "", "1,x"):
        code, _, err = cli("robustness", "none.pt", "--data", folder, "--severities", text)
        assert code == 2
        assert "is not a list of severities; write 1,3,5" in err
