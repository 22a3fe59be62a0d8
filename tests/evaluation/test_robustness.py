"""The benchmark, with corruptions that are known: each turns some images into those of another class."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.evaluate import NoExamplesError
from bnpatch.evaluation.robustness import _Clock
from bnpatch.evaluation.robustness_scores import CLEAN
from bnpatch.report.robustness import robustness_csv, robustness_json, robustness_page, robustness_sentence

KINDS = ("fog", "snow")
SIDE = 8


class Brightness(nn.Module):
    """Says 1 for images that are brighter than mid-gray; with alpha = 1 every image is of mean brightness."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.pretrained_cfg = {"input_size": (1, SIDE, SIDE), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}

    def forward(self, x):
        mean = self.norm(x).mean((1, 2, 3))
        return torch.stack([-mean - 1e-3, mean + 1e-3], 1)


@pytest.fixture
def model():
    return bnpatch.load(Brightness().eval())


@pytest.fixture
def data():
    """Forty images whose class is their brightness, with a gradient that gives them a variance."""
    labels = np.arange(40) % 2
    ramp = np.linspace(-20, 20, SIDE * SIDE).reshape(SIDE, SIDE)
    return (np.where(labels, 200, 55)[:, None, None] + ramp).astype(np.uint8), labels


def table(image, kind, severity, key):
    """Fog inverts one of eight images for each severity; snow inverts the others."""
    hit = key[1] % 8 < severity
    return 255 - image if hit == (kind == "fog") else image


@pytest.fixture(autouse=True)
def corruptions(monkeypatch):
    """Stands for the package: a table by construction."""
    calls = []

    def corrupt(image, kind, severity, key):
        calls.append((kind, severity, key[1]))
        return table(image, kind, severity, key)

    monkeypatch.setattr("bnpatch.data.corruptions.corrupt", corrupt)
    monkeypatch.setattr("bnpatch.data.corruptions.check_installed", lambda: None)
    monkeypatch.setattr("bnpatch.evaluation.robustness.check_installed", lambda: None)
    return calls


def run(model, data, **options):
    return bnpatch.robustness(model, data, **{"kinds": KINDS, "severities": [1, 3], **options})


def test_errors_of_an_unpatched_model(model, data):
    result = run(model, data)
    assert result.after is None
    assert result.num_examples == 40
    assert result.comparison().before.value == 0
    errors = {condition: values.mean() for condition, values in result.before.items()}
    assert errors == {CLEAN: 0, ("fog", 1): 1 / 8, ("snow", 1): 7 / 8, ("fog", 3): 3 / 8, ("snow", 3): 5 / 8}
    assert result.of_kind("fog").before.value == pytest.approx(2 / 8)
    assert result.mean_error().before.value == pytest.approx(1 / 2)
    assert result.corruption_error("fog") is None
    assert result.mean_corruption_error() is None


def test_errors_of_a_patched_model(model, data):
    """With alpha = 1 the answer is always 1, which is right for every second image."""
    model.set_alphas(1.0)
    result = run(model, data)
    assert model.alphas() == {"norm": 1.0}
    for condition in result.before:
        assert result.comparison(condition).after.value == 1 / 2
    assert result.comparison().change.value == 1 / 2
    assert result.comparison().verdict == "loss"
    assert result.corruption_error("fog") == pytest.approx((1 / 2) / (2 / 8))
    assert result.corruption_error("snow") == pytest.approx((1 / 2) / (6 / 8))
    mean = result.mean_corruption_error()
    assert mean.value == pytest.approx((2 + 2 / 3) / 2)
    assert mean.low < mean.value < mean.high


