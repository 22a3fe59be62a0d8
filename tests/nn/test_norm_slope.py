import pytest
import torch
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.nn.functional import weighted_norm
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.nn.norms import batch_norm, parameters, running, sample


@pytest.mark.parametrize(("kind", "function"), [("slope", "_log"), ("var_offset", "_exp")])
def test_slope_and_offset_are_data_like_alpha(monkeypatch, kind, function):
    """They change nothing at the baseline; 0 is not even computed; and they leave with the layer."""
    x = sample((3, 6, 4, 4), torch.float32)
    bn = batch_norm(6)
    plain, layer = bn(x), ExampleWeightedNorm.take_over(bn, ExampleWeight(0.0, **{kind: 0.7}))
    assert torch.equal(layer(x), plain)
    layer.alpha = 0.2
    changed = layer(x)
    setattr(layer, kind, 0.0)
    with monkeypatch.context() as patching:
        patching.setattr(f"bnpatch.core.moments.{function}", None)
        constant = layer(x)
        layer.set_weights(**{"alpha": 1.0, kind: 0.7})
        layer(x)
        layer.alpha = 0.2
    assert (changed - constant).abs().max() > 0.01
    setattr(layer, kind, 0.7)
    assert getattr(layer.double(), kind) == 0.7
    assert f"{kind}=0.7" in repr(layer)
    assert vars(layer.give_back()).keys() == vars(batch_norm(6)).keys()


@pytest.mark.parametrize("beside", [{"slope": -2.0}, {"slope": 0.7, "var_offset": -3.0}])
def test_group_norm_computes_what_it_did_whatever_slope_and_offset(beside):
    gn, x = nn.GroupNorm(2, 6).eval(), sample((3, 6, 4, 4), torch.float32)
    before = gn(x)
    layer = ExampleWeightedNorm.take_over(
        gn,
        ExampleWeight(1.0, **beside),
        baseline_alpha=1.0,
        channels_per_group=3,
        running=running(dtype=torch.float32),
    )
    assert torch.equal(layer(x), before)
    layer.alpha = 0.9
    assert (layer(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_slope_and_no_offset_changes_a_weight_of_zero_or_one(alpha):
    x, (mean, var, weight, bias) = sample((3, 6, 4, 4), torch.float32), parameters(6, torch.float32)
    y = [
        weighted_norm(x, Moments(mean, var), weight, bias, 1e-5, ExampleWeight(torch.tensor(alpha), *beside))
        for beside in ((0.0, 0.0), torch.tensor([3.0, 8.0]), torch.tensor([-3.0, -8.0]))
    ]
    assert torch.equal(y[1], y[0])
    assert torch.equal(y[2], y[0])


@pytest.mark.parametrize(("kind", "most"), [("slope", 4), ("var_offset", 8)])
@pytest.mark.parametrize("factor", [-1.1, 1.1, float("nan"), float("inf")])
def test_slope_and_offset_have_bounds(kind, most, factor):
    with pytest.raises(BnpatchError, match=rf"{kind} = .* out of range; it must lie in \[-{most}, {most}\]"):
        ExampleWeightedNorm.take_over(batch_norm(6), ExampleWeight(0.1, **{kind: factor * most}))


def test_a_layer_that_was_pickled_under_former_names_without_a_slope_has_none():
    layer = ExampleWeightedNorm.take_over(batch_norm(6), 0.2)
    x, state = sample((2, 6, 4, 4), torch.float32), dict(vars(layer))
    del state["_slope"], state["_is_constant"], state["_var_offset"], state["_is_shared"]
    state |= {"weigh_single_values": state.pop("include_1x1"), "identity": state.pop("baseline_alpha")}
    state["_is_identity"] = state.pop("_is_baseline")
    copied = ExampleWeightedNorm.__new__(ExampleWeightedNorm)
    copied.__setstate__(state)
    assert copied.slope == 0.0
    assert torch.equal(copied(x), layer(x))
