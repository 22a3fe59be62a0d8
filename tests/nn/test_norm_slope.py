import pytest
import torch
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.nn.functional import weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.nn.norms import batch_norm, parameters, running, sample


def test_the_slope_is_data_like_alpha(monkeypatch):
    """It changes nothing at the baseline; 0 is not even computed; and it leaves with the layer."""
    x = sample((3, 6, 4, 4), torch.float32)
    bn = batch_norm(6)
    plain, layer = bn(x), ExampleWeightedNorm.take_over(bn, 0.0, slope=0.7)
    assert torch.equal(layer(x), plain)
    layer.alpha = 0.2
    sloped = layer(x)
    layer.slope = 0.0
    with monkeypatch.context() as patching:
        patching.setattr("bnpatch.core.moments._log", None)
        constant = layer(x)
        layer.alpha, layer.slope = 1.0, 0.7
        layer(x)
        layer.alpha = 0.2
    assert (sloped - constant).abs().max() > 0.01
    layer.slope = 0.7
    assert layer.double().slope == 0.7
    assert "slope=0.7" in repr(layer)
    assert vars(layer.give_back()).keys() == vars(batch_norm(6)).keys()


@pytest.mark.parametrize("slope", [-2.0, 0.7])
def test_group_norm_computes_what_it_did_whatever_the_slope(slope):
    gn, x = nn.GroupNorm(2, 6).eval(), sample((3, 6, 4, 4), torch.float32)
    before = gn(x)
    layer = ExampleWeightedNorm.take_over(
        gn, 1.0, baseline_alpha=1.0, channels_per_group=3, running=running(dtype=torch.float32), slope=slope
    )
    assert torch.equal(layer(x), before)
    layer.alpha = 0.9
    assert (layer(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_slope_changes_a_weight_of_zero_or_one(alpha):
    x, (mean, var, weight, bias) = sample((3, 6, 4, 4), torch.float32), parameters(6, torch.float32)
    y = [
        weighted_norm(x, Moments(mean, var), weight, bias, 1e-5, torch.tensor(alpha), 1, slope)
        for slope in (0.0, torch.tensor(3.0), torch.tensor(-3.0))
    ]
    assert torch.equal(y[1], y[0])
    assert torch.equal(y[2], y[0])


@pytest.mark.parametrize("slope", [-4.1, 5, float("nan"), float("inf")])
def test_a_slope_has_bounds(slope):
    with pytest.raises(BnpatchError, match=r"slope = .* is too steep; it must lie in \[-4, 4\]"):
        ExampleWeightedNorm.take_over(batch_norm(6), 0.1, slope=slope)


def test_a_layer_that_was_pickled_under_former_names_without_a_slope_has_none():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.2)
    x, state = sample((2, 6, 4, 4), torch.float32), dict(vars(layer))
    del state["_slope"], state["_is_constant"]
    state |= {"weigh_single_values": state.pop("include_1x1"), "identity": state.pop("baseline_alpha")}
    state["_is_identity"] = state.pop("_is_baseline")
    copied = ExampleWeightedNorm.__new__(ExampleWeightedNorm)
    copied.__setstate__(state)
    assert copied.slope == 0.0
    assert torch.equal(copied(x), layer(x))
