import base64
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import NormRecipe, Recipe
from bnpatch.models.fingerprints import fingerprint

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "recipe.schema.json"
RECIPE = Recipe(
    (NormRecipe("bn1", "BatchNorm2d", 0.02, "aa"), NormRecipe("bn2", "BatchNorm2d", 0.0, "bb")), {"seed": 1}
)


def test_round_trip(tmp_path):
    RECIPE.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == RECIPE
    assert RECIPE.alphas == {"bn1": 0.02, "bn2": 0.0}


@pytest.mark.parametrize(("kind", "number"), [("slope", 2), ("var_offset", 3)])
def test_slopes_and_offsets_make_a_recipe_of_a_newer_format(tmp_path, kind, number):
    """Without them it stays one that earlier versions read."""
    assert RECIPE.to_json()["format"] == 1
    assert kind not in RECIPE.to_json()["sites"][0]
    first = NormRecipe("bn1", "BatchNorm2d", 0.02, "aa", **{kind: -0.5})
    newer = Recipe((first, RECIPE.norm_layers[1]))
    assert newer.to_json()["format"] == number
    newer.save(tmp_path / "recipe.json")
    read = Recipe.load(tmp_path / "recipe.json")
    assert read == newer
    assert read.state.weights.of(kind) == {"bn1": -0.5, "bn2": 0.0}


@pytest.mark.parametrize(
    ("norm_layers", "message"),
    [
        ({"bn1": "aa"}, "norm layer 'bn2' is missing"),
        ({"bn1": "aa", "bn2": "cc"}, "parameters of norm layer 'bn2' differ"),
        ({"bn1": "aa", "bn2": "bb", "bn3": "cc"}, "it has no norm layer 'bn3'"),
    ],
)
def test_refuses_another_model_and_names_the_site(norm_layers, message):
    with pytest.raises(BnpatchError, match=message):
        RECIPE.check_fits(norm_layers)
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
            r"alpha = 2 at 'a' is out of range; it must lie in \[0, 1\]",
        ),
    ],
)
def test_refuses_what_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(BnpatchError, match=message):
        Recipe.load(path)


GOOD = {"name": "a", "kind": "b", "alpha": 0.1, "fingerprint": ""}


def recipe_of(*sites, provenance="{}"):
    return f'{{"format": 1, "sites": [{", ".join(sites)}], "provenance": {provenance}}}'


@pytest.mark.parametrize(
    "text",
    [
        recipe_of(json.dumps(GOOD), provenance="null"),
        recipe_of(json.dumps(GOOD), json.dumps(GOOD)),
        recipe_of('{"name": "a", "name": "a", "kind": "b", "alpha": 0.1, "fingerprint": ""}'),
        recipe_of(json.dumps(GOOD).replace("0.1", "NaN")),
        recipe_of(json.dumps(GOOD).replace("0.1", "1e999")),
        recipe_of(json.dumps(GOOD).replace("0.1", "1" * 5000)),
        recipe_of(json.dumps(GOOD | {"target": [1]})),
        recipe_of(json.dumps(GOOD | {"lambda": "0.5"})),
        recipe_of(json.dumps(GOOD | {"channels_per_group": 2.0})),
        "[" * 100_000,
        *(recipe_of(json.dumps(GOOD | {key: value})) for key in GOOD for value in (None, [], {}, True)),
    ],
)
def test_refuses_recipes_of_other_kinds_of_values(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(BnpatchError, match=r"is not a recipe|damaged recipe|must lie in \[0, 1\]"):
        Recipe.load(path)
    path.write_text(recipe_of(json.dumps(GOOD)))
    assert Recipe.load(path).alphas == {"a": 0.1}


def test_mutated_recipes_are_read_or_refused(tmp_path):
    """By count and seed: bytes that are replaced, dropped or doubled anywhere."""
    rng = np.random.default_rng(0)
    layers = (NormRecipe("bn1", "BatchNorm2d", 0.02, "aa", 0.3, moments(0)), *RECIPE.norm_layers[1:])
    good = json.dumps(Recipe(layers, {"seed": 1}).to_json()).encode()
    path = tmp_path / "recipe.json"
    schema = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    schema.validate(json.loads(good))
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        for place in rng.integers(0, len(damaged), rng.integers(1, 4)):
            place = min(int(place), len(damaged) - 1)
            damaged[place : place + 1] = [b"", bytes(rng.integers(0, 256, 1, np.uint8)), b'"{'][
                rng.integers(3)
            ]
        path.write_bytes(damaged)
        try:
            Recipe.load(path)
        except BnpatchError:
            refused += 1
        else:
            schema.validate(json.loads(path.read_text()))  # the documented schema is as strict
    assert refused > 120


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", True), ("format", 1.5), ("provenance", []), ("weigh_single_values", 1), ("sites", {})],
)
def test_what_the_schema_refuses_is_refused(key, value):
    content = RECIPE.to_json() | {key: value}
    assert not jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).is_valid(content)
    with pytest.raises(BnpatchError, match="recipe"):
        Recipe.from_json(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BnpatchError, match=r"cannot read .*nope.json: No such file"):
        Recipe.load(tmp_path / "nope.json")


