"""Scores, corruptions and searches that can't go on, and what to do about it."""

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.data.corruptions import corrupted
from bnpatch.data.dataset import folds
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.data.standard_corruptions import corrupt, parse_standard_kinds
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.output_range import output_ranges
from bnpatch.evaluation.robustness_scores import CLEAN, ScoreFile
from bnpatch.models.load import load
from bnpatch.models.running_stats import calibrate
from bnpatch.nn.tracing import norm_paths
from tests.remedies.world import MANY, SIDE, X, Y, cases, followed, loaded, net, opened

BYTES = (X * 40 + 100).clip(0, 255).byte()
SMALL = {"granularity": "global", "trials": 1, "holdout": 0.5}
UNKNOWN = np.array([0, 1, 2, 0, 1, -1])
ERRORS = [np.zeros(6)]


def scores(data, **options):
    model = loaded()
    return evaluate(model, bnpatch.open_examples(data, model, labels="optional"), **options)


def damaged(w, use, content=b"\x89PNG"):
    """Use a folder of images that can't be read, or can."""
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    for path in data.rglob("*.png") if content else ():
        path.write_bytes(content)
    model = loaded(norm=nn.GroupNorm(2, 4)) if use is calibrate else loaded()
    use(model, bnpatch.open_examples(data, model))


def ranges(model, examples):
    output_ranges(model, examples, train_batch_size=2, batch_size=2)


def infinite(weight):
    module = net()
    nn.init.constant_(module.head.weight, weight)
    model = load(module, preprocessing={"img_size": SIDE})
    evaluate(model, bnpatch.open_examples((X, Y), model))


def kept_scores(
    w, fingerprint="one", indices=range(6), errors=ERRORS, fresh=False, damage=None, name="scores.npz"
):
    path = w.folder / name
    if fresh:
        path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    file = ScoreFile(path, {"model": fingerprint})
    file.add(CLEAN, np.array(indices), errors)


def of_another_run(w):
    kept_scores(w)
    kept_scores(w, "two")


def with_fewer_images(w):
    file = ScoreFile(w.folder / "scores.npz", {"model": "one"})
    file.add(CLEAN, np.arange(6), ERRORS)
    file.add(("fog", 1), np.arange(5), [np.zeros(5)])


def tuned(metric="accuracy", **options):
    return bnpatch.tune_alpha(loaded(), MANY, metric=metric, **{**SMALL, **options})


def squared(outputs, targets):
    return (outputs[:, 0] - targets.float()) ** 2


def nothing(outputs, targets):
    return torch.full((len(outputs),), float("nan"))


def in_groups(count):
    return [f"g{i * count // 60}" for i in range(60)]


def keep_by(groups):
    model = loaded()
    keep = bnpatch.open_examples(MANY, model, groups=groups)
    bnpatch.tune_alpha(model, MANY, keep=keep, margin=0.5, **SMALL)


def robust(w, recipe=False, severities=(1,)):
    model = loaded()
    if recipe:
        model.set_alphas(0.1)
    bnpatch.robustness(
        model,
        (BYTES, Y),
        recipe=model.recipe() if recipe is True else None,
        kinds=["fog"],
        severities=severities,
    )


