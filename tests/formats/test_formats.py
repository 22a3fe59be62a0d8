"""Files that earlier versions wrote load, and mean what they meant.

``v0_1`` was written by version 0.1, as of the last commit before the layers got their names: a checkpoint of
timm's test_efficientnet with made-up weights, a recipe for it with alphas everywhere and lambdas at three
norm layers, the patched checkpoint and the patched ONNX file, a small module that could only be pickled, and
what the patched models returned for three inputs.
"""

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

import bnpatch

FILES = Path(__file__).parent / "v0_1"
# Outputs are of the order of 1 to 10; other machines round otherwise, through 13 norm layers.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def unpacked(tmp_path):
    for path in FILES.glob("*.xz"):
        (tmp_path / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return tmp_path


@pytest.fixture
def inputs():
    return torch.from_numpy(np.load(FILES / "outputs.npz")["x"]).float()


@pytest.fixture
def outputs():
    return np.load(FILES / "outputs.npz")["y"]


@pytest.mark.parametrize("name", ["patched.pt", "patched.onnx"])
def test_patched_files_compute_what_they_did(unpacked, inputs, outputs, name):
    model = bnpatch.load(unpacked / name)
    np.testing.assert_allclose(model.predict(inputs).numpy(), outputs, **TOLERANCE)
    assert model.preprocessing.mean == (0.5,)
    assert model.class_names == ("a", "b")


def test_a_recipe_means_what_it_did(unpacked, inputs, outputs):
    model = bnpatch.load(unpacked / "plain.pt")
    assert np.abs(model.predict(inputs).numpy() - outputs).max() > 0.1  # the recipe changes something
    recipe = bnpatch.Recipe.load(FILES / "recipe.json")
    model.apply(recipe)
    np.testing.assert_allclose(model.predict(inputs).numpy(), outputs, **TOLERANCE)
    assert model.recipe(provenance=recipe.provenance).to_json() == recipe.to_json()


def test_a_pickled_module_computes_what_it_did(unpacked, inputs):
    model = bnpatch.load(unpacked / "pickled.pt", unsafe_load=True)
    np.testing.assert_allclose(
        model.predict(inputs).numpy(), np.load(FILES / "pickled.npz")["y"], **TOLERANCE
    )
    assert model.weights.alphas == {"1": 0.3, "4": 0.8}
    assert model.weights.lambdas["1"] == 0.5


def test_earlier_names_are_importable():
    for old, new in (("ExampleWeighedNorm", "ExampleWeightedNorm"), ("survey", "inventory")):
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(bnpatch, old) is getattr(bnpatch, new)
