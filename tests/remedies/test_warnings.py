"""Warnings that name what else to do: it is done, and the warning does not come again."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import bnpatch
from bnpatch.evaluation.permutation import warn_if_permuted
from bnpatch.models.doctor import warn_of_preprocessing
from bnpatch.models.load import load
from tests.remedies.world import SIDE, X, Y, cases, loaded, net, warned


def tiny(count, names=None):
    """Open folders of a model with so many classes."""
    model = net()
    model.head = torch.nn.Linear(model.head.in_features, count)
    found = load(model, preprocessing={"img_size": SIDE})
    found.class_names = names
    return found


def folders(w, *names, class_names=None, text=None, outputs=None):
    data = w.images(*(f"{name}/1.png" for name in names), root="-".join(names))
    options = {} if text is None else {"class_map": w.file("classes.txt", text)}
    bnpatch.open_examples(data, tiny(outputs or len(names), class_names), **options)


def with_an_empty_folder(w, class_names=None, outputs=2, text=None):
    """Folders a and c with an image each, and b without any."""
    (w.folder / "a-c" / "b").mkdir(parents=True, exist_ok=True)
    folders(w, "a", "c", class_names=class_names, outputs=outputs, text=text)


def with_orientation(w, turned=False):
    """Images of which two are on their sides, unless somebody turned the files."""
    for number, name in enumerate(("a/1.jpg", "b/1.jpg", "c/1.jpg", "c/2.jpg")):
        about = Image.Exif()
        about[0x0112] = (6, 1, 3, 1)[number]
        image = Image.linear_gradient("L").resize((SIDE, SIDE))
        image.save(w.file(f"photos/{name}"), exif=about)
        if turned:
            with Image.open(w.folder / "photos" / name) as stored:
                ImageOps.exif_transpose(stored).save(w.folder / "photos" / name)
    examples = bnpatch.open_examples(w.folder / "photos", loaded(), cache_gb=0.0)
    for _ in range(2):
        list(examples.batches(2))


def parts(w, split=None):
    arrays = {"train_images": X.numpy(), "train_labels": Y, "val_images": X.numpy(), "val_labels": Y}
    np.savez(w.folder / "medical.npz", **arrays)
    bnpatch.open_examples(
        w.folder / "medical.npz", loaded(), **({} if split is None else {"split_name": split})
    )


def answered(order):
    """Many answers, of which those of two classes are exchanged."""
    targets = np.tile(np.arange(3), 40)
    warn_if_permuted(np.array(order)[targets], targets, ("a", "b", "c"))


def deep(w, **options):
    """Images in 16 bits whose values need 12."""
    for number, name in enumerate("abc"):
        path = w.file(f"deep/{name}/1.png")
        Image.fromarray(np.full((SIDE, SIDE), 4000 - number, np.uint16)).save(path)
    bnpatch.open_examples(w.folder / "deep", loaded(), **options)


def outputs(**options):
    module = net(result=two_outputs)
    load(module, preprocessing={"img_size": SIDE}, **options).num_outputs()


def two_outputs(y):
    return {"logits": y, "features": y[:, :2]}


CASES = {
    "names that the model has not": (
        lambda w: folders(w, "a", "b", "x", class_names=("a", "b", "c")),
        "'x' is not among the model's class names; folders are taken in order, --class-map FILE",
        lambda w: folders(w, "a", "b", "x", class_names=("a", "b", "c"), text="a\nb\nx\n"),
    ),
    "numbers from 1": (
        lambda w: folders(w, "1", "2", "3"),
        "the folders are numbers, but not 0 to 2.*--class-map FILE says otherwise",
        lambda w: folders(w, "1", "2", "3", text="1\n2\n3\n"),
    ),
    "some numbers": (
        lambda w: folders(w, "1", "2", outputs=3),
        "numbers without a 0.*--class-map FILE says otherwise",
        lambda w: folders(w, "1", "2", outputs=3, text="1\n2\n3\n"),
    ),
    "names with numbers": (
        lambda w: folders(w, "c1", "c10", "c2"),
        "sort differently in torchvision and in timm.*--class-map FILE says otherwise",
        lambda w: folders(w, "c1", "c10", "c2", text="c1\nc2\nc10\n"),
    ),
    "an empty folder": (
        with_an_empty_folder,
        r"a-c has 1 folder without images \('b'\), not taken for classes; --class-map FILE says otherwise",
        lambda w: [
            with_an_empty_folder(w, text="a\nc\n"),
            with_an_empty_folder(w, outputs=3, text="a\nb\nc\n"),
        ],
    ),
    "images on their sides": (
        with_orientation,
        r"2 images, such as a/1.jpg, must be turned .* turn the files \(PIL.ImageOps.exif_transpose\)$",
        lambda w: with_orientation(w, turned=True),
    ),
    "an archive of several parts": (
        parts,
        "has several parts; read are val_images, --split NAME",
        lambda w: parts(w, split="train"),
    ),
    "exchanged classes": (
        lambda w: answered((1, 0, 2)),
        "--class-map FILE says which folder is which output",
        lambda w: answered((0, 1, 2)),
    ),
    "bit depth": (
        deep,
        "they are taken for 12 bits, --bit-depth N",
        lambda w: deep(w, bit_depth=12),
    ),
    "several outputs": (
        lambda w: outputs(),
        r"logits .* is read, --output-name \(output= in Python\) takes another",
        lambda w: [outputs(output="logits"), outputs(output="features")],
    ),
}


@pytest.mark.filterwarnings("ignore")
def test_another_preprocessing(checkpoint, clean):
    """The images fit the mean and the deviation that the warning names."""
    options = {"mean": (0.449,), "std": (0.226,)}

    def evaluated():
        model = load(checkpoint, preprocessing=options)
        warn_of_preprocessing(model, bnpatch.open_examples(clean, model))

    def follow():
        options.update(mean=(0.5,), std=(0.5,))
        evaluated()

    warned(evaluated, r"whether the model was trained so, and give --mean 0\.5 --std 0\.5 if it was", follow)


@pytest.mark.filterwarnings("ignore")
@cases(CASES)
def test_warnings(name, world):
    warns, message, follow = CASES[name]
    warned(lambda: warns(world), message, lambda: follow(world))
