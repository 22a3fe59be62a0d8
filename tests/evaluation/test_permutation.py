"""Classes that have other numbers in the data than in the model."""

import warnings

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.class_targets import ClassOrder, targets_of_folders
from bnpatch.evaluation.permutation import permutation, warn_if_permuted


def answers(targets, right, outputs, seed=0):
    """Answers that are the output of the class with this probability, and any other time a random one."""
    rng = np.random.default_rng(seed)
    random = rng.integers(0, targets.max() + 1, len(targets))
    return np.where(rng.random(len(targets)) < right, np.asarray(outputs)[targets], random)


TARGETS = np.arange(400) % 10
SWAPPED = [0, 1, 3, 2, 4, 5, 6, 7, 9, 8]  # two pairs of ten


@pytest.mark.parametrize("outputs", [SWAPPED, list(np.roll(np.arange(10), 3))])
def test_exchanged_classes_are_named(outputs):
    found = permutation(answers(TARGETS, 0.9, outputs), TARGETS)
    assert found == {t: o for t, o in enumerate(outputs) if t != o}


@pytest.mark.parametrize(
    ("right", "outputs"),
    [
        (0.9, range(10)),
        (0.0, range(10)),  # chance
        (0.9, [0] * 10),  # one answer for everything
        (0.4, SWAPPED),  # too often wrong to tell
        (0.9, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]),  # one class is taken for another
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_models_that_err_are_not_accused(right, outputs, seed):
    assert not permutation(answers(TARGETS, right, list(outputs), seed), TARGETS)


def test_a_class_of_one_example_is_in_one_half_only():
    assert permutation(np.array([0, 1, 2, 9]), np.array([0, 1, 2, 9])) == {}


def test_the_warning_says_the_permutation():
    expected = r"look permuted: 58.*%.* 9\d.*% .*'c2' is answered as 'c3', .* and 1 more\); --class-map"
    with pytest.warns(BnpatchWarning, match=expected):
        warn_if_permuted(answers(TARGETS, 0.95, SWAPPED), TARGETS, [f"c{n}" for n in range(10)])


@pytest.mark.filterwarnings("ignore:the model is right on")  # it is right on next to nothing then
def test_a_search_warns(tiny_digits):
    model, (x, labels) = tiny_digits
    run = {"granularity": "global", "trials": 1, "holdout": 0.5}
    with pytest.warns(BnpatchWarning, match="the classes look permuted"):
        bnpatch.tune_alpha(model, (x, np.roll(np.arange(10), 3)[labels]), **run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BnpatchWarning)
        bnpatch.tune_alpha(model, (x, labels), **run)


@pytest.fixture
def tiny_digits(digits):
    from tests.search.tiny import classifier, small

    return bnpatch.load(classifier(small(digits[0][0]), digits[0][1])), (small(digits[1][0]), digits[1][1])


def folders(names, class_names):
    return targets_of_folders(
        names, num_outputs=len(names), class_names=class_names, order=ClassOrder.NATURAL
    )


@pytest.mark.filterwarnings("ignore:the class folder '0' is not among")
def test_folders_without_one_name_of_the_model_are_not_taken_in_order():
    with pytest.raises(BnpatchError, match=r"none of the class folders .*'a'.*the model \('x'.*class-map"):
        folders(["a", "b"], ["x", "y"])
    assert folders(["0", "1"], ["x", "y"]) == {"0": 0, "1": 1}
