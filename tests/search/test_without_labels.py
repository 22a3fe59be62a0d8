from dataclasses import replace

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY
from bnpatch.search import objective
from bnpatch.search.held_out import scores
from bnpatch.search.label_free import Seen, infomax, unlabeled_step
from bnpatch.search.objective import ObjectiveSpec
from tests.closed_form import contrast
from tests.search.tiny import of_one_norm, small


def share_given_back(model, data, seen, result):
    """Of the accuracy that is lost between two data sets, the share that a recipe gives back."""
    without_loss, before = (evaluate(model, bnpatch.open_examples(some, model)) for some in (data, seen))
    model.apply(result.recipe)
    after = evaluate(model, bnpatch.open_examples(seen, model)).mean(ACCURACY)
    return (after - before.mean(ACCURACY)) / (without_loss.mean(ACCURACY) - before.mean(ACCURACY))


def test_labels_are_not_needed(digits, plain, monkeypatch):
    """The only norm is of the image, so that lambda undoes contrast, and there is no local minimum."""
    monkeypatch.setattr(objective, "SELF_LABELLED_SETS", 1)
    model = bnpatch.load(of_one_norm(small(digits[0][0]), digits[0][1]))
    dim = contrast(plain[0], 0.4), plain[1]
    result = bnpatch.tune_alpha(model, dim[0], metric="unlabeled", trials=4)
    assert result.comparisons[0].metric.name == "unlabeled"
    assert result.held_out.flips is None
    assert share_given_back(model, plain, dim, result) > 0.95  # 0.98 to 1.00, at contrasts from 0.3 to 0.6


@pytest.mark.slow
def test_several_norms_are_tuned_without_labels(tiny, plain, dim, monkeypatch):
    monkeypatch.setattr(objective, "SELF_LABELLED_SETS", 1)
    result = bnpatch.tune_alpha(tiny, dim[0], metric="unlabeled", trials=4)
    assert result.held_out.changed > 100  # of 300; ten seeds: 179 to 211
    assert share_given_back(tiny, plain, dim, result) > 0.4  # ten seeds: 0.68 to 1.00, of deviation 0.11


@pytest.mark.parametrize("count", [150, pytest.param(300, marks=pytest.mark.slow)])
def test_few_images_without_labels_cost_at_most_forty_passes(tiny, dim, count):
    result = bnpatch.tune_alpha(tiny, dim[0][:count], test_data=dim[0][300:], metric="unlabeled")
    assert result.num_tuning == count
    assert 20 < result.passes <= 40
    assert result.verdict == "gain"


@pytest.mark.parametrize(("sets", "classes", "labels"), [(4, 10, True), (3, 10, False), (4, 11, False)])
def test_labels_are_made_where_sets_are_balanced_but_for_chance(sets, classes, labels):
    """Else information is maximised, step by step, too."""
    images, logits = torch.zeros(250 * sets, 1, 2, 2), torch.randn(250, classes)
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(4, classes))
    model = bnpatch.load(module.eval())
    examples = bnpatch.open_examples((images, np.zeros(len(images), np.int64)), model)
    judge = ObjectiveSpec.of("unlabeled", None, 64).objective(model, examples, np.arange(len(images)))
    state = Seen(logits, {}, {}, {})
    hard, soft = unlabeled_step()(state, {}), infomax()(state, {})
    assert judge.step(state, {}).item() == pytest.approx((hard if labels else soft).item())
    judge = replace(judge, step=lambda seen, norm_layers: seen.logits.sum() * 0 + 7)
    assert [part.item() for part in judge.loss(model, list(examples.batches(64, np.arange(64))))] == [7]


def test_where_there_are_labels_they_give_the_verdict(tiny, dim):
    result = bnpatch.tune_alpha(tiny, dim, metric="unlabeled", granularity="global")
    assert result.comparisons[0].metric.name == "accuracy"
    assert any("equally frequent" in note for note in result.notes)


def test_a_verdict_without_labels_has_an_interval(tiny, dim, plain):
    """The images alone, in the order of a folder: by class."""
    run = {"metric": "unlabeled", "granularity": "global", "recalibrate": True, "trials": 4}
    sorted_dim, sorted_plain = (images[np.argsort(labels)] for images, labels in (dim, plain))
    result = bnpatch.tune_alpha(tiny, sorted_dim[::2], test_data=sorted_dim[1::2], **run)
    assert result.verdict == "gain"
    change = result.comparisons[0].change
    assert change.low < change.value < change.high < 0
    result = bnpatch.tune_alpha(tiny, sorted_plain[::2], test_data=sorted_plain[1::2], **run)
    assert result.verdict != "loss"


def test_sets_and_groups_of_images_look_alike_whatever_their_order(tiny, dim):
    """A folder is sorted by class: a set of its neighbours would be of one."""
    images, labels = (part[np.argsort(dim[1], kind="stable")][::2] for part in dim)
    examples, by_class, asked = bnpatch.open_examples((images, labels), tiny), np.arange(len(labels)), []

    class OfSets:
        set_size = 60

        def scores(self, model, examples, indices):
            asked.append(indices)
            return {"score": np.zeros(1)}

    scores(tiny, examples, OfSets(), tiny.state, by_class)
    assert sorted(np.concatenate(asked)) == by_class.tolist()
    assert min(len(np.unique(labels[part])) for part in asked) > 7

    judge = ObjectiveSpec.of("unlabeled", None, 64).objective(tiny, examples, by_class)
    judge = replace(judge, metrics=(bnpatch.evaluation.metrics.ACCURACY,)).with_intervals(len(by_class))
    shuffled = np.random.default_rng(1).permutation(by_class)
    with tiny.evaluating():
        first = scores(tiny, examples, judge, tiny.state, by_class)
        second = judge.scores(tiny, examples, shuffled)
    assert len(first["unlabeled"]) == len(second["unlabeled"]) == 20
    assert 0.5 < np.std(first["unlabeled"]) / np.std(second["unlabeled"]) < 2
    assert first["accuracy"].mean() == second["accuracy"].mean()


def test_where_nothing_can_be_read_without_labels_is_said(model, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(BnpatchError, match="none of the images can be read"):
        bnpatch.tune_alpha(model, tmp_path, metric="unlabeled", num_workers=0)
