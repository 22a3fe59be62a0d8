"""Statistics from data: running ones of norms that have none, and re-estimated ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchWeights
from bnpatch.models.running_stats import calibrate, re_estimate_statistics
from tests.models.small import DATA, INPUTS, assert_unchanged, group_norm, opened, small, snapshot
from tests.nn.norms import images


@pytest.fixture(autouse=True)
def _seeded():
    """Models that are made without a seed of their own are the same in every run."""
    torch.manual_seed(0)


def inputs_of(module, name, x):
    """All values (N * S, C) that a norm is given, in float64, over all of its uses."""
    seen = []
    layer = dict(module.named_modules())[name]
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    module(x)
    handle.remove()
    return np.concatenate([v.detach().double().movedim(1, -1).reshape(-1, v.shape[1]).numpy() for v in seen])


def assert_moments(moments, values, rtol=2e-5):  # float32 statistics of some thousand values
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(moments.var, values.var(0), rtol=rtol)


def test_group_norm_gets_the_moments_of_its_input():
    model, examples = opened(small(group_norm))
    expected = {name: inputs_of(model.module, name, INPUTS) for name in ("norm1", "norm2", "norm3")}
    before = model.predict(INPUTS)
    done = []
    assert calibrate(model, examples, batch_size=16, on_batch=done.append) == ("norm1", "norm2", "norm3")
    assert sum(done) == len(INPUTS)
    for name, values in expected.items():
        assert_moments(model.statistics_in_use()[name], values)
    assert torch.equal(model.predict(INPUTS), before)
    assert set(model.alphas().values()) == {1.0}
    assert model.baseline_alphas() == model.alphas()
    assert calibrate(model, examples) == ()


def test_the_split_into_batches_changes_rounding_only():
    found = []
    for size in (1, 7, 40):
        model, examples = opened(small(group_norm))
        calibrate(model, examples, batch_size=size)
        found.append(model.statistics_in_use())
    for name, moments in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name].mean, moments.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other[name].var, moments.var, rtol=1e-5, atol=0)


def test_weights_that_are_set_do_not_change_what_is_found():
    found = []
    for alpha in (0.0, 0.8):
        torch.manual_seed(0)
        module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.GroupNorm(1, 3), nn.Flatten()).eval()
        bnpatch.patch(module, alpha)
        bnpatch.calibrate(module, INPUTS)
        assert [norm_layer.alpha for norm_layer in bnpatch.inventory(module).norm_layers] == [alpha, 1.0]
        found.append(module[2].running)
    assert torch.equal(found[0].mean, found[1].mean)


def test_only_the_images_named_are_taken():
    model, examples = opened(small(group_norm))
    values = inputs_of(model.module, "norm1", INPUTS[5:12])
    calibrate(model, examples, indices=np.arange(5, 12))
    assert_moments(model.statistics_in_use()["norm1"], values)


def test_a_mean_far_from_zero_costs_no_digits():
    module = nn.Sequential(nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = 1000 + images(30, 4, 8, 8)
    bnpatch.calibrate(module, x)
    expected = x.double().movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(module[0].running.mean.double(), expected.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        module[0].running.var.double(), expected.var(0, correction=0), rtol=1e-4, atol=0
    )


def test_half_precision_models_have_statistics_in_float32():
    module = nn.Sequential(nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().half()
    x = (300 + 20 * images(30, 4, 8, 8)).half()  # 300^2 is past the largest float16
    bnpatch.calibrate(module, x)
    assert module[0].running.mean.dtype == torch.float32
    expected = x.double().movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(
        module[0].running.var.double(), expected.var(0, correction=0), rtol=1e-4, atol=0
    )
    bnpatch.patch(module, 0.5)
    assert torch.isfinite(module(x)).all()


def test_a_module_of_ones_own_is_calibrated_and_patched():
    module = small(group_norm)
    before = module(INPUTS)
    with pytest.raises(
        BnpatchError, match=r"no running statistics: norm1, norm2, norm3; .*bnpatch\.calibrate"
    ):
        bnpatch.patch(module, 0.9)
    assert bnpatch.calibrate(module, INPUTS) == ("norm1", "norm2", "norm3")
    assert torch.equal(module(INPUTS), before)
    bnpatch.patch(module, 0.9)
    assert not torch.equal(module(INPUTS), before)
    again = bnpatch.load(module)  # knows what was found
    found = again.statistics_in_use()
    again.set_alphas(again.baseline_alphas())
    again.set_weights(PatchWeights(lambdas=dict.fromkeys(found, 0.0)))
    assert torch.equal(module(INPUTS), before)
    assert torch.equal(again.statistics_in_use()["norm1"].mean, found["norm1"].mean)
    bnpatch.unpatch(module)
    assert type(module.norm1) is nn.GroupNorm


def test_what_can_not_be_calibrated():
    with pytest.raises(BnpatchError, match="itself a norm"):
        bnpatch.calibrate(nn.GroupNorm(2, 4), images(3, 4, 8, 8))
    assert bnpatch.calibrate(small(), INPUTS) == ()
    model, examples = opened(small(group_norm))
    with pytest.raises(BnpatchError, match="no example could be read"):
        calibrate(model, examples, indices=np.array([], np.int64))
    with pytest.raises(BnpatchError, match="no norm 'nope'"):
        model.set_running({"nope": Moments(np.zeros(8), np.ones(8))})


def test_it_stops_when_the_moments_have_settled():
    """Independent values: the standard error of the mean of n examples of S values is 1 / sqrt(n S)."""
    x = torch.randn(400, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    taken = {}
    for tolerance in (None, 0.03, 0.06, 1e-9):
        module = nn.Sequential(nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        done = []
        bnpatch.calibrate(module, x, batch_size=10, tolerance=tolerance, on_batch=done.append)
        taken[tolerance] = sum(done)
    assert taken[None] == taken[1e-9] == 400
    assert 10 < taken[0.06] < 40  # 1 / sqrt(17 * 16) is 0.06
    assert 50 < taken[0.03] < 100  # 1 / sqrt(69 * 16) is 0.03


def test_batch_norm_without_running_moments():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Flatten()
    ).eval()
    values = inputs_of(module, "1", INPUTS)
    assert bnpatch.calibrate(module, INPUTS) == ("1",)
    assert_moments(module[1].running, values)
    assert bnpatch.inventory(module).norm_layers[0].baseline_alpha == 0.0
    together = module(INPUTS)
    alone = torch.cat([module(x[None]) for x in INPUTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # free of the batch now
    bnpatch.unpatch(module)
    assert module[1].running_mean is None


def test_re_estimated_statistics_of_the_first_norm_are_those_of_all_values():
    model, examples = opened(small())
    before = snapshot(model)
    values = inputs_of(model.module, "norm1", INPUTS)
    for size in (7, 13, 40):
        found = re_estimate_statistics(model, examples, batch_size=size)
        assert_moments(found["norm1"], values)
    assert_unchanged(model, before)


def test_re_estimated_statistics_of_one_batch_are_those_of_a_training_pass():
    """That of nn.BatchNorm with momentum=None, whose variance is the unbiased one."""
    model, examples = opened(small())
    found = re_estimate_statistics(model, examples)
    trained = copy.deepcopy(model.module).train()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    trained(INPUTS)
    for name, count in (("norm1", 40 * 64), ("norm3", 40)):
        norm = getattr(trained, name)
        np.testing.assert_allclose(found[name].mean, norm.running_mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[name].var, norm.running_var * (count - 1) / count, rtol=1e-3)
    # Used twice: the average of both means, and of both variances and what lies between the means.
    values = inputs_of(trained, "norm2", INPUTS)
    np.testing.assert_allclose(found["norm2"].mean, trained.norm2.running_mean, rtol=1e-4, atol=1e-4)
    assert_moments(found["norm2"], values, rtol=1e-3)


def test_re_estimated_statistics_see_the_model_as_it_came():
    """Weights that are set do not change what is estimated."""
    model, examples = opened(small())
    plain = re_estimate_statistics(model, examples)
    model.set_state(model.state.with_re_estimated(plain))
    model.set_weights(PatchWeights(dict.fromkeys(model.alphas(), 0.3), dict.fromkeys(model.alphas(), 0.5)))
    before = snapshot(model)
    weighed = re_estimate_statistics(model, examples)
    assert_unchanged(model, before)
    for name, moments in plain.items():
        np.testing.assert_array_equal(weighed[name].mean, moments.mean)


def test_group_norm_has_re_estimated_statistics_once_it_is_a_site():
    model, examples = opened(small(group_norm))
    assert statistics_or_none(model, examples) is None
    calibrate(model, examples)
    source = model.statistics_in_use()
    found = re_estimate_statistics(model, bnpatch.open_examples((2 * INPUTS, DATA[1]), model))
    assert_moments(found["norm1"], inputs_of(model.module, "norm1", 2 * INPUTS))
    model.set_state(model.state.with_re_estimated(found))
    model.set_weights(PatchWeights(dict.fromkeys(found, 0.6), {"norm1": 0.4}))
    expected = mix(0.4, found["norm1"], Moments(source["norm1"].mean.numpy(), source["norm1"].var.numpy()))
    np.testing.assert_allclose(model.statistics_in_use()["norm1"].var, expected.var, rtol=1e-5)  # float32
    model.set_weights(PatchWeights(lambdas={"norm1": 0.0}))
    assert torch.equal(model.statistics_in_use()["norm1"].mean, source["norm1"].mean)


def statistics_or_none(model, examples):
    with pytest.raises(BnpatchError, match=r"no running statistics"):
        return re_estimate_statistics(model, examples)
    return None


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
@pytest.mark.parametrize("work", [calibrate, re_estimate_statistics])
@pytest.mark.parametrize("training", [True, False])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(norm, work, training):
    model, examples = opened(small(norm).train(training))
    if norm is group_norm and work is re_estimate_statistics:
        calibrate(model, examples)
        model.set_alphas(0.4)
    before = snapshot(model)

    def stumble(module, args):
        if len(seen) > 1:
            raise RuntimeError("out of luck")
        seen.append(args)

    seen = []
    handle = model.module.norm3.register_forward_pre_hook(stumble)
    if work is calibrate and norm is nn.BatchNorm2d:
        assert calibrate(model, examples, batch_size=10) == ()
    else:
        with pytest.raises(BnpatchError, match="out of luck"):
            work(model, examples, batch_size=10)
    handle.remove()
    assert_unchanged(model, before)


def test_observing_returns_moments_through_which_gradients_flow():
    model, _ = opened(small())
    model.set_alphas(0.3)
    alpha = torch.tensor(0.3, requires_grad=True)
    model.module.norm1.alpha = alpha
    _, seen = model.observe(INPUTS, gradients=True)
    assert seen["norm2"].mean.shape == (2 * len(INPUTS), 8)  # used twice
    assert seen["norm3"].var.eq(0).all()  # one value per channel
    (seen["norm2"].mean.sum() + seen["norm2"].var.sum()).backward()
    assert alpha.grad != 0
