"""Groups of examples: where they come from, splits that keep them together, and near-copies that nobody named."""

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.dataset import folds, others, split
from bnpatch.data.groups import cut, group_by, number_groups, shuffled
from bnpatch.data.near_copies import Sketches
from bnpatch.search.parts import parts_of
from bnpatch.search.score_cache import blocks_of
from tests.search.tiny import small


class Names:
    """A source that has names alone."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]


FILES = Names(["cat/a/1.png", "cat/a/2.png", "cat/b/1.png", "dog/a/3.png", "dog/4.png", "dog/5.png"])


def test_groups_are_numbered_in_the_order_of_their_appearance():
    assert number_groups(["x", "y", "x", 3, None, None], FILES).tolist() == [0, 1, 0, 2, 3, 4]
    assert number_groups(np.array([5, 5, 2, 2, 7, 7]), FILES).tolist() == [0, 0, 1, 1, 2, 2]
    assert number_groups(lambda name: name[-5], FILES).tolist() == [0, 1, 0, 2, 3, 4]


def test_labels_that_make_no_groups_are_refused():
    with pytest.raises(BnpatchError, match="2 group labels for 6 examples"):
        number_groups(["x", "y"], FILES)
    with pytest.raises(BnpatchError, match="one example each"):
        number_groups(range(6), FILES)


def test_group_by_the_folder_below_the_class_folder():
    # Folders of one name are one group, and a file in no such folder is a group of its own.
    assert number_groups(group_by("parent"), FILES).tolist() == [0, 0, 1, 0, 2, 3]


def test_group_by_a_regular_expression():
    assert number_groups(group_by(r"(\w+)/"), FILES).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(BnpatchError, match="finds nothing in dog/4.png"):
        number_groups(group_by(r"/(\w+)/"), FILES)
    with pytest.raises(BnpatchError, match="no parentheses"):
        group_by("cat")
    with pytest.raises(BnpatchError, match="no regular expression"):
        group_by("(")


def test_group_by_a_table(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("name,group\n" + "\n".join(f"{name},p{name[-5]}" for name in FILES.names))
    assert number_groups(group_by(str(path)), FILES).tolist() == [0, 1, 0, 2, 3, 4]
    path.write_text("cat/a/1.png,p1\n")
    with pytest.raises(BnpatchError, match=r"has no group for cat/a/2.png"):
        number_groups(group_by(str(path)), FILES)
    path.write_text("cat/a/1.png;p1\n")
    with pytest.raises(BnpatchError, match="name,group"):
        group_by(str(path))
    with pytest.raises(BnpatchError, match="cannot read"):
        group_by(str(tmp_path / "none.csv"))


def grouped(count=300, seed=0):
    """Strata and groups: groups of 1 to 9 examples, each of one of three classes."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 10, count))[:count]
    return (groups % 3).astype(np.int64), groups


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_split_keeps_groups_together_and_classes_balanced(fraction):
    strata, groups = grouped()
    tuning, held_out = split(strata, fraction, 0, groups)
    assert sorted([*tuning, *held_out]) == list(range(len(strata)))
    assert not set(groups[tuning]) & set(groups[held_out])
    for kind in range(3):
        # No class is off by more than one group, which is the last that was dealt, or the largest.
        assert abs(np.sum(strata[held_out] == kind) - fraction * np.sum(strata == kind)) <= 9
    assert split(strata, fraction, 0, groups)[1].tolist() == held_out.tolist()
    assert split(strata, fraction, 1, groups)[1].tolist() != held_out.tolist()


def test_folds_keep_groups_together():
    strata, groups = grouped()
    parts = folds(strata, 5, 0, groups)
    assert sorted(np.concatenate(parts)) == list(range(len(strata)))
    assert sum(len(set(groups[part])) for part in parts) == len(set(groups))
    assert max(map(len, parts)) - min(map(len, parts)) <= 3 * 9
    with pytest.raises(BnpatchError, match="2 groups can't be held out in 5 folds"):
        folds(strata[:10], 5, 0, np.repeat([0, 1], 5))


