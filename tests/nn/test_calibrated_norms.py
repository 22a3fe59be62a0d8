import copy
import importlib

import pytest
import timm.layers
import torch
from timm.layers import norm_act
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import calibrated, inventory, patch, uncalibrated, unpatch
from tests import reference
from tests.nn.norms import images, moments

CALIBRATED = {
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), 4),
    "GroupNorm without affine": (lambda: nn.GroupNorm(2, 8, affine=False), 4),
    "timm GroupNorm": (lambda: timm.layers.GroupNorm(8, 2), 4),
    "GroupNorm1": (lambda: timm.layers.GroupNorm1(8), 8),
    "GroupNormAct": (lambda: norm_act.GroupNormAct(8, 2, drop_layer=nn.Hardtanh), 4),
    "GroupNorm1Act": (lambda: norm_act.GroupNorm1Act(8), 8),
    "GroupNorm1NoBias": (lambda: importlib.import_module("timm.models.metaformer").GroupNorm1NoBias(8), 8),
    "BatchNorm2d without running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), 1),
}


@pytest.mark.parametrize("case", CALIBRATED)
def test_calibrated_norms_are_sites(case):
    make, channels_per_group = CALIBRATED[case]
    norm = make().eval()
    if norm.weight is not None:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    model, x = nn.Sequential(nn.Identity(), norm), images(2, 8, 4, 4)
    before, keys, state = model(x), list(model.state_dict()), vars(norm).keys()
    assert list(uncalibrated(model)) == ["1"]
    assert not inventory(model).norm_layers
    running = moments()
    calibrated(model, {"1": running})
    assert not uncalibrated(model)
    (norm_layer,) = inventory(model).norm_layers
    is_batch_norm = isinstance(norm, nn.BatchNorm2d)
    assert (norm_layer.name, norm_layer.kind, norm_layer.alpha) == (
        "1",
        type(norm).__name__,
        0.0 if is_batch_norm else 1.0,
    )
    assert norm_layer.num_channels == 8
    assert norm_layer.baseline_alpha == norm_layer.alpha
    assert list(model.state_dict()) == keys
    if not is_batch_norm:  # which has no identity that is free of the batch
        assert torch.equal(model(x), before)
    bare = copy.deepcopy(model[1])
    tail = [bare._modules.pop(name, nn.Identity()) for name in ("drop", "act")]
    for alpha in (0.0, 0.4):
        patch(model, alpha)
        patch(nn.Sequential(bare), alpha)
        weight, bias, *_ = (None if p is None else p.detach() for p in bare.parameters_of_norm())
        weight, bias = (p if p is not None else torch.full((8,), v) for p, v in ((weight, 1.0), (bias, 0.0)))
        expected = reference.weighted_norm(
            x, running.mean, running.var, weight, bias, norm.eps, alpha, channels_per_group
        )
        y = bare(x)
        # float32
        torch.testing.assert_close(y.double().detach(), torch.from_numpy(expected), rtol=0, atol=2e-5)
        assert torch.equal(nn.Sequential(*tail)(y), model(x))  # what followed the norm still follows it
    model = unpatch(model)
    assert type(model[1]) is type(make())
    assert torch.equal(model(x), before)
    assert vars(model[1]).keys() == state


def test_only_norms_that_wait_for_it_are_calibrated():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    assert list(uncalibrated(model)) == ["1"]
    for name in ("0", "nope"):
        with pytest.raises(BnpatchError, match=f"no norm '{name}' to calibrate"):
            calibrated(model, {"1": moments(), name: moments()})
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.GroupNorm]
    calibrated(model, {"1": moments()})
    assert [norm_layer.name for norm_layer in inventory(model).norm_layers] == ["0", "1"]


def test_a_root_that_is_group_norm_is_returned():
    root = calibrated(nn.GroupNorm(2, 8), {"": moments()})
    assert isinstance(root, ExampleWeightedNorm)
    assert type(unpatch(root)) is nn.GroupNorm
