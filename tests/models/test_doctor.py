"""What the first norm layer says of preprocessing and shift, on digits and a classifier in closed form.

The classifier's running statistics are those of digits with mean 0.5 and std 0.5, so that the truth is known.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.models.distances import example_distances, first_shift, shifts
from bnpatch.models.doctor import (
    check_up,
    eps_distances,
    eps_finding,
    findings,
    usual_preprocessings,
    warn_of_preprocessing,
)

IMAGENET = {"mean": (0.449,), "std": (0.226,)}
UNIT = {"mean": (0.0,), "std": (1.0,)}
BYTES = {"mean": (0.0,), "std": (1 / 255,)}
TWICE = {"mean": (0.75,), "std": (0.25,)}


def loaded(checkpoint, **values):
    model = bnpatch.load(checkpoint)
    model.preprocessing = replace(model.preprocessing, **values)
    return model


def opened(model, images):
    return bnpatch.open_examples(images, model, labels="optional")


def checked(model, images):
    return check_up(model, opened(model, images))


def shifted(images, how):
    x = images.astype(float)
    noise = np.random.default_rng(0).normal(0, 64, x.shape)
    y = {
        "clean": x,
        "contrast x 0.25": 127.5 + 0.25 * (x - 127.5),
        "contrast x 0.5": 127.5 + 0.5 * (x - 127.5),
        "brightness x 0.35": 0.35 * x,
        "gamma 2": 255 * (x / 255) ** 2,
        "fog": 0.4 * x + 140,
        "noise": x + noise,
    }[how]
    return y.clip(0, 255).round().astype(np.uint8)


def test_the_right_preprocessing_fits(checkpoint, clean):
    found = checked(loaded(checkpoint), clean[0])
    assert found.own.distance < 0.05
    assert found.better is None
    assert found.warning() == ""
    assert not found.is_unusual
    assert "expect little" in found.outlook()
    assert found.byte_range == 1
    assert found.first.norm_layer == "conv1.1"


@pytest.mark.parametrize("wrong", [IMAGENET, UNIT, BYTES, TWICE])
def test_a_wrong_preprocessing_is_found_and_the_right_one_named(checkpoint, clean, wrong):
    model = loaded(checkpoint, **wrong)
    before = model.preprocessing
    found = checked(model, clean[0])
    assert found.better.name == "mean 0.5 and std 0.5"
    assert found.better.distance < 0.05
    assert found.is_sure
    assert "--mean 0.5 --std 0.5" in found.warning()
    assert "settle the preprocessing first" in found.outlook()
    assert model.preprocessing is before
    with pytest.warns(BnpatchWarning, match=r"mean 0\.5 and std 0\.5"):
        assert warn_of_preprocessing(model, opened(model, clean[0])) == found.warning()


def test_the_warning_takes_no_more_of_the_model_than_its_first_norm_layer(checkpoint, clean):
    model = loaded(checkpoint, **BYTES)
    examples = opened(model, clean[0])
    norms = [norm.module for norm in model.inventory().norm_layers]
    behind, whole = [], []
    norms[1].register_forward_hook(lambda *given: behind.append(given))
    model.module.register_forward_hook(lambda *given: whole.append(given))
    with pytest.warns(BnpatchWarning):
        warn_of_preprocessing(model, examples)
    which, far = example_distances(model, examples, np.arange(8))
    assert (len(which), len(far)) == (8, 8)
    assert not behind
    assert not whole
    first = shifts(model, torch.from_numpy(clean[0][:64])[:, None])[0]
    assert first_shift(model, torch.from_numpy(clean[0][:64])[:, None]) == (first,)
    assert behind


@pytest.mark.parametrize(
    "how", ["clean", "contrast x 0.25", "contrast x 0.5", "brightness x 0.35", "gamma 2", "fog", "noise"]
)
def test_a_shift_is_not_taken_for_a_wrong_preprocessing(checkpoint, clean, how):
    model = loaded(checkpoint)
    assert warn_of_preprocessing(model, opened(model, shifted(clean[0], how))) == ""


def test_a_shift_that_looks_like_another_preprocessing_is_named_as_either(checkpoint, clean):
    """Half the contrast is what a division by half the std undoes."""
    found = checked(loaded(checkpoint), shifted(clean[0], "contrast x 0.5"))
    assert found.better.name == "ImageNet's mean and std"
    assert not found.is_sure
    assert "or the images are shifted: their bytes span only 50% of the range" in found.warning()


def test_what_all_images_share_is_told_from_what_differs(checkpoint, clean):
    images = clean[0][:64]
    same = shifted(images, "contrast x 0.5")
    each = np.stack([shifted(x[None], ("contrast x 0.25", "clean")[n % 2])[0] for n, x in enumerate(images)])
    alike, mixed = (checked(loaded(checkpoint), x) for x in (same, each))
    assert alike.common_share > 0.8
    assert "all of them share" in alike.outlook()
    assert mixed.common_share < 0.6
    assert checked(loaded(checkpoint), images).common_share < 0.3


def test_an_onnx_file_is_checked_alike(exported, checkpoint, clean):
    ours, theirs = checked(bnpatch.load(exported), clean[0]), checked(loaded(checkpoint), clean[0])
    assert [fit.distance for fit in ours.fits] == pytest.approx(
        [f.distance for f in theirs.fits], rel=1e-3, abs=1e-4
    )


def test_a_patch_does_not_change_the_answer_and_stays(checkpoint, clean):
    model = loaded(checkpoint)
    before = checked(model, clean[0])
    model.set_alphas(0.3)
    assert checked(model, clean[0]) == before
    assert set(model.alphas().values()) == {0.3}


def test_floats_are_checked_without_other_preprocessings(checkpoint, clean):
    x = (clean[0][:64, None] / 127.5 - 1).astype(np.float32)
    found = checked(loaded(checkpoint), x)
    assert len(found.fits) == 1
    assert found.own.distance < 0.05
    assert found.byte_range is None
    assert not found.is_sure


def test_a_model_without_running_statistics_is_not_checked(clean):
    model = bnpatch.load(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(10)).eval()
    )
    model.preprocessing = replace(model.preprocessing, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    assert check_up(model, opened(model, clean[0])) is None
    assert findings(model) == []


def test_the_usual_preprocessings_leave_out_the_one_in_use(checkpoint):
    own = loaded(checkpoint).preprocessing
    names = list(usual_preprocessings(own))
    assert "mean 0.5 and std 0.5" not in names
    assert len(names) == 5
    twice = usual_preprocessings(own)["normalization done twice"]
    x = 0.3
    once = (x - 0.5) / 0.5
    assert (x - twice.mean[0]) / twice.std[0] == pytest.approx((once - 0.5) / 0.5)


def test_bad_running_statistics_are_named(checkpoint):
    model = bnpatch.load(checkpoint)
    assert findings(model) == []
    norms = dict(model.module.named_modules())
    with torch.no_grad():
        norms["bn1"].running_var[3] = 0
        norms["layer1.0.bn1"].reset_running_stats()
        norms["layer2.0.bn1"].running_var[0] = 1e9
    untouched, dead, huge = findings(model)
    assert "never updated at 1 of 15 norm layers (layer1.0.bn1)" in untouched
    assert "1 channels have a running variance of 0, at 1 of 15 norm layers (bn1)" in dead
    assert "exceed 1e+06 at 1 of 15 norm layers (layer2.0.bn1)" in huge


def test_a_lost_eps_is_found(clean):
    """Channels of small variance, whose later statistics were taken with TensorFlow's eps."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=1.0), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=1.0), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 28 * 28, 10))
    with torch.no_grad():
        net[0].weight.mul_(0.02)
        net(torch.from_numpy(clean[0])[:, None].float() / 127.5 - 1)
    model = bnpatch.load(net.eval())
    model.preprocessing = replace(
        model.preprocessing, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0
    )
    data = opened(model, clean[0])
    assert eps_distances(model, data) is None  # the eps is right
    for norm in (net[1], net[4]):
        norm.eps = 1e-5
    own, tensorflow = eps_distances(model, data)
    assert tensorflow < 0.6 * own
    assert "eps = 1e-3" in eps_finding(own, tensorflow)
    assert eps_finding(1.0, 0.9) == ""
    assert net[1].eps == 1e-5


