"""Batch Norm that was fused into the convolutions of a file, and is found again."""

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.models.export import export_onnx
from tests.models.small import assert_close
from tests.nn.norms import images

LIKE_TRAINING = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}


@pytest.mark.slow
def test_folded_batch_norm_is_recovered(checkpoint, folded, digits, foggy):
    """Recovered on the images that the checkpoint was fitted to, it weighs examples as that does."""
    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    assert not model.inventory().norm_layers
    with pytest.raises(BnpatchError, match=r"fused into the convolutions.*--recover-fused"):
        bnpatch.tune_alpha(model, foggy)
    result = bnpatch.tune_alpha(model, foggy, granularity="global", recover_fused=True, calib_data=digits[0])
    assert not model.inventory().norm_layers  # left as it was
    model.apply(result.recipe)
    names = {norm_layer.name for norm_layer in model.inventory().norm_layers}
    assert result.recipe.alphas.keys() == names
    reference, x = bnpatch.load(checkpoint), torch.from_numpy(foggy[0][:100, None])
    assert len(names) == sum(shape != (1, 1) for shape in reference.norm_shapes().values()) == 12
    for alpha in (0.0, 0.2, 0.6):
        model.set_alphas(alpha)
        reference.set_alphas(alpha)
        # Running variances are unbiased and eps is in other places: at most 0.0007 of the largest output for
        # the first two seeds, where alpha = 0.2 moves outputs by 0.4 of it and more.
        assert_close(model.predict(x), reference.predict(x), 0.01 if alpha else 1e-4)


@pytest.mark.slow
def test_a_recovered_site_at_zero_is_the_convolution_that_it_was(folded, digits, tmp_path):
    from bnpatch.models.running_stats import recover_fused

    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    x = images(4, 1, 32, 32)
    before = model.predict(x)
    assert (
        recover_fused(model, bnpatch.open_examples(digits[0], model))
        == len(model.inventory().norm_layers)
        > 5
    )
    assert torch.equal(model.predict(x), before)
    first = model.inventory().norm_layers[0].name
    model.set_alphas({first: 1e-12})
    assert_close(model.predict(x), before)
    model.set_alphas({first: 0.2})
    done = export_onnx(model, tmp_path / "patched.onnx")
    assert done.patched == (first,)
    again = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    model.recipe().save(tmp_path / "recipe.json")
    again.apply(Recipe.load(tmp_path / "recipe.json"))
    assert_close(again.predict(x), model.predict(x), 1e-5)  # moments in 8 digits


@pytest.mark.slow
def test_calibration_does_not_depend_on_the_batch_size(folded, digits):
    from bnpatch.models.running_stats import recover_fused

    found = []
    for size in (7, 600):
        model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
        recover_fused(model, bnpatch.open_examples(digits[0], model), batch_size=size)
        found.append(model.state.running)
    for name, moments in found[0].items():
        np.testing.assert_allclose(moments.mean, found[1][name].mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.var, found[1][name].var, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_with_little_batch_norm_left_is_told_what_to_do(folded, exported):
    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    assert "--recover-fused" in model.notes[-1]
    assert "layer1.0.conv1" in model.fused_convs()
    assert not bnpatch.load(exported).notes
