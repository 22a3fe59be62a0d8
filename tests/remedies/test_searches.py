"""Searches that can't begin or go on: their metric, their limits, memory, files and images to keep."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.evaluation.metrics import CALIBRATION_ERROR
from bnpatch.models.load import load
from bnpatch.search.config import SearchConfig
from bnpatch.search.keep import KeepSet
from tests.remedies.world import SIDE, X, Y, cases, followed, loaded, net

MANY = (X.repeat(20, 1, 1, 1), np.tile(Y, 20))


def tuned(data=MANY, model=None, **options):
    options = {"granularity": "global", "trials": 1, "holdout": 0.5, **options}
    return bnpatch.tune_alpha(model or loaded(), data, **options)


def without_memory_for_gradients(**options):
    def backward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", backward)
        tuned(**options)


def without_labels(weight):
    module = net()
    nn.init.constant_(module.head.weight, weight)
    model = load(module, preprocessing={"img_size": SIDE})
    tuned((MANY[0], None), model, metric="unlabeled")


def of_files(w, meanwhile=lambda: None):
    """Search images in files, without a cache, while something happens to them."""
    names = [f"{'abc'[number % 3]}/{number}.png" for number in range(40)]
    data = w.images(*names)
    tuned(data, cache_gb=0.0, trials=4, on_trial=lambda *_: meanwhile())


def vanish(w):
    for path in w.folder.glob("data/a/*.png"):
        path.unlink()


def few_to_keep(count, margin, size):
    """What is said of so few images to keep, in groups of some size."""
    model = loaded()
    groups = None if size == 1 else [number // size for number in range(count)]
    examples = bnpatch.open_examples(
        (X.repeat(90, 1, 1, 1)[:count], np.tile(Y, 90)[:count]), model, groups=groups
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", BnpatchWarning)
        KeepSet(model, examples, margin)
    return next((str(each.message) for each in found if "images to keep" in str(each.message)), "")


@pytest.mark.parametrize(
    ("count", "margin", "size"), [(21, 0.05, 1), (10, 0.02, 1), (30, 0.1, 3), (20, 0.3, 5)]
)
def test_few_images_to_keep(count, margin, size):
    said = few_to_keep(count, margin, size)
    needed = re.search(
        r"too few to show .* at least ([\d,]+) are needed(?:, or a margin of ([\d.]+))?$", said
    )
    assert not few_to_keep(int(needed[1]), margin, size)
    assert size > 1 or few_to_keep(int(needed[1]) - 2, margin, size)
    if needed[2] is None:  # no margin of less than all of them is enough
        assert few_to_keep(count, 0.99, size)
    else:
        assert not few_to_keep(count, SearchConfig(margin=float(needed[2])).margin, size)


def interrupted(again):
    """Interrupt the search after its first trial, and perhaps the judging of what it found."""
    came = []

    def on_trial(trial, is_best):
        came.append(trial)
        raise KeyboardInterrupt

    def progress(label, done, total):
        if came and again:
            raise KeyboardInterrupt

    return tuned(on_trial=on_trial, progress=progress, trials=3)


@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_and_another():
    with pytest.warns(BnpatchWarning, match=r"interrupted: .* judged now \(interrupt again to end sooner\)"):
        assert interrupted(again=False).interrupted
    with pytest.warns(BnpatchWarning, match="interrupted"), pytest.raises(KeyboardInterrupt):
        interrupted(again=True)


CASES = {
    "a metric of sets": (
        lambda w: tuned(metric=CALIBRATION_ERROR),
        "has no scores of single examples",
        "choose another metric",
        lambda w: tuned(metric="accuracy"),
    ),
    "no end": (
        lambda w: tuned(trials=None, max_passes=math.inf),
        "nothing bounds the search",
        "set --trials, or a finite --max-passes",
        lambda w: [tuned(max_passes=math.inf), tuned(trials=None, max_passes=1)],
    ),
    "gradients without memory": (
        lambda w: without_memory_for_gradients(granularity="layer"),
        "has not enough memory for the gradients of one example",
        "choose --granularity global",
        lambda w: without_memory_for_gradients(),
    ),
    "infinite outputs": (
        lambda w: without_labels(3e38),
        "returns infinities or NaN",
        "check the weights and the preprocessing",
        lambda w: without_labels(0.1),
    ),
    "a file that vanishes": (
        lambda w: of_files(w, lambda: vanish(w)),
        r"a/\d+.png can't be read any more",
        "look at the file, and start again",
        lambda w: of_files(w),
    ),
}


@pytest.mark.filterwarnings("ignore")
@cases(CASES)
def test_searches(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))