def test_fingerprint_survives_a_wider_dtype_and_sees_a_changed_value():
    values = [np.arange(3, dtype=np.float32), np.ones(3, np.float32)]
    assert fingerprint(values) == fingerprint([v.astype(np.float64) for v in values])
    values[1][0] += 1e-6
    assert fingerprint(values) != fingerprint([np.arange(3), np.ones(3)])


def moments(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return Moments(*((scale * rng.random(5)).astype(np.float32).astype(np.float64) for _ in range(2)))


def test_moments_round_trip_exactly(tmp_path):
    """Of float32, also where they are denormal or huge."""
    norm_layers = (
        NormRecipe("bn1", "BatchNorm2d", 0.02, "aa", 0.3, moments(0)),
        NormRecipe("gn", "GroupNorm", 1.0, "bb", 1.0, moments(1, 2.0**-140), moments(2, 2.0**120)),
        NormRecipe("bn2", "BatchNorm2d", 0.0, "cc"),
    )
    Recipe(norm_layers).save(tmp_path / "recipe.json")
    read = Recipe.load(tmp_path / "recipe.json")
    assert read.to_json() == Recipe(norm_layers).to_json()
    for norm_layer, known in zip(read.norm_layers, norm_layers, strict=True):
        assert (norm_layer.name, norm_layer.alpha, norm_layer.lambda_) == (
            known.name,
            known.alpha,
            known.lambda_,
        )
        for mine, theirs in (
            (norm_layer.re_estimated, known.re_estimated),
            (norm_layer.running, known.running),
        ):
            assert (mine is None) is (theirs is None)
            if mine is not None:
                np.testing.assert_array_equal(mine.mean, theirs.mean)
                np.testing.assert_array_equal(mine.var, theirs.var)
    assert read.state.weights.lambdas == {"bn1": 0.3, "gn": 1.0, "bn2": 0.0}
    assert "lambda" not in read.to_json()["sites"][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda": 0.5}, "damaged recipe .*lambda.* without target"),
        ({"lambda": 1.5, "target": "good"}, r"lambda = 1.5 at 'a' is out of range; it must lie in \[0, 1\]"),
        ({"lambda": "0.5", "target": "good"}, "lambda of 'a' is '0.5'"),
        ({"lambda": 0.5, "target": "infinite"}, "damaged recipe .*means or variances that are not"),
        ({"lambda": 0.5, "target": "negative"}, "damaged recipe .*means or variances that are not"),
        ({"lambda": 0.5, "target": "unlike"}, "damaged recipe .*means or variances that are not"),
        ({"calibrated": {"mean": "AAAA", "var": "AAAA"}}, "damaged recipe"),
        ({"calibrated": {"mean": "!"}}, "damaged recipe"),
        ({"calibrated": {}}, "damaged recipe"),
        ({"slope": 4.5}, r"slope = 4.5 at 'a' is out of range; it must lie in \[-4, 4\]"),
        ({"var_offset": -8.5}, r"var_offset = -8.5 at 'a' is out of range; it must lie in \[-8, 8\]"),
        ({"var_offset": True}, "var_offset of 'a' is True"),
        ({"slope": "0.5"}, "slope of 'a' is '0.5'"),
        ({"gamma": 1}, "damaged recipe .*a norm layer has 'gamma'"),
    ],
)
def test_refuses_moments_that_make_no_sense(change, message):
    wrong = {
        "good": (np.zeros(2), np.ones(2)),
        "infinite": (np.full(2, np.inf), np.ones(2)),
        "negative": (np.zeros(2), -np.ones(2)),
        "unlike": (np.zeros(3), np.ones(2)),
    }
    if isinstance(key := change.get("target"), str):
        parts = (base64.b64encode(part.astype("<f4").tobytes()).decode() for part in wrong[key])
        change = change | {"target": dict(zip(("mean", "var"), parts, strict=True))}
    norm_layer = {"name": "a", "kind": "b", "alpha": 0.1, "fingerprint": ""}
    Recipe.from_json({"format": 1, "provenance": {}, "sites": [norm_layer]})
    with pytest.raises(BnpatchError, match=message):
        Recipe.from_json({"format": 1, "provenance": {}, "sites": [norm_layer | change]})


def test_statistics_of_another_size_are_refused_and_change_nothing():
    """One value for all channels would be broadcast."""
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(4)).eval()
    model = bnpatch.load(module, preprocessing={"img_size": 8})
    good = model.state.with_re_estimated({"0": Moments(np.zeros(4), np.ones(4))})
    (layer,) = model.recipe(good.with_weights(PatchWeights({"0": 0.2}, {"0": 0.5}))).norm_layers
    model.apply(Recipe((layer,)))
    assert model.alphas() == {"0": 0.2}
    short = replace(layer, alpha=0.7, re_estimated=Moments(np.zeros(1), np.ones(1)))
    with pytest.raises(BnpatchError, match=r"'0' has 4 channels, its statistics have the shape \(1,\)"):
        model.apply(Recipe((short,)))
    assert model.alphas() == {"0": 0.2}
