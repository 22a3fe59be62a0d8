import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.search.held_out import HeldOutEvaluation
from bnpatch.search.thumbnails import MOST, SIDE, Samples, drawn, small


def opened(x):
    """A model, and inputs (N, C, 8, 8), bytes or floats, as a data set for it."""
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(x.shape[1]), torch.nn.Flatten(), torch.nn.Linear(x[0].size, 3)
    )
    model.pretrained_cfg = {"input_size": x.shape[1:], "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    images = x if x.dtype == np.float32 else x[:, 0]
    loaded = bnpatch.load(model.eval())
    return loaded, bnpatch.open_examples((images, np.arange(len(x)) % 3), loaded)


def evaluation_of(target, before, after, indices):
    classes = np.array([target, before, after])
    sure = np.stack([np.arange(len(target)) / 100, 1 - np.arange(len(target)) / 100])
    return HeldOutEvaluation([], changed=1, classes=classes, indices=np.array(indices), confidences=sure)


def test_samples_are_those_whose_answers_changed():
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    (model, examples), indices = opened(x), np.arange(40)[::-2]
    target = indices % 3
    before, after = target.copy(), target.copy()
    before[[1, 4, 6]] += 1
    after[[2, 6]] += 1
    found = drawn(evaluation_of(target, before, after, indices), model, examples)
    assert [sample.name for sample in found.gained] == [examples.source.name(indices[at]) for at in (1, 4)]
    assert [sample.name for sample in found.lost] == [examples.source.name(indices[2])]
    assert found.gained[1].answers == (target[4] + 1, target[4])
    assert found.gained[1].confidences == (0.04, 0.96)
    assert (found.lost[0].pixels == x[indices[2], 0]).all()
    assert len({sample.name for sample in found.inputs}) == len(found.inputs) == MOST
    assert not found.stretched
    other = drawn(evaluation_of(target, before, after, indices), model, examples, seed=1)
    assert [sample.name for sample in other.inputs] != [sample.name for sample in found.inputs]


def test_classes_have_pictures_where_their_number_of_right_answers_changes():
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    model, examples = opened(x)
    indices = np.arange(40)
    target = indices % 3
    before, after = target.copy(), target.copy()
    before[[2, 8, 3]] += 1  # two of class 2 become right, one of class 0,
    after[[5, 6]] += 1  # and one of each becomes wrong, so that class 0 is where it was
    found = drawn(evaluation_of(target, before, after, indices), model, examples)
    names = {target: [sample.name for sample in some] for target, some in found.by_class.items()}
    assert names == {2: [examples.source.name(index) for index in (2, 5, 8)]}


def test_the_farthest_come_first():
    x = np.random.default_rng(0).normal(size=(30, 3, 8, 8)).astype(np.float32)
    x[[4, 17]] *= [[[[3]]], [[[9]]]]
    x[20] += 5
    model, examples = opened(x)
    found = drawn(HeldOutEvaluation([], indices=np.arange(30)[::-1]), model, examples)
    # Mean 0 and variance 1 are the running statistics of the only norm layer.
    mean, var = x.mean((2, 3)), x.var((2, 3))
    distances = ((mean**2 + np.log(var) ** 2) / 2).mean(1)
    order = np.argsort(-distances)[:MOST]
    assert [*order[:3]] == [20, 17, 4]
    assert [sample.name for sample in found.farthest] == [examples.source.name(index) for index in order]
    assert [s.distance for s in found.farthest] == pytest.approx(distances[order], rel=1e-3)  # eps is 1e-5
    assert found.num_measured == 30


def test_no_example_is_far_where_nothing_is_known_of_training():
    x = np.zeros((9, 3, 8, 8), dtype=np.float32)
    _, examples = opened(x)
    plain = bnpatch.load(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval())
    found = drawn(HeldOutEvaluation([], indices=np.arange(9)), plain, examples)
    assert (len(found.inputs), found.farthest, found.num_measured) == (MOST, [], 0)


def test_without_labels_there_are_no_answers():
    x = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    found = drawn(HeldOutEvaluation([], indices=np.arange(9)), *opened(x))
    assert (len(found.inputs), len(found.gained), len(found.lost)) == (MOST, 0, 0)
    assert found.stretched
    assert {(int(s.pixels.min()), int(s.pixels.max()), s.pixels.shape) for s in found.inputs} == {
        (0, 255, (8, 8, 3))
    }
    assert found.inputs[0].target is None


def test_what_is_no_picture_has_none():
    x = np.zeros((9, 4, 8, 8), dtype=np.float32)
    assert drawn(HeldOutEvaluation([], indices=np.arange(9)), *opened(x)) == Samples()


def test_a_picture_that_is_gone_costs_no_search():
    x = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    model, examples = opened(x)

    def gone(*args):
        raise bnpatch.BnpatchError("cannot read it", "remove it")

    examples.batches = gone
    assert drawn(HeldOutEvaluation([], indices=np.arange(9)), model, examples) == Samples()


def test_pictures_are_small_and_keep_their_shape():
    assert small(torch.zeros(3, 224, 112, dtype=torch.uint8)).shape == (SIDE, SIDE // 2, 3)
    assert small(torch.zeros(1, 5, 7)).shape == (5, 7)  # and floats without any contrast have no trouble
