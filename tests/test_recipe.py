import json

import numpy as np
import pytest

from bnpatch.errors import BnpatchError
from bnpatch.recipe import Recipe, SiteRecipe, fingerprint

RECIPE = Recipe(
    (SiteRecipe("bn1", "BatchNorm2d", 0.02, "aa"), SiteRecipe("bn2", "BatchNorm2d", 0.0, "bb")), {"seed": 1}
)


def test_round_trip(tmp_path):
    RECIPE.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == RECIPE
    assert RECIPE.alphas == {"bn1": 0.02, "bn2": 0.0}


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"bn1": "aa"}, "site 'bn2' is missing"),
        ({"bn1": "aa", "bn2": "cc"}, "parameters of site 'bn2' differ"),
        ({"bn1": "aa", "bn2": "bb", "bn3": "cc"}, "it has no site 'bn3'"),
    ],
)
def test_refuses_another_model_and_names_the_site(sites, message):
    with pytest.raises(BnpatchError, match=message):
        RECIPE.check_fits(sites)
    RECIPE.check_fits({"bn1": "aa", "bn2": "bb"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a recipe"),
        ("[]", "is not a recipe"),
        ("{}", "is not a recipe"),
        ('{"format": 99}', "recipe format 99.*update bnpatch"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "sites": [{"name": "a"}], "provenance": {}}', "damaged"),
        (json.dumps({"format": 1, "sites": [["a", 1]], "provenance": {}}), "damaged"),
        (
            json.dumps(
                {
                    "format": 1,
                    "provenance": {},
                    "sites": [{"name": "a", "kind": "b", "alpha": 2, "fingerprint": ""}],
                }
            ),
            r"site 'a' has alpha = 2; alpha must lie in \[0, 1\]",
        ),
    ],
)
def test_refuses_what_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(BnpatchError, match=message):
        Recipe.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BnpatchError, match=r"cannot read .*nope.json: No such file"):
        Recipe.load(tmp_path / "nope.json")


def test_fingerprint_survives_a_wider_dtype_and_sees_a_changed_value():
    values = [np.arange(3, dtype=np.float32), np.ones(3, np.float32)]
    assert fingerprint(values) == fingerprint([v.astype(np.float64) for v in values])
    values[1][0] += 1e-6
    assert fingerprint(values) != fingerprint([np.arange(3), np.ones(3)])