CASES = {
    "no labels": (
        lambda w: scores((X, UNKNOWN)),
        "needs labels, and some examples have none",
        "give labelled examples",
        lambda w: scores((X, Y)),
    ),
    "images to evaluate": (
        lambda w: damaged(w, evaluate),
        "none of the images can be read",
        "look at the files",
        lambda w: damaged(w, evaluate, None),
    ),
    "images to observe": (
        lambda w: damaged(w, ranges),
        "none of the images can be read",
        "look at the files",
        lambda w: damaged(w, ranges, None),
    ),
    "images to calibrate on": (
        lambda w: damaged(w, calibrate),
        "no example could be read",
        "look at the files",
        lambda w: damaged(w, calibrate, None),
    ),
    "infinite outputs": (
        lambda w: infinite(3e38),
        "returns infinities or NaN",
        "check the weights and the preprocessing",
        lambda w: infinite(1.0),
    ),
    "floats to corrupt": (
        lambda w: corrupted(opened((X, Y)), "fog", 1, seed=0),
        "inputs that are floats can't be corrupted",
        "give images as bytes or files",
        lambda w: [
            corrupted(opened((BYTES, Y)), "fog", 1, seed=0),
            corrupted(opened(w.images("a/1.png", "b/1.png", "c/1.png")), "fog", 1, seed=0),
        ],
    ),
    "channels to corrupt": (
        lambda w: corrupt(np.zeros((4, 32, 32), np.uint8), "fog", 1, key=(0, 0)),
        "images of 4 channels can't be corrupted",
        "use a model that takes 1 or 3 channels",
        lambda w: [corrupt(np.zeros((n, 32, 32), np.uint8), "contrast", 1, key=(0, 0)) for n in (1, 3)],
    ),
    "no corruption": (
        lambda w: parse_standard_kinds(","),
        "no corruption is named",
        "choose from .*fog",
        lambda w: parse_standard_kinds("fog"),
    ),
    "a corruption twice": (
        lambda w: parse_standard_kinds("fog,fog"),
        "fog,fog has one twice",
        "choose from .*fog",
        lambda w: parse_standard_kinds("fog,snow"),
    ),
    "folds": (
        lambda w: folds(np.zeros(3, np.int64), 4, 0),
        "3 examples can't be held out in 4 folds",
        "choose 2 folds or more, or give more data",
        lambda w: [folds(np.zeros(3, np.int64), 2, 0), folds(np.zeros(4, np.int64), 4, 0)],
    ),
    "many channels": (
        lambda w: Preprocessing((10**6, 8, 8), (0.5,), (0.5,)),
        "an input of 1000000 channels is no image",
        "at most",
        lambda w: Preprocessing((12, 8, 8), (0.5,), (0.5,)),
    ),
    "a value of preprocessing": (
        lambda w: load(net(), preprocessing={"crop": 0.9}),
        "preprocessing has no value 'crop'",
        "choose .*crop_pct",
        lambda w: load(net(), preprocessing={"crop_pct": 0.9}),
    ),
    "scores of another run": (
        of_another_run,
        "keeps the scores of another run: model changed",
        "delete it, or choose another --output",
        lambda w: [kept_scores(w, "two", name="other.npz"), kept_scores(w, "two", fresh=True)],
    ),
    "damaged scores": (
        lambda w: kept_scores(w, damage=b"PK"),
        "has no scores that can be read",
        "delete it, or choose another --output",
        lambda w: [kept_scores(w, name="other.npz"), kept_scores(w, fresh=True)],
    ),
    "images that are gone": (
        with_fewer_images,
        "6 images could be read before, now 5",
        "start again with another --output",
        lambda w: kept_scores(w, indices=range(5), errors=[np.zeros(5)], name="other.npz"),
    ),
    "severity": (
        lambda w: robust(w, severities=(9,)),
        "there is no severity 9",
        "choose from 1,2,3,4,5",
        lambda w: robust(w, severities=(1, 5)),
    ),
    "a patched model and a recipe": (
        lambda w: robust(w, recipe=True),
        "is patched already",
        "leave out the recipe, or give the model as it was",
        lambda w: [robust(w, recipe="patched"), robust(w)],
    ),
    "answers to keep": (
        lambda w: tuned(squared, keep=MANY),
        "squared is not about classes, so answers to keep are unknown",
        "tune for one of accuracy.*, or leave out the images to keep",
        lambda w: [tuned(keep=MANY, margin=0.5), tuned(squared)],
    ),
    "few groups to keep": (
        lambda w: keep_by(in_groups(2)),
        "the images to keep are of too few groups",
        "give images of more groups, ten or more",
        lambda w: keep_by(in_groups(10)),
    ),
    "a metric without a number": (
        lambda w: tuned(nothing),
        "nothing is not a finite number",
        "look at the metric and the data",
        lambda w: tuned(squared),
    ),
    "paths": (
        lambda w: norm_paths(net(), torch.zeros(1, 3, 4, 4)),
        "the model does not run on an input of shape",
        "give an input that it takes",
        lambda w: norm_paths(net(), torch.zeros(1, 3, SIDE, SIDE)),
    ),
    "paths to no tensor": (
        lambda w: norm_paths(net(result=str), torch.zeros(1, 3, SIDE, SIDE)),
        "the model returns a str",
        "wrap it so that it returns a tensor",
        lambda w: norm_paths(net(), torch.zeros(1, 3, SIDE, SIDE)),
    ),
}
SLOW = (
    "answers to keep",
    "few groups to keep",
    "a metric without a number",
    "a patched model and a recipe",
    "severity",
)


@pytest.mark.filterwarnings("ignore")
@cases(CASES, slow=SLOW)
def test_evaluation(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))
