"""Statistics and weights of an ONNX model are those of the torch model."""

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.models.export import export_onnx
from bnpatch.models.running_stats import calibrate, re_estimate_statistics
from tests.models.onnx_graph import graph, opened
from tests.models.test_running_stats import DATA, INPUTS, group_norm, small
from tests.nn.norms import images


@pytest.fixture(scope="module")
def exported_small(tmp_path_factory):
    """Of a kind of norm: a torch model of test_calibration, and its export, which is made once."""
    folder = tmp_path_factory.mktemp("small")

    def of(norm):
        file = folder / f"{norm.__name__}.onnx"
        if not file.exists():
            export_onnx(bnpatch.load(small(norm)), file, INPUTS[:2])
        return bnpatch.load(small(norm)), bnpatch.load(file)

    return of


def assert_same_moments(found, expected):
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        # float32
        np.testing.assert_allclose(found[name].mean, moments.mean, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[name].var, moments.var, rtol=1e-4, atol=1e-5, err_msg=name)


SETTINGS = [(0.0, 0.5), (0.0, 1.0), (0.2, 0.0), (0.2, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize("norm", [pytest.param(torch.nn.BatchNorm2d, marks=pytest.mark.slow), group_norm])
def test_re_estimated_statistics_and_every_setting_agree_with_torch(norm, exported_small):
    models = exported_small(norm)
    assert models[0].fingerprints() == models[1].fingerprints()
    assert models[0].uncalibrated() == models[1].uncalibrated()
    found = []
    for model in models:
        calibrate(model, INPUTS, batch_size=16)
        found.append(re_estimate_statistics(model, bnpatch.open_examples(DATA, model), batch_size=13))
    assert_same_moments(*found[::-1])
    if norm is group_norm:
        used = models[0].statistics_in_use()
        running = {name: Moments(*(p.numpy() for p in (m.mean, m.var))) for name, m in used.items()}
        assert_same_moments(models[1].statistics_in_use(), running)
        models[1].set_running(running)  # from now on exactly the same
    for model in models:
        model.set_state(model.state.with_re_estimated(found[0]))
    for alpha, weight in SETTINGS:
        expected, got = (
            set_and_predict(model, dict.fromkeys(found[0], alpha), dict.fromkeys(found[0], weight))
            for model in models
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32 through four norms
    names = list(found[0])
    mixed = dict(zip(names, (0.1, 0.0, 1.0), strict=True)), dict(zip(names, (0.0, 0.6, 0.3), strict=True))
    expected, got = (set_and_predict(model, *mixed) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # likewise


def set_and_predict(model, alphas, lambdas):
    model.set_weights(PatchWeights(alphas, lambdas))
    return model.predict(INPUTS)


def test_observed_moments_agree_with_torch(exported_small):
    torch_model, onnx_model = exported_small(torch.nn.BatchNorm2d)
    for alpha in (0.0, 0.3):
        torch_model.set_alphas(alpha)
        onnx_model.set_alphas(alpha)
        (y, seen), (y2, seen2) = (model.observe(INPUTS) for model in (torch_model, onnx_model))
        torch.testing.assert_close(y2, y, rtol=1e-4, atol=1e-4)  # float32
        assert seen2["norm2"].mean.shape == (2 * len(INPUTS), 8)
        assert_same_moments(seen2, seen)


def test_observed_moments_keep_their_digits_far_from_zero(tmp_path):
    rng = np.random.default_rng(0)
    model = opened(tmp_path, graph(["n", 3, 8, 8]))
    kernel = model.graph.graph.initializers["w"].const_value.numpy()
    x = (1e4 + rng.normal(size=(4, 3, 8, 8))).astype(np.float32)
    _, seen = model.observe(torch.from_numpy(x))
    values = np.einsum("nihw,oi->nohw", x.astype(np.float64), kernel[:, :, 0, 0].astype(np.float64))
    # The convolution itself rounds 1e4 to 1e-3, a thousandth of the standard deviation.
    np.testing.assert_allclose(seen["bn"].var, values.var((2, 3)), rtol=1e-2)


def test_lambda_zero_is_the_file_as_it_is_and_a_refused_setting_changes_nothing(exported_small):
    _, model = exported_small(torch.nn.BatchNorm2d)
    before = model.predict(INPUTS)
    model.set_state(
        model.state.with_re_estimated(re_estimate_statistics(model, bnpatch.open_examples(DATA, model)))
    )
    names = dict.fromkeys(model.alphas(), 0.0)
    model.set_weights(PatchWeights(names, dict.fromkeys(names, 1.0)))
    assert not torch.equal(model.predict(INPUTS), before)
    model.set_weights(PatchWeights(names, names))
    assert torch.equal(model.predict(INPUTS), before)
    for wrong in (PatchWeights({"norm1": 0.5}, {"nope": 0.0}), PatchWeights({"norm1": 0.5}, {"norm1": 1.5})):
        with pytest.raises(BnpatchError, match=r"no norm layer 'nope'|lambda = 1.5"):
            model.set_weights(wrong)
    assert model.weights == PatchWeights(names, names, names, names)


@pytest.mark.slow
def test_calibration_keeps_the_weights_of_other_sites(tmp_path):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.gn = torch.nn.BatchNorm2d(3), torch.nn.GroupNorm(3, 3)

        def forward(self, x):
            return self.gn(self.bn(x)).relu().mean((2, 3))

    export_onnx(Mixed().eval(), tmp_path / "mixed.onnx", INPUTS[:2])
    models = bnpatch.load(Mixed()), bnpatch.load(tmp_path / "mixed.onnx")
    for model in models:
        model.set_alphas({"bn": 0.2})
        calibrate(model, INPUTS)
        assert model.alphas() == {"bn": 0.2, "gn": 1.0}
        model.set_alphas({"gn": 0.5})
        model.set_running({"gn": Moments(np.zeros(3), np.ones(3))})
        assert model.alphas() == {"bn": 0.2, "gn": 0.5}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_filled_up_with_real_examples(tmp_path, batch):
    """Moments by batch are those of whole batches; repeating one example would pull them to it."""
    model = opened(tmp_path, graph([batch, 3, 8, 8]))
    x = images(7, 3, 8, 8)
    expected = opened(tmp_path, graph(["n", 3, 8, 8]))
    torch.testing.assert_close(model.predict(x), expected.predict(x))
    found = model.moments_by_batch(x)
    filled = torch.cat([x, x[:2]]) if batch == 3 else x
    reference = expected.moments_by_batch(filled)  # the input of its one norm does not depend on any
    assert_same_moments(found, reference)


def test_recipes_pass_from_torch_to_onnx_and_back(exported_small):
    torch_model, onnx_model = exported_small(group_norm)
    calibrate(torch_model, INPUTS)
    shifted = (2 * INPUTS, DATA[1])
    torch_model.set_state(
        torch_model.state.with_re_estimated(
            re_estimate_statistics(torch_model, bnpatch.open_examples(shifted, torch_model))
        )
    )
    torch_model.set_weights(
        PatchWeights({"norm1": 0.6, "norm2": 1.0, "norm3": 0.3}, {"norm1": 0.4, "norm2": 0.9, "norm3": 0.0})
    )
    recipe = torch_model.recipe()
    onnx_model.apply(recipe)
    torch.testing.assert_close(onnx_model.predict(INPUTS), torch_model.predict(INPUTS), rtol=1e-4, atol=1e-4)
    back = onnx_model.recipe().to_json()
    for theirs, own in zip(back["sites"], recipe.to_json()["sites"], strict=True):
        assert theirs | {"kind": ""} == own | {"kind": ""}  # GroupNormalization and GroupNorm


def test_moments_of_sites_in_branches_are_missing(tmp_path):
    from tests.onnx.build import batch_norm, in_if, parameters

    model = opened(tmp_path, in_if(batch_norm(), parameters()))
    x = images(2, 6, 5, 4)
    assert model.moments_by_batch(x) == {}
    assert model.observe(x)[1] == {}
    model.set_alphas(0.2)
    assert model.predict(x).shape == (2, 6, 5, 4)
