"""What the report says, of every kind of result."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.models.latency import Latency
from bnpatch.report.curves import global_search_curves
from bnpatch.report.files import write_results
from bnpatch.search.latency_limit import Point
from bnpatch.search.thumbnails import MOST, MOST_CLASSES, MOST_OF_CLASS, SIDE
from tests.closed_form import some
from tests.report.html_page import Page

# A classifier may do no better than guessing in fog.
pytestmark = pytest.mark.filterwarnings("ignore:the model is right on:bnpatch.core.errors.BnpatchWarning")


@pytest.fixture
def written(model, tmp_path):
    """Writes a result, and reads the report."""

    def write(result, of=None):
        files = write_results(result, of or model, tmp_path / "out")
        assert all(file.is_file() for file in files)
        return Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    return write


def margin(outputs, targets):
    return outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)


def test_a_gain(tuned, written):
    page = written(replace(tuned, notes=["one thing"], skipped={"a.png": "truncated"}))
    assert "one thing" in page.text
    assert "Left out, because they can't be read: a.png (truncated)." in page.text
    accuracy = tuned.comparisons[0]
    assert tuned.verdict == "gain"
    before, after = (f"{100 * e.value:.2f}%" for e in (accuracy.before, accuracy.after))
    assert f"accuracy rises from {before} to {after} on 150 examples that the search did not see" in page.text
    assert page.row("accuracy")[1].startswith(before)
    assert page.row("accuracy")[3].endswith("▲ gain")
    assert page.row("calibration error")[2].startswith(f"{100 * tuned.held_out.calibration.after.value:.2f}%")
    assert f"wrong, now right {tuned.held_out.flips.gained}" in page.text
    assert f"right, now wrong {tuned.held_out.flips.lost}" in page.text
    assert page.headings[1:6] == [
        "Before and after",
        "Notes",
        "Some held-out examples",
        "What the model is given",
        "Wrong before, right now",
    ]
    rest = [heading for heading in page.headings[6:] if heading != "Right before, wrong now"]
    assert rest[:5] == [
        "Farthest from the images of training",
        "Candidates",
        "One weight for all norm layers",
        "The weights by depth",
        "Classes",
    ]
    assert rest[5 + len(tuned.samples.by_class)] == "Skipped"


def test_all_candidates_are_listed_without_intervals_and_one_is_marked(tuned, written):
    page = written(tuned)
    (table,) = (table for table in page.tables if table[0][0] == "candidate")
    assert len(table) == 1 + len(tuned.candidates) == 5
    marked = [row[0] for row in table if row[0].startswith("✓")]
    assert marked == [f"✓ {tuned.chosen.name} chosen"]
    for row, candidate in zip(table[1:], tuned.candidates, strict=True):
        assert row[1] == f"{100 * candidate.mean:.2f}%"
    assert table[1] == ["baseline", f"{100 * tuned.candidates[0].mean:.2f}%", "reference"]
    assert table[2][2] == f"{100 * tuned.candidates[1].change.value:+.2f}"  # and no interval
    assert "the held-out evaluation is the number to believe" in page.text


def test_weights_and_where_they_come_from(tuned, written):
    page = written(tuned)
    rows = {row[0]: row for table in page.tables if table[0][0] == "norm layer" for row in table[1:]}
    assert list(rows) == tuned.norm_layers
    for name, alpha in tuned.weights.alphas.items():
        assert float(rows[name][1]) == pytest.approx(alpha, rel=1e-3)
        assert float(rows[name][2]) == pytest.approx(tuned.weights.lambdas[name], abs=5e-3)
        assert rows[name][3].split("x")[0] in ("16", "8", "4", "2", "1")
    about = tuned.recipe.provenance
    assert page.row("data fingerprint")[1] == about["data"]["fingerprint"]
    assert f"torch {torch.__version__}".split("+")[0] in page.row("versions")[1]
    assert page.row("seed")[1] == "0"


def test_pictures_are_of_what_the_patch_changes(tuned, foggy, written):
    page = written(tuned)
    gained = tuned.samples.gained
    assert len(gained) == 8
    sources = [value for _, name, value in page.attributes if name == "src"]
    shown = sources[len(tuned.samples.inputs) :][:8]
    for sample, source in zip(gained, shown, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        original = next(index for index, image in enumerate(foggy[0]) if (np.asarray(picture) == image).all())
        assert sample.target == sample.answers[1] == foggy[1][original] != sample.answers[0]
        before, after = (
            f"{answer} ({100 * sure:.0f}%)"
            for answer, sure in zip(sample.answers, sample.confidences, strict=True)
        )
        assert f"{sample.target} as it is: {before} patched: {after}" in page.text


@pytest.mark.slow
def test_pictures_of_classes_and_of_far_examples_wait_to_be_opened(tuned, written):
    page = written(tuned)
    samples = tuned.samples
    assert len(samples.farthest) == 8
    assert f"Of {samples.num_measured} held-out examples, these lie farthest" in page.text
    for sample in samples.farthest:
        assert f"patched: {sample.answers[1]} ({100 * sample.confidences[1]:.0f}%) distance" in page.text
        assert f"distance {sample.distance:.2g}" in page.text
    headings = page.headings[page.headings.index("Classes") + 1 : page.headings.index("Skipped")]
    assert headings == [str(target) for target in samples.by_class]
    assert headings
    assert ("details", "open", None) not in page.attributes


@pytest.mark.slow
def test_a_page_of_large_pictures_stays_below_3_mb(tuned, written):
    rng = np.random.default_rng(0)

    def noise(sample):  # the worst that a JPEG can be given
        return replace(sample, pixels=rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))

    samples = tuned.samples
    most = [noise(samples.inputs[0]) for _ in range(MOST)]
    by_class = {target: [noise(samples.gained[0])] * MOST_OF_CLASS for target in range(MOST_CLASSES)}
    full = replace(samples, inputs=most, gained=most, lost=most, farthest=most, by_class=by_class)
    page = written(replace(tuned, samples=full))
    sources = [value for _, name, value in page.attributes if name == "src"]
    assert len(sources) == 4 * MOST + MOST_CLASSES * MOST_OF_CLASS
    assert sum(map(len, sources)) < 1_500_000


def test_classes_add_up(tuned, written):
    page = written(tuned)
    (recalls,) = (table[1:] for table in page.tables if table[0][0] == "class")
    (mistakes,) = (table[1:] for table in page.tables if table[0][0] == "mistake")
    assert [row[0] for row in recalls] == [str(digit) for digit in range(10)]
    assert sum(int(row[1]) for row in recalls) == tuned.num_held_out
    right = sum(int(row[1]) * float(row[3].rstrip("%")) / 100 for row in recalls)
    assert right == pytest.approx(tuned.num_held_out * tuned.comparisons[0].after.value, abs=0.5)
    assert 0 < len(mistakes) <= 15
    assert all(int(row[2]) - int(row[1]) == int(row[3]) for row in mistakes)


@pytest.mark.slow
def test_a_thousand_classes_are_fifteen_rows(tuned, written):
    rng = np.random.default_rng(0)
    classes = np.stack([np.arange(3000) % 1000, *rng.integers(0, 1000, (2, 3000))])
    held_out = replace(tuned.held_out, classes=classes, changed=2990)
    page = written(replace(tuned, held_out=held_out))
    assert [len(table) - 1 for table in page.tables if table[0][0] in ("class", "mistake")] == [15, 15]
    assert "985 others are left out" in page.text


def test_what_comes_from_outside_is_escaped(tuned, model, written):
    evil = "<script>alert('&')</script>"
    model.name = evil
    model.class_names = (evil, *map(str, range(1, 10)))
    result = replace(
        tuned,
        notes=[evil],
        skipped={evil: "a&b"},
        recipe=Recipe(
            tuned.recipe.norm_layers, {**tuned.recipe.provenance, "command": f"tune-alpha {evil} -o out"}
        ),
    )
    page = written(result)
    assert "script" not in page.tags
    assert page.headings[0] == evil
    assert page.row(evil)
    assert f"bnpatch tune-alpha {evil} -o out" in page.text
    assert f"{evil} (a&b)" in page.text


def test_nothing_is_fetched(tuned, written):
    page = written(tuned)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert {value.partition(",")[0] for _, name, value in page.attributes if name == "src"} == {
        "data:image/png;base64"
    }
    assert "srcset" not in {name for _, name, _ in page.attributes}
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert not [
        value for _, _, value in page.attributes if "http" in value or "url(" in value.replace("url(#", "")
    ]
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    ) in page.attributes


def test_a_model_of_ones_own_is_loaded_by_those_who_ask_for_it(tuned, model, written):
    model.arch = None
    assert "--data DATA --unsafe-load" in written(tuned).text


def test_a_loss_is_not_kept(tuned, written):
    comparisons = [
        replace(
            c,
            before=c.after,
            after=c.before,
            change=replace(c.change, value=-c.change.value, low=-1, high=-0.1),
        )
        for c in tuned.comparisons
    ]
    weights = tuned.candidates[0].weights
    result = replace(
        tuned,
        held_out=replace(tuned.held_out, comparisons=comparisons),
        weights=weights,
        recipe=Recipe(
            tuple(replace(s, alpha=0.0, lambda_=0.0, re_estimated=None) for s in tuned.recipe.norm_layers)
        ),
    )
    page = written(result)
    assert (
        f"Keep the model as it is: {tuned.chosen.name} did best in tuning, but makes its accuracy worse"
        in page.text
    )
    assert "patched (not kept)" in page.text
    assert f"✓ {tuned.chosen.name} chosen, but not kept" in page.text
    assert page.row("accuracy")[3].endswith("▼ loss")
    assert "There is nothing to apply" in page.text


def test_no_significant_change_is_said_plainly(tuned, written):
    first, *others = tuned.comparisons
    first = replace(first, change=replace(first.change, value=0.01, low=-0.02, high=0.04))
    result = replace(
        tuned, held_out=replace(tuned.held_out, comparisons=[first, *others]), is_recommended=False
    )
    assert (
        "No significant gain in accuracy (+1.00 points, -2.00 to +4.00) on 150 examples"
        in written(result).text
    )


def test_the_identity(model, clean, written):
    def equal(outputs, targets):
        return torch.ones(len(targets))

    result = bnpatch.tune_alpha(model, some(clean, 300), metric=equal, granularity="global", trials=3)
    page = written(result)
    assert "No significant gain: nothing that was tried does better beyond doubt." in page.text
    assert page.row("equal") == ["equal", "1.0000 0.9750 to 1.0000"]
    assert f"All {len(result.norm_layers)} norm layers stay as they were." in page.text
    assert "There is nothing to apply" in page.text


def test_a_metric_of_ones_own_knows_no_classes(model, foggy, written):
    images, labels = some(foggy, 200)
    floats = images[:, None].astype(np.float32) / 127.5 - 1
    result = bnpatch.tune_alpha(model.module, (floats, labels), metric=margin, granularity="global", trials=4)
    page = written(result, of=bnpatch.load(model.module))
    assert "margin" in page.text
    assert not {"Classes", "accuracy"} & {*page.headings, *(row[0] for table in page.tables for row in table)}
    assert page.row("preprocessing")[1] == "none: inputs were given as they are"
    assert [curve.metric.name for curve in global_search_curves(result)] == ["margin"]


def test_without_labels(model, foggy, written):
    result = bnpatch.tune_alpha(model, foggy[0][:200], metric="unlabeled", granularity="global", trials=3)
    page = written(result)
    assert result.held_out.classes is None
    assert "unlabeled needs no labels, and can't see everything" in page.text
    assert page.row("unlabeled objective (lower is better)")
    assert "interval unknown" not in page.text
    assert "Classes" not in page.headings


def test_cross_fitting(model, foggy, written):
    result = bnpatch.tune_alpha(model, some(foggy, 60), granularity="global", trials=2)
    assert result.num_parts == 5
    assert "each left out of the search that it judged (cross-fitting)" in written(result).text


@pytest.mark.slow
def test_an_interrupted_search(model, foggy, written):
    def interrupt(trial, is_best):
        if trial.number == 2:
            raise KeyboardInterrupt

    with pytest.warns(BnpatchWarning, match="interrupted"):
        result = bnpatch.tune_alpha(model, some(foggy, 200), granularity="global", on_trial=interrupt)
    assert result.interrupted
    assert "The search was interrupted" in written(result).text


def test_what_was_left_alone(tuned, checkpoint, written):
    model = bnpatch.load(checkpoint)
    for index in range(6):
        model.module.add_module(f"extra{index}", torch.nn.LayerNorm(3))
    row = written(tuned, of=model).row("LayerNorm")
    assert row[0] == "LayerNorm 6 times"
    assert "extra0, extra1, extra2, extra3 and 2 others" in row[1]


def test_a_model_that_takes_no_blank_image_has_no_stages(tuned, model, written, monkeypatch):
    def refuse(self, example=None):
        raise bnpatch.BnpatchError("no")

    monkeypatch.setattr(type(model), "norm_shapes", refuse)
    page = written(tuned)
    assert "feature map" not in next(table[0] for table in page.tables if table[0][0] == "norm layer")


def test_gain_against_time(tuned, written):
    def point(norm_layers, gain, ratio):
        weights = PatchWeights(dict.fromkeys([f"s{index}" for index in range(norm_layers)], 0.1))
        return Point(
            weights, norm_layers, gain, 0.01, Latency(0.01 * ratio, ratio, 0.98 * ratio, 1.03 * ratio, 8, 9)
        )

    result = replace(tuned)
    result.trade_off = [point(0, 0.0, 1.0), point(1, 0.3, 1.05), point(2, 0.2, 1.1), point(4, 0.33, 1.5)]
    page = written(result)
    (table,) = (table for table in page.tables if table[0][0] == "patched norm layers")
    assert [row[0] for row in table[1:]] == ["0 as it is", "1 knee", "2 another is better", "4"]
    assert table[2][1:] == ["1.05x 1.03 to 1.08", "+30.00 points"]
