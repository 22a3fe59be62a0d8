"""The weights of a model: set, refused, kept in a recipe, and taken back."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.models.running_stats import calibrate, re_estimate_statistics
from tests.models.small import DATA, INPUTS, assert_unchanged, group_norm, opened, small, snapshot


def test_lambda_zero_is_the_original_bit_for_bit():
    model, examples = opened(small())
    before = model.predict(INPUTS)
    model.set_state(model.state.with_re_estimated(re_estimate_statistics(model, examples)))
    names = list(model.alphas())
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)))
    assert torch.equal(model.predict(INPUTS), before)
    model.set_weights(PatchWeights(lambdas=dict.fromkeys(names, 0.7)))
    assert not torch.equal(model.predict(INPUTS), before)
    model.set_weights(PatchWeights(lambdas=dict.fromkeys(names, 0.0)))
    assert torch.equal(model.predict(INPUTS), before)
    model.set_weights(PatchWeights(lambdas=dict.fromkeys(names, 0.7)))
    with model.unpatched() as module:
        assert torch.equal(module(INPUTS), before)
    assert torch.equal(bnpatch.unpatch(model.module)(INPUTS), before)


def test_lambda_one_is_a_model_with_the_moments_of_the_data():
    model, examples = opened(small())
    targets = re_estimate_statistics(model, examples)
    twin = copy.deepcopy(model.module)
    for name, moments in targets.items():
        norm = getattr(twin, name)
        norm.running_mean.copy_(torch.from_numpy(moments.mean))
        norm.running_var.copy_(torch.from_numpy(moments.var))
    model.set_state(model.state.with_re_estimated(targets))
    for alpha in (0.0, 0.3):
        model.set_weights(PatchWeights(dict.fromkeys(targets, alpha), dict.fromkeys(targets, 1.0)))
        bnpatch.patch(twin, alpha)
        torch.testing.assert_close(model.predict(INPUTS), twin(INPUTS), rtol=1e-5, atol=1e-5)  # float32


def test_new_targets_count_at_once():
    model, examples = opened(small())
    targets = re_estimate_statistics(model, examples)
    model.set_state(model.state.with_re_estimated(targets))
    model.set_weights(PatchWeights(lambdas={"norm1": 1.0}))
    model.set_state(
        model.state.with_re_estimated({"norm1": Moments(targets["norm1"].mean + 1, targets["norm1"].var)})
    )
    # float32
    np.testing.assert_allclose(model.statistics_in_use()["norm1"].mean, targets["norm1"].mean + 1, rtol=1e-5)
    assert model.weights.lambdas == {"norm1": 1.0, "norm2": 0.0, "norm3": 0.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (PatchWeights({"norm1": 0.1}, {"norm1": 0.5}), "no re-estimated statistics for norm layer 'norm1'"),
        (PatchWeights({"norm1": 0.1}, {"nope": 0.0}), "no norm layer 'nope'"),
        (PatchWeights({"norm1": 0.1}, {"norm1": 2.0}), r"lambda = 2.0 at 'norm1'"),
        (PatchWeights({"nope": 0.1}, {"norm1": 0.0}), "no norm layer 'nope'"),
        (PatchWeights({"norm1": 0.1, "norm2": -1.0}, {"norm1": 0.0}), r"alpha = -1.0"),
    ],
)
def test_a_refused_setting_changes_nothing(weights, message):
    model, _ = opened(small())
    before = snapshot(model)
    with pytest.raises(BnpatchError, match=message):
        model.set_weights(weights)
    assert_unchanged(model, before)


def test_recipes_carry_all_that_was_found(tmp_path):
    model, examples = opened(small(group_norm))
    calibrate(model, examples)
    model.set_state(
        model.state.with_re_estimated(
            re_estimate_statistics(model, bnpatch.open_examples((2 * INPUTS, DATA[1]), model))
        )
    )
    model.set_weights(
        PatchWeights({"norm1": 0.6, "norm2": 1.0, "norm3": 0.3}, {"norm1": 0.4, "norm2": 0.9, "norm3": 0.0})
    )
    expected, recipe = model.predict(INPUTS), model.recipe()
    recipe.save(tmp_path / "recipe.json")
    read = Recipe.load(tmp_path / "recipe.json")
    assert read.to_json() == recipe.to_json()
    fresh = small(group_norm)
    fresh = bnpatch.apply(fresh, tmp_path / "recipe.json")
    assert torch.equal(fresh(INPUTS), expected)
    again = bnpatch.load(small(group_norm))
    again.set_running({name: Moments(np.ones(8), np.ones(8)) for name in again.uncalibrated()})
    again.apply(read)  # its moments replace those
    assert torch.equal(again.predict(INPUTS), expected)
    assert again.recipe().to_json() == recipe.to_json()


@pytest.mark.parametrize(
    ("wrap", "norm"),
    [
        (nn.DataParallel, nn.BatchNorm2d),
        (nn.DataParallel, group_norm),
        (AveragedModel, nn.BatchNorm2d),
        (partial(torch.compile, backend="eager"), nn.BatchNorm2d),
    ],
    ids=["parallel", "parallel, groups", "averaged", "compiled"],
)
def test_a_recipe_fits_a_model_with_and_without_a_wrapper(wrap, norm):
    """The wrapper adds a prefix to the name of every norm layer."""
    plain = opened(small(norm))
    wrapped = opened(wrap(small(norm)))
    for (model, examples), (other, _) in ((plain, wrapped), (wrapped, plain)):
        calibrate(model, examples)
        model.set_alphas(0.3)
        recipe = model.recipe()
        model.set_alphas(0.9)
        other.apply(recipe)
        assert set(other.alphas().values()) == {0.3}
        assert other.recipe().state.running.keys() == set(other.alphas() if norm is group_norm else ())
    names = (next(iter(model.alphas())) for model, _ in (plain, wrapped))
    assert re.fullmatch(r"norm1 (module|_orig_mod)\.norm1", " ".join(names))


def test_a_recipe_that_does_not_fit_changes_nothing():
    model, examples = opened(small(group_norm))
    calibrate(model, examples)
    other = bnpatch.load(small(group_norm, seed=1))
    for norm in (other.module.norm1, other.module.norm3):
        nn.init.normal_(norm.weight)
    before = snapshot(other)
    with pytest.raises(BnpatchError, match="parameters of norm layer 'norm1' differ"):
        other.apply(model.recipe())
    assert_unchanged(other, before)


def test_a_module_with_other_running_moments_is_taken_as_it_is():
    model, examples = opened(small())
    model.set_state(model.state.with_re_estimated(re_estimate_statistics(model, examples)))
    model.set_weights(
        PatchWeights({"norm1": 0.2, "norm2": 0.0, "norm3": 0.0}, {"norm1": 0.5, "norm2": 0.5, "norm3": 0.0})
    )
    expected = model.predict(INPUTS)
    again = bnpatch.load(model.module)
    assert torch.equal(again.predict(INPUTS), expected)
    fresh = bnpatch.load(small())
    fresh.apply(again.recipe())
    torch.testing.assert_close(fresh.predict(INPUTS), expected, rtol=1e-5, atol=1e-5)  # mixed with weight 1


def test_a_borrowed_model_comes_back():
    model, examples = opened(small(group_norm))
    calibrate(model, examples)
    targets = re_estimate_statistics(model, examples)
    model.set_state(model.state.with_re_estimated(targets))
    model.set_weights(PatchWeights({"norm1": 0.5}, {"norm1": 0.5}))
    before, expected = snapshot(model), model.recipe().to_json()
    with model.borrowed():
        model.set_state(
            model.state.with_re_estimated({name: Moments(t.mean + 1, t.var) for name, t in targets.items()})
        )
        model.set_weights(PatchWeights(dict.fromkeys(targets, 0.1), dict.fromkeys(targets, 1.0)))
        model.module.train()
    assert_unchanged(model, before)
    assert model.recipe().to_json() == expected
