"""Torch data sets and others that can be indexed: what their examples are, and how they number classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning


@pytest.fixture
def pictures(foggy):
    return [np.kron(image, np.ones((2, 3), np.uint8)) for image in foggy[0][:6]]


def bytes_of(data, model, **options):
    return next(bnpatch.open_examples(data, model, **options).batches(6)).x


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        torch.from_numpy,
        lambda image: image[..., None],
        lambda image: torch.from_numpy(image)[None],
        lambda image: np.stack([image] * 3, 2),
        lambda image: torch.from_numpy(np.stack([image] * 3)),
        lambda image: image.astype(np.uint16) * 257,
    ],
    ids=["array", "tensor", "channel last", "channel first", "colors last", "colors first", "16 bits"],
)
def test_bytes_are_images_as_in_an_array(model, pictures, make):
    """Of any size: they are resized and cropped as images in files are."""
    expected = bytes_of([(Image.fromarray(image), 0) for image in pictures], model)
    assert expected.shape == (6, 1, 32, 32)
    assert torch.equal(bytes_of([(make(image), 0) for image in pictures], model), expected)


def test_floats_in_an_array_are_inputs_as_they_are(model):
    x = np.random.default_rng(0).normal(size=(6, 1, 32, 32)).astype(np.float32)
    data = bnpatch.open_examples([(part, 1) for part in x], model)
    assert data.as_they_are
    assert torch.equal(next(data.batches(6)).x, torch.from_numpy(x))


def test_integers_of_no_image_are_said(model):
    data = bnpatch.open_examples([(np.zeros((9, 9), np.int64), 1)] * 3, model)
    with pytest.raises(BnpatchError, match=r"an image of int64 and shape \(9, 9\), not of bytes"):
        data.readable(np.arange(3))


@pytest.mark.parametrize("keys", [("image", "label"), ("img", "fine_label"), ("pixel_values", "labels")])
def test_examples_and_batches_may_be_dictionaries(model, pictures, keys):
    examples = [dict(zip(keys, (Image.fromarray(x), n), strict=True)) for n, x in enumerate(pictures)]
    data = bnpatch.open_examples([{**example, "id": 7} for example in examples], model)
    assert data.targets.tolist() == list(range(6))
    assert torch.equal(next(data.batches(6)).x, bytes_of([(e[keys[0]], 0) for e in examples], model))
    floats = [{keys[0]: torch.full((1, 32, 32), float(n)), keys[1]: n} for n in range(6)]
    data = bnpatch.open_examples(DataLoader(floats, batch_size=4), model)
    assert data.targets.tolist() == list(range(6))
    alone = bnpatch.open_examples([{keys[0]: e[keys[0]]} for e in examples], model, labels="optional")
    assert not alone.labelled.any()


def folders(place, *names):
    for name in names:
        (place / name).mkdir()
        Image.new("L", (8, 8)).save(place / name / "0.png")
    return place


def test_the_names_of_a_data_set_decide_its_classes(model, tmp_path):
    """A data set numbers the folders that it has, which may be few of the model's classes."""
    model.class_names = ("pig", "cow", "bee", "ant", *"efghij")
    data = ImageFolder(folders(tmp_path, "ant", "cow", "pig"))
    for source, expected in ((data, [3, 1, 0]), (Subset(data, [2, 1]), [0, 1])):
        with pytest.warns(BnpatchWarning, match="'ant' is 0 there, and output 3 here.: the names decide"):
            assert bnpatch.open_examples(source, model).targets.tolist() == expected


def test_a_data_set_of_some_of_imagenets_classes(tmp_path):
    class Spread(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] * torch.arange(1000.0)

    data = ImageFolder(folders(tmp_path, "n01440764", "n03000684"))
    with pytest.warns(BnpatchWarning, match="'n03000684' is 1 there, and output 491 here"):
        assert bnpatch.open_examples(data, bnpatch.load(Spread())).targets.tolist() == [0, 491]


class Named:
    """Examples with the names of classes as Hugging Face has them, or as torchvision has."""

    def __init__(self, names, **attributes):
        label = type("ClassLabel", (), {"names": names})()
        self.__dict__.update({"names": names, "features": {"image": None, "label": label}, **attributes})

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"image": Image.new("L", (8, 8)), "label": index}


def test_names_of_hugging_face(model):
    model.class_names = tuple("abcdefghij")
    with pytest.warns(BnpatchWarning, match="the names decide"):
        assert bnpatch.open_examples(Named(["c", "a"]), model).targets.tolist() == [2, 0]


@pytest.mark.parametrize(
    "data",
    [
        Named(["a", "b"]),
        Named(["c", "x"]),  # not all are the model's
        Named(["c", "c"]),
        Named(["c", "a"], target_transform=lambda target: target),  # may make them the model's
        Named(["c", "a"], class_to_idx={"a": 0, "b": 1}),
    ],
)
def test_targets_stay_where_names_do_not_say_otherwise(model, data):
    model.class_names = tuple("abcdefghij")
    assert bnpatch.open_examples(data, model).targets.tolist() == [0, 1]


class Damaged(list):
    """Examples of which some can't be read, as a random split of a folder may have them."""

    def __getitem__(self, index):
        if (item := super().__getitem__(index)) is None:
            raise OSError("image file is truncated")
        return item


@pytest.mark.parametrize("damaged", [{0}, {2}, {0, 3}])
def test_damaged_examples_are_left_out_also_where_the_targets_are_read(model, pictures, damaged):
    pairs = [(Image.fromarray(x), n) for n, x in enumerate(pictures)]
    data = bnpatch.open_examples(Damaged(None if n in damaged else p for n, p in enumerate(pairs)), model)
    (batch,) = data.batches(6)
    assert batch.targets.tolist() == [n for n in range(6) if n not in damaged]
    assert torch.equal(batch.x, bytes_of(pairs, model)[batch.targets])
    assert data.skipped == dict.fromkeys(damaged, "OSError: OSError: image file is truncated")
    alone = Damaged(None if n in damaged else pair[:1] for n, pair in enumerate(pairs))
    alone = bnpatch.open_examples(alone, model, labels="optional")
    assert sum(len(batch.indices) for batch in alone.batches(6)) == 6 - len(damaged)


def test_a_data_set_of_which_nothing_can_be_read_is_said(model):
    data = bnpatch.open_examples(Damaged([None] * 3), model, labels="optional")
    with pytest.raises(BnpatchError, match=r"none of the images can be read, example 0 .* truncated"):
        data.readable(np.arange(3))


def test_images_that_are_not_decoded_yet(model, pictures, tmp_path):
    """As Hugging Face's data sets give them if asked not to decode."""
    Image.fromarray(pictures[0]).save(path := tmp_path / "a.png")
    forms = {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}, path.read_bytes()
    expected = bytes_of([(Image.fromarray(pictures[0]), 0)] * 3, model)
    assert torch.equal(bytes_of([{"image": form, "label": 1} for form in forms], model), expected)
