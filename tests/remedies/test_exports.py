"""Exports, programs and ONNX files that a recipe does not fit; slow where torch exports."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.models import export
from bnpatch.models.load import load
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import bn_model, example, from_proto
from tests.onnx.rewritten import group_norm_model, other_moments
from tests.remedies.world import SIDE, X, cases, followed, loaded, onnx_file

STATISTICS = Moments(X.new_zeros(6), X.new_ones(6))


def graph(w, proto=None):
    return load(onnx_file(w, proto or bn_model(x=("n", 6, SIDE, SIDE))))


def written(w, deviation=None):
    """Write a patched graph that deviates, as a defect of bnpatch would make it."""
    model, path = graph(w), w.folder / "patched.onnx"
    model.set_alphas(0.3)
    with pytest.MonkeyPatch.context() as patch:
        if deviation is not None:
            patch.setattr(export, "_deviation", lambda *_: (deviation, deviation))
        bnpatch.export_onnx(model, path)


def reported(w):
    """There is an architecture to report, and no file."""
    assert not (w.folder / "patched.onnx").exists()
    assert graph(w).inventory().norm_layers


def pooling(model):
    """A recipe of a model, after training in which norms pool pairs of channels."""
    model.set_alphas(0.3)
    recipe = model.recipe()
    layers = tuple(replace(layer, channels_per_group=2) for layer in recipe.norm_layers)
    return replace(recipe, norm_layers=layers)


def exported_with(w, recipe):
    model = loaded()
    model.apply(recipe)
    assert bnpatch.export_onnx(model, w.folder / "out.onnx").patched == ("norm",)


def group_norm(running=None, alpha=0.3):
    rewrite(from_proto(group_norm_model()), PatchWeights({"bn": alpha} if alpha else {}), running=running)


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Straight(nn.Sequential):
    def forward(self, x):
        return super().forward(torch.where(x.mean() > 0, x, -x))


def patched(kind):
    torch.manual_seed(0)
    layers = kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)).eval()
    layers(X)
    model = load(layers, preprocessing={"img_size": SIDE})
    model.set_alphas(0.3)
    return model


def in_python(w):
    """Apply the recipe in Python, where there is no export."""
    recipe = patched(Branching).recipe()
    module = patched(Branching)
    module.set_alphas(0.0)
    module.apply(recipe)
    assert set(module.alphas().values()) == {0.3}


def program(w, damaged):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval()
    torch.export.save(torch.export.export(layers, (X,)), path := w.folder / "model.pt2")
    if damaged:
        path.write_bytes(path.read_bytes()[:1000])
    load(path)


CASES = {
    "a defect of an export": (
        lambda w: written(w, 0.5),
        "deviates by 0.5 of the largest value, more than rounding",
        "report it with the model's architecture; no file was written",
        reported,
    ),
    "running statistics of an unknown norm": (
        lambda w: graph(w, group_norm_model()).set_running({"nrm": STATISTICS}),
        "model has no norm 'nrm' to calibrate",
        "calibrate it again",
        lambda w: bnpatch.calibrate(graph(w, group_norm_model()), torch.from_numpy(example(4, 6, 5, 4))),
    ),
    "a recipe that pools": (
        lambda w: graph(w).apply(pooling(graph(w))),
        "the recipe pools channels at 'bn', of which an ONNX file knows nothing",
        "export the torch checkpoint with the recipe",
        lambda w: exported_with(w, pooling(loaded())),
    ),
    "Group Norm without running statistics": (
        lambda w: group_norm(),
        "'bn' .* has no running statistics",
        "estimate them on data, or leave it out",
        lambda w: [group_norm({"bn": other_moments()}), group_norm(alpha=None)],
    ),
    "a module that torch can't export": (
        lambda w: bnpatch.export_onnx(patched(Branching), w.folder / "out.onnx"),
        "torch can't export the model",
        "make its forward exportable with torch.export, or apply the recipe in Python",
        lambda w: [bnpatch.export_onnx(patched(Straight), w.folder / "out.onnx"), in_python(w)],
    ),
    "a damaged program": (
        lambda w: program(w, damaged=True),
        "model.pt2 is damaged or not a torch.export program",
        "export it again",
        lambda w: program(w, damaged=False),
    ),
}
SLOW = ("a recipe that pools", "a module that torch can't export", "a damaged program")


@pytest.mark.filterwarnings("ignore")
@cases(CASES, slow=SLOW)
def test_exports(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))
