"""Images to keep: what undoes contrast for the tiny classifier, lambda, ruins images that have it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.dataset import split
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, paired_difference, paired_rates
from bnpatch.report.html import report_page
from bnpatch.report.text import Written, verdict_sentence
from bnpatch.search import layer_search
from bnpatch.search.gradient_search import learn
from bnpatch.search.keep import ANSWERS_KEPT, KeepSet, fewest_images, largest_loss
from tests.search.tiny import Opposites

#: The least margin that 600 images can show to be kept; any change of an answer for the worse fails it.
STRICT = 0.0078


def search(model, data, **options):
    return bnpatch.tune_alpha(model, data, granularity="global", recalibrate=True, trials=4, **options)


@pytest.fixture(scope="module")
def free(tiny_module, dim):
    """What is chosen where no images are to be kept."""
    return search(bnpatch.load(tiny_module), dim)


def answers(model, images):
    examples = bnpatch.open_examples((images, np.zeros(len(images), np.int64)), model)
    return np.concatenate([model.predict(b.x).argmax(1).numpy() for b in examples.batches(64)])


def accuracy(model, data, recipe):
    with model.borrowed():
        if recipe is not None:
            model.apply(recipe)
        return evaluate(model, bnpatch.open_examples(data, model)).mean(ACCURACY)


@pytest.mark.parametrize("labelled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_ruins_the_images_to_keep_is_chosen_without_them_and_not_with_them(
    tiny, dim, plain, free, labelled
):
    unpatched = accuracy(tiny, plain, None)
    assert free.is_recommended
    assert free.held_out.kept is None
    assert free.recipe.provenance["kept"] is None
    assert accuracy(tiny, plain, free.recipe) < unpatched - 0.04  # ten seeds: 0.06 to 0.44 less
    result = search(tiny, dim, keep=plain if labelled else plain[0], margin=0.03)
    assert result.chosen.name != free.chosen.name
    assert accuracy(tiny, plain, result.recipe) > unpatched - 0.03  # that is the margin; ten seeds: 0.01 less
    assert result.held_out.kept.comparison.metric == (ACCURACY if labelled else ANSWERS_KEPT)
    assert result.held_out.kept.num_examples == 300


def test_what_helps_the_images_to_keep_too_is_chosen(tiny, dim, free):
    result = search(tiny, dim, keep=dim, margin=STRICT)
    assert result.is_recommended
    assert result.weights == free.weights
    kept = result.held_out.kept
    assert kept.is_within
    assert kept.comparison.change.value > 0.3
    assert result.recipe.provenance["kept"]["verdict"] == "kept within the margin"
    assert json.loads(json.dumps(result.recipe.provenance["kept"]))["examples"] == 300


def test_where_nothing_passes_the_baseline_is_kept_and_the_best_is_a_candidate(tiny, dim, free):
    keep = dim[0], answers(tiny, dim[0])  # any other answer is a loss
    result = search(tiny, dim, keep=keep, margin=STRICT)
    assert result.chosen.name == "baseline"
    assert not result.is_recommended
    assert result.weights == result.candidates[0].weights
    assert result.candidate_recipe.alphas == free.recipe.alphas
    assert f"{free.chosen.name}: best in tuning, but not shown to be within the margin" in result.reason
    assert result.reason in result.notes
    assert result.candidate_recipe.provenance["reason"] == result.reason
    page = report_page(result, tiny, Written(Path("recipe.json"), Path("patched.pt")))
    assert "best in tuning, but not shown" in page


def test_the_margin_decides(tiny, dim, free):
    keep = dim[0], answers(tiny, dim[0])
    result = search(tiny, dim, keep=keep, margin=0.99)
    assert result.is_recommended
    assert result.weights == free.weights
    kept = result.held_out.kept
    assert STRICT < -kept.comparison.change.value < kept.largest_loss < 0.99


def test_the_other_half_judges(tiny, dim, monkeypatch):
    """The half that chooses is spared by any patch, the half that judges is not."""
    labels = dim[1].copy()
    _, judging = split(dim[1].astype(np.int64), 0.5, seed=0)
    scored = []
    scores = KeepSet._scores

    def spy(self, state, indices):
        scored.append(set(indices.tolist()))
        return scores(self, state, indices)

    monkeypatch.setattr(KeepSet, "_scores", spy)
    result = search(tiny, dim, keep=(dim[0], labels), margin=STRICT)
    assert result.is_recommended
    *before, first, second = scored
    assert first == second == set(judging.tolist())
    assert before
    assert not set.union(*before) & first


def test_a_loss_on_the_half_that_judges_is_not_applied(tiny, dim, free, monkeypatch):
    wrong = dim[1].copy()
    _, judging = split(dim[1].astype(np.int64), 0.5, seed=0)
    wrong[judging] = answers(tiny, dim[0])[judging]
    monkeypatch.setattr(
        "bnpatch.search.keep.split",
        lambda strata, fraction, seed, groups: split(dim[1].astype(np.int64), 0.5, 0),
    )
    result = search(tiny, dim, keep=(dim[0], wrong), margin=STRICT)
    assert result.chosen.name == free.chosen.name
    assert result.verdict == "gain"
    assert not result.is_recommended
    assert result.candidate_recipe.alphas == free.recipe.alphas
    assert f"{free.chosen.name}: not shown to be within the margin" in result.reason
    assert verdict_sentence(result).startswith("Keep the model as it is: ")
    page = report_page(result, tiny, Written(Path("recipe.json"), Path("patched.pt")))
    assert "chosen, but not kept" in page
    assert str(result.held_out.kept) in page


def copies(data, groups, each):
    """So many copies of the first few examples, each of which is a group: (images, labels), groups."""
    return tuple(np.repeat(part[:groups], each, axis=0) for part in data), np.repeat(np.arange(groups), each)


def test_a_group_of_images_to_keep_is_in_one_half_and_counts_once(tiny, plain):
    (data, groups), alone = copies(plain, 200, 6), (plain[0][:200], plain[1][:200])
    keep = KeepSet(tiny, bnpatch.open_examples(data, tiny, groups=groups), 0.03)
    choosing, judging = groups[keep._choosing], groups[keep._judging]
    assert len(choosing) + len(judging) == 1200
    assert not set(choosing) & set(judging)
    once = KeepSet(tiny, bnpatch.open_examples(alone, tiny), 0.03)
    other = tiny.state.with_weights(tiny.state.weights)
    found, expected = keep.judged(other), once.judged(other)
    assert found.num_groups == 100
    assert "on 600 images to keep in 100 groups" in str(found)
    assert found.to_json()["groups"] == 100
    # The interval of 100 groups is that of 100 images, but for Student's quantile.
    assert expected.largest_loss < found.largest_loss < 1.1 * expected.largest_loss
    assert expected.num_groups is None


def test_few_groups_of_images_to_keep_are_said_to_be_few(tiny, plain):
    data, groups = copies(plain, 40, 15)
    examples = bnpatch.open_examples(data, tiny, groups=groups)
    with pytest.warns(BnpatchWarning, match="600 images to keep in about 40 groups are too few") as said:
        KeepSet(tiny, examples, 0.03)
    text = next(str(w.message) for w in said if "too few" in str(w.message))
    needed, margin = re.search(r"at least ([\d,]+) are needed, or a margin of ([\d.]+)$", text).groups()
    for part, allowed in ((300, float(margin)), (int(needed.replace(",", "")) // 2, 0.03)):
        same = np.ones(part)
        assert largest_loss(same, same, np.arange(part) // 15) < allowed
    examples.groups = np.zeros(600, np.int64)
    with pytest.raises(BnpatchError, match="of too few groups"):
        KeepSet(tiny, examples, 0.03)


@pytest.mark.filterwarnings("ignore:600 images to keep")
def test_a_rule_for_groups_is_one_for_the_images_to_keep_too(tiny, dim):
    result = search(tiny, dim, keep=dim, margin=0.5, groups=lambda name: int(name.split()[-1]) // 3)
    assert result.held_out.kept.num_groups == 100


def test_what_few_images_can_show_is_said(tiny, plain):
    examples = bnpatch.open_examples((plain[0][:60], plain[1][:60]), tiny)
    with pytest.warns(BnpatchWarning) as said:
        KeepSet(tiny, examples, 0.005)
    text = next(str(w.message) for w in said if w.category is BnpatchWarning)
    assert text.startswith("60 images to keep are too few")
    assert "loses at most 0.5 points on them" in text
    needed, margin = re.search(r"at least ([\d,]+) are needed, or a margin of ([\d.]+)$", text).groups()
    needed, margin = int(needed.replace(",", "")), float(margin)
    same = np.ones(needed // 2)
    assert largest_loss(same, same) < 0.005 <= largest_loss(same[1:], same[1:])
    assert largest_loss(np.ones(30), np.ones(30)) < margin < 1.05 * largest_loss(np.ones(30), np.ones(30))
    assert fewest_images(margin) <= 30


@pytest.mark.parametrize("count", [50, 500])
def test_a_loss_as_large_as_the_margin_passes_in_one_case_of_twenty(count):
    rng, margin, passed = np.random.default_rng(0), 0.06, 0
    for _ in range(2000):
        kind = rng.choice(3, count, p=[0.08, 0.02, 0.9])  # lost, gained, as before
        before, after = (kind != 1).astype(float), (kind != 0).astype(float)
        passed += largest_loss(before, after) < margin
    assert passed / 2000 < 0.05 + 0.015  # three standard errors
    assert count == 50 or passed / 2000 > 0.05 - 0.02


def test_the_interval_of_rates_is_that_of_the_paired_difference_at_its_level():
    before, after = np.array([1.0, 1, 1, 0, 0, 1]), np.array([1.0, 0, 1, 1, 0, 1])
    assert paired_rates(before, after) == paired_difference(before, after)
    assert largest_loss(before, after) < -paired_difference(before, after).low


@pytest.mark.filterwarnings("ignore:of 200 images many are near-copies")  # they are made so
def test_learning_sees_the_images_to_keep(monkeypatch):
    """Both the loss of a step and the cost that compares steps are larger by what these images lose."""
    seen = []

    def watched(problem, starts, cost, course):
        weights = starts[0].weights
        problem.model.set_state(problem.base.with_weights(weights))
        batches = list(problem.examples.batches(64, problem.indices[:64]))
        with torch.no_grad():
            loss = sum(part.item() for part in problem.loss(problem.model, batches))
        seen.append((loss, cost(weights)))
        return learn(problem, starts, cost, course)

    monkeypatch.setattr(layer_search, "learn", watched)
    module = Opposites().eval()
    x, y = module.examples(200)
    run = {"granularity": "layer", "recalibrate": False, "slopes": False, "trials": 2, "holdout": 0.5}
    for keep in (None, (x, y ^ 1)):  # they deny the second bit of the class
        bnpatch.tune_alpha(module, (x, y), keep=keep, margin=0.5, **run)
    (loss, cost), (loss_with_keep, cost_with_keep) = seen
    assert loss_with_keep > loss + 0.5
    assert cost_with_keep > cost + 0.5


def test_a_metric_of_ones_own_has_no_answers_to_keep(tiny, dim, plain):
    with pytest.raises(BnpatchError, match="<lambda> is not about classes"):
        search(tiny, dim, keep=plain, metric=lambda outputs, targets: outputs.amax(1) - outputs.mean(1))


def test_a_margin_is_a_fraction(tiny, dim, plain):
    for margin in (0.0, 1.0, -0.1):
        with pytest.raises(BnpatchError, match="is not a fraction"):
            search(tiny, dim, keep=plain, margin=margin)