def test_an_unlabelled_example_of_a_held_out_group_is_on_neither_side():
    strata, groups = np.array([0, 0, -1, 1, 1, -1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    tuning, held_out = split(strata, 0.5, 0, groups)
    assert not set(groups[tuning]) & set(groups[held_out])
    assert (strata[held_out] >= 0).all()
    assert others(np.array([0, 1]), 10, groups).tolist() == list(range(3, 10))


def test_without_groups_splits_are_as_ever():
    strata, _ = grouped()
    assert others(np.array([2, 5]), 8).tolist() == [0, 1, 3, 4, 6, 7]
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    order = shuffled(np.arange(100), None, rng)
    assert order.tolist() == same.permutation(100).tolist()
    assert [len(block) for block in blocks_of(order, 1)] == [9] * 4 + [8] * 8
    assert [len(block) for block in blocks_of(order, 30)] == [34, 33, 33]


@pytest.mark.parametrize("set_size", [1, 30])
def test_blocks_are_of_whole_groups(set_size):
    _, groups = grouped()
    order = shuffled(np.arange(0, 300, 2), groups, np.random.default_rng(0))
    blocks = blocks_of(order, set_size, groups)
    assert len(blocks) > 3
    assert sorted(np.concatenate(blocks)) == list(range(0, 300, 2))
    assert sum(len(set(groups[block])) for block in blocks) == len(set(groups[order]))


def test_two_groups_make_two_blocks():
    groups = np.repeat([0, 1], [2, 9])
    assert [len(block) for block in blocks_of(np.arange(11), 1, groups)] == [2, 9]
    assert [len(part) for part in cut(np.arange(11), [1, 2, 3], groups)] == [2, 9]


def opened(tiny, plain, groups):
    return bnpatch.open_examples(plain, tiny, groups=groups)


def test_few_groups_take_turns_and_two_sides_need_two_groups_each(tiny, plain):
    examples = opened(tiny, plain, np.arange(600) % 100)
    parts = parts_of(examples, None, None, 0, True)
    assert len(parts) == 5  # 600 examples would be split in halves, but they are 100 groups
    for tuning, held_out in parts:
        assert not set(examples.groups[tuning]) & set(examples.groups[held_out])
    with pytest.raises(BnpatchError, match="two or more"):
        parts_of(opened(tiny, plain, np.arange(600) % 3), None, None, 0, True)


def test_a_limit_keeps_the_groups_of_what_it_keeps(tiny, plain):
    labels = np.arange(600) // 5
    examples = bnpatch.open_examples(plain, tiny, groups=labels.tolist(), limit=100)
    names = [int(examples.source.name(index).split()[-1]) for index in range(100)]
    assert examples.groups.tolist() == labels[names].tolist()


def sketched(images):
    sketches = Sketches()
    for index, image in enumerate(images):
        sketches.add(index, torch.as_tensor(image))
    return sketches.num_groups()


def test_digits_are_no_near_copies_of_each_other():
    from sklearn.datasets import load_digits

    digits = (load_digits().images * 15.9).astype(np.uint8)[:, None]
    assert sketched(digits) is None
    assert sketched(127 + digits // 10) is None  # nor with little contrast


def test_frames_are_found_in_spite_of_noise_and_light(plain):
    rng = np.random.default_rng(0)
    frames = np.repeat(plain[0][:100, None].astype(float), 5, axis=0)
    light = np.tile([1.0, 0.9, 0.8, 0.95, 0.85], 100)[:, None, None, None]
    frames = (frames * light + rng.normal(0, 4, frames.shape)).clip(0, 255).astype(np.uint8)
    assert sketched(frames) == pytest.approx(100, rel=0.1)
    assert sketched(frames[::5]) is None  # one of each
    assert sketched(np.full((50, 3, 16, 16), 7, np.uint8)) == 1


def test_of_many_images_some_are_compared(monkeypatch, plain):
    monkeypatch.setattr("bnpatch.data.near_copies._COUNTED", 50)
    assert sketched(np.repeat(plain[0][:100, None], 5, axis=0)) == 100
    assert sketched(plain[0][:500, None]) is None


@pytest.mark.parametrize("floats", [False, True])
def test_near_copies_give_a_warning_unless_groups_are_named(tiny, plain, floats):
    images, labels = (np.repeat(part[:40], 5, axis=0) for part in plain)
    images = images[:, None] / np.float32(255) if floats else images
    examples = bnpatch.open_examples((images, labels), tiny)
    bnpatch.evaluate(tiny, examples)
    with pytest.warns(BnpatchWarning, match=r"of 200 images many .* about 40 groups.*--group-by"):
        examples.warn_of_near_copies()
    named = bnpatch.open_examples((images, labels), tiny, groups=np.arange(200) // 5)
    bnpatch.evaluate(tiny, named)
    assert named.warn_of_near_copies() == ""


def test_looking_for_near_copies_reads_nothing_again(tiny, plain, tmp_path, monkeypatch):
    for index in range(40):
        (tmp_path / str(index % 10)).mkdir(exist_ok=True)
        Image.fromarray(small(np.kron(plain[0][index][None], np.ones((4, 4), np.uint8)))[0]).save(
            tmp_path / str(index % 10) / f"{index}.png"
        )
    examples = bnpatch.open_examples(tmp_path, tiny, cache_gb=0)
    bnpatch.evaluate(tiny, examples)
    monkeypatch.setattr(examples.source, "read", None)
    assert examples.warn_of_near_copies() == ""
    assert len(examples.sketches.of) == 40