def test_the_interval_of_the_mean_corruption_error_is_that_of_resampled_images():
    """The linearized standard error, against that of 4,000 bootstrap samples of the images."""
    from bnpatch.evaluation.robustness import Robustness

    rng = np.random.default_rng(0)
    draws = {}
    for condition, rate in ((("fog", 1), 0.4), (("snow", 1), 0.7)):
        before = (rng.random(400) < rate).astype(float)
        after = np.where(rng.random(400) < 0.1, 0.0, before)  # mostly the same images
        draws[condition] = before, after
    clean = {CLEAN: np.zeros(400)}

    def made(chosen):
        return Robustness(
            "m",
            KINDS,
            (1,),
            clean | {c: both[0][chosen] for c, both in draws.items()},
            clean | {c: both[1][chosen] for c, both in draws.items()},
        )

    estimate = made(slice(None)).mean_corruption_error()
    samples = []
    for _ in range(4000):
        chosen = rng.integers(0, 400, 400)
        ratios = [both[1][chosen].mean() / both[0][chosen].mean() for both in draws.values()]
        samples.append(np.mean(ratios))
    # 4,000 samples know it within 2%
    assert estimate.reach / 1.96 == pytest.approx(np.std(samples), rel=0.08)


def test_a_kind_without_errors_has_no_corruption_error(model, data, monkeypatch):
    monkeypatch.setattr(
        "bnpatch.data.corruptions.corrupt", lambda image, kind, *_: image if kind == "fog" else 255 - image
    )
    model.set_alphas(1.0)
    result = run(model, data)
    assert result.corruption_error("fog") is None
    assert result.mean_corruption_error().value == pytest.approx(1 / 2)


def test_a_recipe_is_compared_with_the_model_as_it_is(model, data, tmp_path):
    model.set_alphas(1.0)
    recipe = model.recipe()
    with pytest.raises(BnpatchError, match="patched already; leave out the recipe"):
        run(model, data, recipe=recipe)
    model.set_alphas(0.0)
    recipe.save(tmp_path / "recipe.json")
    result = run(model, data, recipe=tmp_path / "recipe.json")
    assert model.alphas() == {"norm": 0.0}
    assert result.comparison(("fog", 1)).after.value == 1 / 2


def test_both_states_see_the_same_images_which_are_made_once(model, data, corruptions):
    model.set_alphas(1.0)
    run(model, data, batch_size=7)
    assert len(corruptions) == len(set(corruptions)) == 4 * 40


def test_a_killed_run_goes_on(model, data, corruptions, tmp_path):
    model.set_alphas(1.0)
    whole = run(model, data)
    path = tmp_path / "scores.npz"
    corruptions.clear()

    def kill(now):
        if now.label == "fog 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, resume=path, progress=kill)
    done = {call[:2] for call in corruptions}
    assert ("snow", 1) in done
    corruptions.clear()
    seen = []
    again = run(model, data, resume=path, progress=seen.append)
    assert {call[:2] for call in corruptions} == {("fog", 3), ("snow", 3)}
    for ours, theirs in ((again.before, whole.before), (again.after, whole.after)):
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[c], theirs[c]) for c in ours)
    assert seen[-1].done == seen[-1].total == 3 * 2 * 40  # the images as they are, and what was missing
    corruptions.clear()
    more = run(model, data, resume=path, kinds="snow,fog,frost", severities=[3])
    assert {call[0] for call in corruptions} == {"frost"}
    assert list(more.before) == [CLEAN, ("snow", 3), ("fog", 3), ("frost", 3)]


def test_scores_of_another_run_are_refused(model, data, tmp_path):
    path = tmp_path / "scores.npz"
    run(model, data, resume=path, kinds="fog")
    for changed, options in (
        ("the seed", {"seed": 1}),
        ("the data", {"data": (data[0][:30], data[1][:30])}),
        ("the recipe", {"recipe": _patched_recipe()}),
    ):
        with pytest.raises(BnpatchError, match=f"another run: {changed} changed; delete it"):
            run(model, **{"data": data, "resume": path, **options})
    other = Brightness().eval()
    with torch.no_grad():
        other.norm.bias.fill_(0.1)
    with pytest.raises(BnpatchError, match="another run: the model and the recipe changed"):
        run(other, data, resume=path)


def _patched_recipe():
    patched = bnpatch.load(Brightness().eval())
    patched.set_alphas(1.0)
    return patched.recipe()


