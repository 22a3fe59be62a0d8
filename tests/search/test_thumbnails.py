import numpy as np
import torch

import bnpatch
from bnpatch.search.held_out import Verdict
from bnpatch.search.thumbnails import MOST, SIDE, Samples, drawn, small


def examples_of(x):
    """Inputs (N, C, 8, 8) as a data set, bytes or floats."""
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(x.shape[1]), torch.nn.Flatten(), torch.nn.Linear(x[0].size, 3)
    )
    model.pretrained_cfg = {"input_size": x.shape[1:], "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    images = x if x.dtype == np.float32 else x[:, 0]
    return bnpatch.open_examples((images, np.arange(len(x)) % 3), bnpatch.load(model.eval()))


def verdict_of(target, before, after, indices):
    classes = np.array([target, before, after])
    sure = np.stack([np.arange(len(target)) / 100, 1 - np.arange(len(target)) / 100])
    return Verdict([], changed=1, classes=classes, indices=np.array(indices), confidences=sure)


def test_samples_are_those_whose_answers_changed():
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    examples, indices = examples_of(x), np.arange(40)[::-2]
    target = indices % 3
    before, after = target.copy(), target.copy()
    before[[1, 4, 6]] += 1
    after[[2, 6]] += 1
    found = drawn(verdict_of(target, before, after, indices), examples)
    assert [sample.name for sample in found.gained] == [examples.source.name(indices[at]) for at in (1, 4)]
    assert [sample.name for sample in found.lost] == [examples.source.name(indices[2])]
    assert found.gained[1].answers == (target[4] + 1, target[4])
    assert found.gained[1].confidences == (0.04, 0.96)
    assert (found.lost[0].pixels == x[indices[2], 0]).all()
    assert len({sample.name for sample in found.inputs}) == len(found.inputs) == MOST
    assert not found.stretched
    other = drawn(verdict_of(target, before, after, indices), examples, seed=1)
    assert [sample.name for sample in other.inputs] != [sample.name for sample in found.inputs]


def test_without_labels_there_are_inputs_alone():
    x = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    found = drawn(Verdict([], indices=np.arange(9)), examples_of(x))
    assert (len(found.inputs), len(found.gained), len(found.lost)) == (MOST, 0, 0)
    assert found.stretched
    assert {(int(s.pixels.min()), int(s.pixels.max()), s.pixels.shape) for s in found.inputs} == {
        (0, 255, (8, 8, 3))
    }
    assert found.inputs[0].target is None


def test_what_is_no_picture_has_none():
    x = np.zeros((9, 4, 8, 8), dtype=np.float32)
    assert drawn(Verdict([], indices=np.arange(9)), examples_of(x)) == Samples()


def test_a_picture_that_is_gone_costs_no_search():
    x = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    examples = examples_of(x)

    def gone(*args):
        raise bnpatch.BnpatchError("cannot read it", "remove it")

    examples.batches = gone
    assert drawn(Verdict([], indices=np.arange(9)), examples) == Samples()


def test_pictures_are_small_and_keep_their_shape():
    assert small(torch.zeros(3, 224, 112, dtype=torch.uint8)).shape == (SIDE, SIDE // 2, 3)
    assert small(torch.zeros(1, 5, 7)).shape == (5, 7)  # and floats without any contrast have no trouble
