"""The files that a search writes."""

import csv
from dataclasses import replace

import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.recipe import Recipe
from bnpatch.report.files import write_results, write_trials
from tests.closed_form import some
from tests.report.html_page import Page

# A classifier may do no better than guessing in fog.
pytestmark = pytest.mark.filterwarnings("ignore:the model is right on:bnpatch.core.errors.BnpatchWarning")


def _inputs(images):
    return images.float() / 127.5 - 1


def test_files(tuned, model, foggy, tmp_path):
    files = write_results(tuned, model, tmp_path / "new" / "out")
    assert [file.name for file in files] == [
        "recipe.json",
        "patched.pt",
        "alpha-curve.png",
        "trials.csv",
        "report.html",
    ]
    assert {file.name for file in (tmp_path / "new" / "out").iterdir()} == {file.name for file in files}
    assert Recipe.load(files[0]).state.weights == tuned.weights
    x = torch.from_numpy(foggy[0][:8])[:, None]
    torch.testing.assert_close(
        bnpatch.load(files[1]).module.eval()(_inputs(x)), model.module.eval()(_inputs(x))
    )
    assert Image.open(files[2]).width == 960


def test_what_is_not_recommended_is_in_a_file_of_its_own(tuned, model, tmp_path):
    """The recipe and the patched model are those of the model as it came."""
    refused = replace(tuned, recipe=model.recipe(), is_recommended=False, candidate_recipe=tuned.recipe)
    recipe, candidate, patched, *_ = write_results(refused, model, tmp_path)
    assert (recipe.name, candidate.name, patched.suffix) == ("recipe.json", "candidate-recipe.json", ".pt")
    as_it_came = Recipe.load(recipe).state.weights
    assert as_it_came == tuned.candidates[0].weights != tuned.weights
    assert Recipe.load(candidate).state.weights == tuned.weights
    assert bnpatch.load(patched).weights == as_it_came
    assert model.weights == as_it_came
    write_results(tuned, model, tmp_path)
    assert not candidate.exists()  # it was an earlier search's


def test_trials(tuned, tmp_path):
    write_trials(tuned.trials, tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert list(rows[0])[:6] == ["candidate", "trial", "weight", "scale", "threshold", "examples"]
    assert {row["candidate"] for row in rows} == {"alpha", "lambda", "lambda, alpha"}
    for row, trial in zip(rows, tuned.trials, strict=True):
        assert (row["candidate"], int(row["trial"]), int(row["examples"])) == (
            trial.candidate,
            trial.number,
            trial.examples,
        )
        params = {name: float(row[name]) for name in ("weight", "scale", "threshold") if row[name]}
        assert params == pytest.approx(dict(trial.params), rel=1e-7)
        for name, value in trial.scores.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-7)
            assert float(row[f"{name} error"]) == pytest.approx(trial.errors[name], rel=1e-7)
    write_trials([], tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text() == "candidate,trial,weight,scale,threshold,examples\n"


def test_a_report_is_small_and_follows_from_the_result(tuned, model, tmp_path):
    write_results(tuned, model, tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write_results(tuned, model, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert len(first) < 150_000


def test_snippets_name_the_files(tuned, model, tmp_path):
    out = tmp_path / "my results"
    write_results(tuned, model, out)
    text = Page((out / "report.html").read_text()).text
    assert f"bnpatch evaluate '{out}/patched.pt' --data DATA" in text
    assert f"bnpatch export '{out}/patched.pt' -o '{out}/patched.onnx'" in text
    assert f'model = bnpatch.apply(model, "{out}/recipe.json")' in text


def test_a_search_without_trials_has_no_curve(model, foggy, tmp_path):
    result = bnpatch.tune_alpha(model, some(foggy, 200), timeout=0)
    assert not result.trials
    files = write_results(result, model, tmp_path)
    assert "alpha-curve.png" not in {file.name for file in files}
    page = Page((tmp_path / "report.html").read_text())
    assert "the search ended before anything else was tried" in page.text
    assert "One weight for all norm layers" not in page.headings


@pytest.mark.slow
def test_an_onnx_model(exported, foggy, tmp_path):
    model = bnpatch.load(exported, preprocessing={"mean": (0.5,), "std": (0.5,)})
    result = bnpatch.tune_alpha(
        model, some(foggy, 300), metric="cross-entropy", granularity="global", trials=4
    )
    assert result.is_recommended
    files = write_results(result, model, tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert files[1].name == "patched.onnx"
    assert f'onnxruntime.InferenceSession("{tmp_path}/patched.onnx")' in text
    assert f"bnpatch export model.onnx --recipe {tmp_path}/recipe.json -o {tmp_path}/patched.onnx" in text