def test_a_model_with_another_head_is_found_by_its_answers(model, data, tmp_path):
    class Inverted(Brightness):
        def forward(self, x):
            return -super().forward(x)

    path = tmp_path / "scores.npz"
    run(model, data, resume=path, kinds="fog")
    other = bnpatch.load(Inverted().eval())
    other.name = model.name
    with pytest.raises(BnpatchError, match=r"another run: answers to 100\.0% of the images are others now"):
        run(other, data, resume=path, kinds="fog")


def test_a_damaged_file_is_named(model, data, tmp_path):
    path = tmp_path / "scores.npz"
    for content in (b"", b"PK\x03\x04 not a zip"):
        path.write_bytes(content)
        with pytest.raises(BnpatchError, match=r"scores\.npz has no scores that can be read; delete it"):
            run(model, data, resume=path)


def test_groups_are_the_units(model, data):
    model.set_alphas(1.0)
    one = run(model, data).mean_corruption_error()
    many = run(model, data, groups=[n // 8 for n in range(40)]).mean_corruption_error()
    assert many.value == one.value
    assert many.high - many.low != one.high - one.low


def test_mistakes_are_said_before_anything_runs(model, data):
    with pytest.raises(BnpatchError, match="no severity 6; choose from 1,2,3,4,5"):
        run(model, data, severities=[1, 6])
    with pytest.raises(BnpatchError, match="no corruption 'rain'"):
        run(model, data, kinds="rain")
    with pytest.raises(BnpatchError, match="images without classes"):
        run(model, data[0])
    with pytest.raises((BnpatchError, NoExamplesError)):
        run(model, (data[0][:0], data[1][:0]))


def test_the_time_left_goes_by_kinds():
    """Fog takes 40 s and snow 10 s for its images; two severities of each."""
    now, told = [0.0], []
    conditions = [CLEAN, ("fog", 1), ("snow", 1), ("fog", 2), ("snow", 2)]
    clock = _Clock(conditions, 10, told.append, lambda: now[0])
    for condition, seconds in zip(conditions, (1, 40, 10, 40, 10), strict=True):
        clock.start(condition)
        for _ in range(2):
            now[0] += seconds / 2
            clock.count(5)
    left = {(p.label, p.done): p.seconds_left for p in told}
    assert left["fog 1", 20] == 3 * 40  # nothing is known of snow yet
    assert left["snow 1", 30] == 50
    assert left["fog 2", 35] == 30
    assert left["snow 2", 50] == 0
    assert {p.total for p in told} == {50}


def test_the_page_and_the_table(model, data):
    model.set_alphas(1.0)
    result = run(model, data)
    page = robustness_page(result, {"model": "<b>"}, "robustness model.pt", ["a note"])
    assert "&lt;b&gt;" in page
    assert page.count("<svg") == 2
    assert "133.3%" in page
    assert "var(--good)" in page
    assert "a note" in page
    lines = robustness_csv(result).splitlines()
    assert lines[0] == "kind,severity,examples,error,patched error,change,low,high"
    assert lines[1].startswith("clean,0,40,0,0.5,0.5,")
    assert lines[2].startswith("fog,1,40,0.125,0.5,0.375,")
    assert len(lines) == 6
    content = json.loads(json.dumps(robustness_json(result)))
    assert content["kinds"]["fog"]["severities"]["3"]["before"]["value"] == 3 / 8
    assert content["mean_corruption_error"]["value"] == pytest.approx(4 / 3)
    assert "no more than chance" in robustness_sentence(result)


def test_the_page_of_an_unpatched_model(model, data):
    result = run(model, data)
    page = robustness_page(result, {}, "", [])
    assert page.count("<svg") == 1
    assert "corruption error" not in page
    assert robustness_csv(result).splitlines()[0] == "kind,severity,examples,error,low,high"
    assert "50.00% of the answers are wrong, 0.00% on the images as they are" in robustness_sentence(result)
