"""Gains without labels where classes are not equally frequent: two classes that brightness tells apart."""

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.evaluation.metrics import ACCURACY
from bnpatch.report.text import verdict_sentence
from bnpatch.search.label_free import estimated_prior

RUN = {"granularity": "global", "recalibrate": True, "trials": 4}


class Brightness(nn.Module):
    """The class is the sign of the brightness, as the norm with running statistics N(0, 1) returns it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.pretrained_cfg = {"input_size": (1, 4, 4), "mean": (0.0,), "std": (1.0,)}

    def forward(self, x):
        value = 4 * self.norm(x).mean((1, 2, 3))
        return torch.stack([-value, value], 1)


def images(share, shift, seed, count=600):
    """Inputs of brightness -1 or 1, that of a class plus a shift, and labels, a share of which is 1."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation((np.arange(count) < share * count).astype(np.int64))
    brightness = 2 * labels - 1 + rng.normal(0, 0.4, count) + shift
    noise = rng.normal(0, 0.2, (count, 1, 4, 4))
    return (brightness[:, None, None, None] + noise).astype(np.float32), labels


def search(share, shift, labelled=False, **options):
    """The result of a search, and the accuracy of the unpatched model and of the best candidate."""
    model = bnpatch.load(Brightness().eval())
    held_out = images(share, shift, seed=1)
    result = bnpatch.tune_alpha(
        model,
        images(share, shift, seed=0)[0],
        test_data=held_out if labelled else held_out[0],
        metric=options.pop("metric", "unlabeled"),
        **RUN,
        **options,
    )
    examples = bnpatch.open_examples(held_out, model)
    found = [bnpatch.evaluate(model, examples).mean(ACCURACY)]
    model.apply(result.candidate_recipe or result.recipe)
    return result, (*found, bnpatch.evaluate(model, examples).mean(ACCURACY))


def says(result):
    return [note for note in result.notes if "the classes may not be equally frequent" in note]


@pytest.mark.parametrize("metric", ["unlabeled", "information"])
def test_no_gain_is_claimed_where_frequent_classes_are_predicted_less_often(metric):
    """Four in five images are of one class, and nothing is shifted: lambda moves the threshold to them."""
    result, (before, after) = search(0.8, 0.0, metric=metric)
    assert after < before - 0.05  # eight draws: 0.09 to 0.13 less
    assert result.verdict != "gain"
    assert not result.is_recommended
    assert result.weights == result.candidates[0].weights
    assert "--class-prior" in says(result)[0]


def test_who_says_how_often_classes_occur_is_believed():
    """Equal shares, which are wrong, give the gain by which the search judges; the right ones give none."""
    wrong, _ = search(0.8, 0.0, class_prior="1,1")
    assert wrong.verdict == "gain"
    assert not says(wrong)
    right, (before, after) = search(0.8, 0.0, class_prior="0.2,0.8")
    assert after == before
    assert right.chosen.name == "baseline"


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_gain_under_a_shift_is_kept_whatever_the_frequencies(share):
    result, (before, after) = search(share, 1.5)
    assert result.verdict == "gain"
    assert result.is_recommended
    assert after > before + (0.35 if share == 0.5 else 0.02)  # eight draws: 0.41 to 0.45, and 0.03 to 0.07
    assert not says(result)
    assert "Whether answers get better is unknown without labels" in verdict_sentence(result)


def test_labels_of_held_out_images_decide_by_themselves():
    result, (before, after) = search(0.8, 0.0, labelled=True)
    assert result.comparisons[0].metric == ACCURACY
    assert result.verdict == ("loss" if after < before else "no significant change")
    assert not says(result)


def test_the_estimate_undoes_what_mistakes_do_to_predicted_shares():
    """Gaussians of deviation 1 around -1 and 1: the probabilities of equally frequent classes are exact."""
    rng = np.random.default_rng(0)
    x = rng.normal(np.where(rng.random(20_000) < 0.8, 1.0, -1.0), 1.0)
    probability = torch.from_numpy(1 / (1 + np.exp(-2 * x)))
    predictions = torch.stack([1 - probability, probability], 1)
    assert predictions.mean(0)[1] < 0.74
    assert estimated_prior(predictions)[1] == pytest.approx(0.8, abs=0.015)  # four standard errors
    few = estimated_prior(torch.eye(5)[[0, 0, 1]])
    assert few.tolist() == pytest.approx([3 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8])
