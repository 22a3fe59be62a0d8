"""Images to keep: lambda = 1 at the first norm of the tiny classifier undoes contrast, and ruins other images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import split
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, Z95, paired_difference, paired_rates
from bnpatch.models.running_stats import target_moments
from bnpatch.report.html import report_page
from bnpatch.search.keep import ANSWERS_KEPT, KeepSet, fewest_images, largest_loss

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


def undone(model, images):
    """The state in which the first norm has the statistics of these images."""
    examples = bnpatch.open_examples((images, np.zeros(len(images), np.int64)), model)
    base = model.state.with_target(target_moments(model, examples, batch_size=250))
    first, *others = model.alphas()
    return base.with_weights(
        PatchWeights(dict.fromkeys(model.alphas(), 0.0), {first: 1.0, **dict.fromkeys(others, 0.0)})
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_what_ruins_the_images_to_keep_is_chosen_without_them_and_not_with_them(
    tiny, dim, plain, free, labelled
):
    unpatched = accuracy(tiny, plain, None)
    assert free.is_recommended
    assert free.verdict.kept is None
    assert free.recipe.provenance["kept"] is None
    assert accuracy(tiny, plain, free.recipe) < unpatched - 0.1
    result = search(tiny, dim, keep=plain if labelled else plain[0], margin=0.03)
    print("SEED", accuracy(tiny, plain, free.recipe), unpatched, accuracy(tiny, plain, result.recipe), result.chosen.name, result.is_recommended, result.verdict)
    assert result.chosen.name != free.chosen.name
    assert accuracy(tiny, plain, result.recipe) > unpatched - 0.05
    assert result.verdict.kept.comparison.metric == (ACCURACY if labelled else ANSWERS_KEPT)
    assert result.verdict.kept.num_examples == 300


def test_what_helps_the_images_to_keep_too_is_chosen(tiny, dim, free):
    result = search(tiny, dim, keep=dim, margin=STRICT)
    assert result.is_recommended
    assert result.weights == free.weights
    kept = result.verdict.kept
    assert kept.is_within
    assert kept.comparison.change.value > 0.3
    assert result.recipe.provenance["kept"]["verdict"] == "kept within the margin"
    assert json.loads(json.dumps(result.recipe.provenance["kept"]))["examples"] == 300


def test_where_nothing_passes_the_baseline_is_kept_and_the_best_is_a_candidate(tiny, dim, free):
    keep = dim[0], answers(tiny, dim[0])  # any other answer is a loss
    result = search(tiny, dim, keep=keep, margin=STRICT)
    assert result.chosen.name == "identity"
    assert not result.is_recommended
    assert result.weights == result.candidates[0].weights
    assert result.candidate_recipe.alphas == free.recipe.alphas
    assert f"{free.chosen.name}: best in tuning, but not shown to be within the margin" in result.reason
    assert result.reason in result.notes
    assert result.candidate_recipe.provenance["reason"] == result.reason
    page = report_page(result, tiny, Path("recipe.json"), Path("patched.pt"))
    assert "best in tuning, but not shown" in page
