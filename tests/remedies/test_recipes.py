"""Recipes that are not for this model, or damaged, or elsewhere."""

import json
import types
from dataclasses import replace

import pytest

import bnpatch
from bnpatch.core import recipe as recipes
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch_cli.recipes import check_unpatched
from tests.remedies.world import X, cases, followed, loaded

STATISTICS = Moments(X.new_zeros(3), X.new_ones(3))


def of_json(w, **change):
    return Recipe.load(w.file("recipe.json", json.dumps({**loaded().recipe().to_json(), **change})))


def patched():
    found = loaded()
    found.set_alphas(0.1)
    return found


def newer(w):
    """What an update does: another bnpatch knows one format more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "FORMAT", recipes.FORMAT + 1)
        of_json(w, format=recipes.FORMAT)


def re_estimated(found):
    found.set_state(found.state.with_re_estimated(found.moments_by_batch(X)))
    found.set_weights(PatchWeights(lambdas={"norm": 0.5}))


def with_statistics(recipe, part):
    (layer,) = recipe.norm_layers
    return replace(recipe, norm_layers=(replace(layer, re_estimated=part),))


class Hub:
    """As much of the hub as takes a commit of somebody who is logged in."""

    def __init__(self, token):
        self.token = token

    def create_repo(self, *_, **__):
        if self.token != "of an account":
            raise OSError("401 Client Error: Unauthorized")

    def create_commit(self, repository, *_, **__):
        return types.SimpleNamespace(commit_url=f"https://hub/{repository}/commit/c")


def pushed(token):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", Hub)
        assert loaded().recipe().push_to_hub("org/name", token=token).endswith("org/name/commit/c")


CASES = {
    "of a newer bnpatch": (
        lambda w: of_json(w, format=recipes.FORMAT + 1),
        "this bnpatch reads 1 to",
        "update bnpatch",
        newer,
    ),
    "without norm layers": (
        lambda w: of_json(w, sites=[{}]),
        "is a damaged recipe",
        "make one with bnpatch tune-alpha",
        of_json,
    ),
    "not JSON": (
        lambda w: Recipe.load(w.file("recipe.json", "{")),
        "is not a recipe",
        "name a recipe.json file",
        of_json,
    ),
    "not there": (
        lambda w: Recipe.load(w.folder / "recipe.json"),
        "cannot read",
        "name a recipe.json file",
        of_json,
    ),
    "statistics of another size": (
        lambda w: loaded().apply(with_statistics(loaded().recipe(), STATISTICS)),
        "the recipe is damaged: norm layer 'norm' has 4 channels",
        "make another with bnpatch tune-alpha",
        lambda w: loaded().apply(loaded().recipe()),
    ),
    "weights of an unknown norm layer": (
        lambda w: loaded().set_weights(PatchWeights({"nrm": 0.1})),
        "has no norm layer 'nrm'",
        "see bnpatch inspect --sites",
        lambda w: loaded().set_weights(
            PatchWeights({layer.name: 0.1 for layer in loaded().inventory().norm_layers})
        ),
    ),
    "a lambda without statistics": (
        lambda w: loaded().set_weights(PatchWeights(lambdas={"norm": 0.5})),
        "no re-estimated statistics for norm layer 'norm'",
        "re-estimate them on data",
        lambda w: re_estimated(loaded()),
    ),
    "a patched model to patch again": (
        lambda w: check_unpatched(patched(), "model.pt"),
        "model.pt is patched already",
        "leave out --recipe, or give the model as it was",
        lambda w: check_unpatched(loaded(), "model.pt"),
    ),
    "without an account": (
        lambda w: pushed(None),
        "cannot write to hf-hub:org/name: .*Unauthorized",
        r"that you are logged in \(hf auth login\) and may write",
        lambda w: pushed("of an account"),
    ),
    "elsewhere": (
        lambda w: Recipe.load("hf-hub:org/name"),  # no test may reach for the network
        "cannot read recipe.json of hf-hub:org/name",
        "download the file and name it",
        of_json,
    ),
    "running statistics of an unknown norm": (
        lambda w: loaded().set_running({"nrm": STATISTICS}),
        "has no norm 'nrm' to calibrate",
        "calibrate it again",
        lambda w: bnpatch.calibrate(loaded(), X),
    ),
}


@cases(CASES)
def test_recipes(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))