def test_shifts_are_measured_at_every_norm_layer(checkpoint, clean):
    """Half the contrast is the same shift for the first norm and, through it, for all others."""
    model = loaded(checkpoint)
    images = clean[0][:64]
    x, half = (torch.from_numpy(part)[:, None] for part in (images, shifted(images, "contrast x 0.5")))
    as_trained, shared = shifts(model, x), shifts(model, half)
    assert [s.norm_layer for s in shared] == [norm.name for norm in model.inventory().norm_layers]
    assert shared[0].distance == pytest.approx(
        checked(model, shifted(images, "contrast x 0.5")).own.distance, rel=1e-3
    )
    assert all(a.distance < b.distance for a, b in zip(as_trained, shared, strict=True))
    assert shared[0].common_share > 0.9


def test_a_shift_that_only_a_later_layer_sees_is_seen(clean):
    """Pixels in another order have the same moments, and neighbors that differ."""
    images = clean[0][:64]
    blur = nn.Conv2d(1, 1, 3, bias=False)
    nn.init.ones_(blur.weight)
    norms = nn.BatchNorm2d(1, momentum=1.0), nn.BatchNorm2d(1, momentum=1.0)
    pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 10)
    module = nn.Sequential(norms[0], blur, norms[1], *pooled)
    module.train()(torch.from_numpy(images)[:, None] / 127.5 - 1)
    module.pretrained_cfg = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    model = bnpatch.load(module.eval())
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(images.reshape(64, -1), axis=1).reshape(images.shape)
    usual, found = (checked(model, x) for x in (images, shuffled))
    assert found.first.distance == pytest.approx(usual.first.distance, abs=1e-6)
    assert found.largest.norm_layer == "2"
    assert not usual.is_unusual
    assert "expect little" in usual.outlook()
    assert found.is_unusual
    assert "the images differ from those of training" in found.outlook()
