"""Data: files that vanish while they are read, data sets by name, groups, and settings of one's own."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.limits import UNPACKED_MB
from bnpatch.data.corruptions import augmented, corrupted
from bnpatch.data.groups import group_by, warn_of_shared_groups
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.trainer import train
from tests.remedies.test_training import SETTINGS
from tests.remedies.test_warnings import tiny
from tests.remedies.world import SIDE, X, Y, case, cases, followed, loaded, opened, warned


@case("cannot read .*/b: a folder that can't be listed", "make it readable, or leave out --strict")
def test_a_folder_that_cannot_be_listed(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")

    def follow(_):
        opened(data, strict=True)
        with_locked(data / "b", lambda: opened(data))

    return lambda: with_locked(data / "b", lambda: opened(data, strict=True)), follow


@case("cannot read the folder .*: .*denied", "check the path")
def test_a_root_that_cannot_be_listed(w):
    data, other = (w.images("a/1.png", "b/1.png", "c/1.png", root=root) for root in ("data", "other"))
    return lambda: with_locked(data, lambda: opened(data)), lambda _: opened(other)


def with_locked(folder, use):
    """Use data of which a folder may not be listed; also for root, whom the system lets do everything."""
    right = os.scandir

    def scandir(path):
        if os.fspath(path) == os.fspath(folder):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return right(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        use()


def by_synset(w, *names, class_map=None):
    """Open folders that are named as ImageNet's classes are."""
    data = w.images(*(f"{name}/1.png" for name in names))
    return bnpatch.open_examples(data, tiny(1000), class_map=class_map).targets.tolist()


@case(
    "has the class n00000000, which is not among the model's 1000", "name the right classes with --class-map"
)
def test_a_synset_that_imagenet_has_not(w):
    ours = ["n00000000", *(f"n0000000{number}" for number in range(1, 10))]
    others = [f"other {number}" for number in range(990)]

    def follow(_):
        path = w.file("classes.txt", "\n".join([*ours, *others]))
        assert by_synset(w, *ours, class_map=path) == list(range(10))

    return lambda: by_synset(w, *ours), follow


@case("cannot read the class map", "write one class folder a line, in the order of the outputs")
def test_a_class_map_of_damaged_json(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")

    def follow(_):
        assert sorted(opened(data, class_map=w.file("names.txt", "a\nb\nc\n")).targets) == [0, 1, 2]

    return lambda: opened(data, class_map=w.file("names.json", '["a", "b"')), follow


class Mixed(torch.utils.data.Dataset):
    """A data set that gives bytes first, and floating-point values for some images."""

    def __init__(self, *kinds):
        self.kinds = kinds

    def __len__(self):
        return len(self.kinds)

    def __getitem__(self, index):
        if self.kinds[index] == "file":
            return Image.new("RGB", (SIDE, SIDE), (index, 90, 120)), index % 3
        return X[index], index % 3


def seen(view, *kinds):
    examples = bnpatch.open_examples(Mixed(*kinds), loaded())
    next(view(examples).batches(len(kinds)))


VIEWS = {
    "augmented": lambda examples: augmented(examples, "noise"),
    "corrupted": lambda examples: corrupted(examples, "fog", 1, seed=0),
}


@cases(VIEWS)
def test_some_images_as_floats(name):
    followed(
        lambda: seen(VIEWS[name], "file", "file", "float"),
        f"inputs of torch.float32 can't be {name}",
        "give images as bytes or files",
        lambda _: seen(VIEWS[name], "file", "file", "file"),
    )


@case("x.npy unpacks to .* MB more than the file", "set the environment variable")
def test_an_archive_that_unpacks_to_much(w):
    many = np.zeros((600, 3, SIDE, SIDE), np.uint8)
    np.savez_compressed(w.folder / "data.npz", x=many, y=np.arange(600) % 3)

    def read(megabytes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(UNPACKED_MB.name, megabytes)
            opened(w.folder / "data.npz")

    def follow(remedy):
        assert UNPACKED_MB.name in remedy
        read("1")

    return lambda: read("0.01"), follow


@case("cannot open the data set torch/cifar10", "check --data-root and --split, .* is downloaded")
def test_a_data_set_by_name(w):
    w.images(*(f"train/{name}/1.png" for name in "abc"), root="known")
    name = "torch/image_folder"

    def follow(_):
        assert len(opened(name, data_root=w.folder / "known", split_name="train")) == 3

    return lambda: opened("torch/cifar10", data_root=w.folder / "none"), follow


@case("no image of a batch can be read: .*", "look at the files")
def test_files_that_vanish_in_training(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")

    def trained(meanwhile=lambda: None):
        model = loaded()
        examples = RunExamples(*(bnpatch.open_examples(part, model) for part in (data, (X, Y))))
        meanwhile()
        train(model, examples, SETTINGS)

    def vanish():
        data.rename(w.folder / "elsewhere")

    def follow(_):
        (w.folder / "elsewhere").rename(data)
        trained()

    return lambda: trained(vanish), follow


def groups_of(*names):
    """Images to learn from and to judge by, in groups."""
    model = loaded()
    sources = [bnpatch.open_examples((X[:3], Y[:3]), model).source for _ in names]
    for source, some in zip(sources, names, strict=True):
        source.name = some.__getitem__
    warn_of_shared_groups(group_by("([a-z]+)"), *sources)


def test_groups_on_both_sides():
    warned(
        lambda: groups_of(["ann1", "ann2", "ben1"], ["ben2", "cy1", "cy2"]),
        "1 group, such as 'ben', both in the data to learn from .* divide them by group",
        lambda: groups_of(["ann1", "ann2", "ann3"], ["ben2", "cy1", "cy2"]),
    )
