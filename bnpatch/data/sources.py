"""Open data sets: folders, .npz files, arrays, loaders, timm's named data sets -> Examples."""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.data.class_folders import WITHOUT_LABELS, open_folder
from bnpatch.data.dataset import Examples, subset
from bnpatch.data.decoding import Source
from bnpatch.data.images import Array, ArrayInputs, FileImages, IndexedImages, drain
from bnpatch.data.preprocessing import ImageModel

_NAMED = re.compile(r"(torch|hfds|wds|tfds|hfids)/.+", re.IGNORECASE)
_KEYS = (("x", "y"), ("images", "labels"), ("data", "targets"), ("x_test", "y_test"))


def open_examples(
    data: Any,
    model: ImageModel,
    *,
    labels: Literal["required", "optional"] = "required",
    classes: bool = True,
    class_map: str | os.PathLike[str] | None = None,
    data_root: str | None = None,
    split_name: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    cache_gb: float = 4.0,
    **options: Any,
) -> Examples:
    """Open a data set for a model.

    Bytes are images, which the model's preprocessing resizes and crops; floating-point values are inputs as
    they are.

    Args:
        data: a folder with a folder of images per class; an ``.npz`` file with ``x`` and ``y``; one of
            timm's names (``torch/cifar10``, ``hfds/imagenet-1k``); a pair of arrays (x, y); a torch
            data set of (image, target) pairs; a ``DataLoader``, or whatever else gives batches (x, y), which
            is read once, into memory. Where labels are optional, the same without y.
        model: its preprocessing is used, and its classes where it knows them.
        labels: "required", or "optional": the target of an example without one is -1. In a folder, images
            outside class folders have none; nor have those in folders that aren't named after a
            class, where it is known what the classes are called.
        classes: the targets must be class indices of the model. If not, they may be anything, of shape
            (N, ...), and a metric of the user's own gets them as they are.
        class_map: file with the class folders, one a line in the order of the outputs, or name and
            index.
        data_root: folder that a named data set lies in.
        split_name: split of a named data set.
        limit: use at most so many examples, chosen at random class by class.
        seed: of that choice.
        cache_gb: memory for decoded examples or for what a loader gives, in units of 10^9 bytes.
        options: see :class:`~bnpatch.data.dataset.Examples`.

    Raises:
        BnpatchError: there is nothing to read, its classes are not the model's, labels are missing, or a
            loader gives more than ``cache_gb``.
    """
    optional = labels == "optional"
    source, targets = _open(data, model, optional, class_map, data_root, split_name, int(cache_gb * 1e9))
    if len(source) == 0:
        raise BnpatchError(f"{_called(data)} has no examples", "name a data set with some")
    if targets is None and not optional:
        raise BnpatchError(
            "there are images without classes", f"give a pair (images, classes), {WITHOUT_LABELS}"
        )
    first = _first(source)
    x = first[None] if isinstance(first, Tensor) else None
    if targets is None:
        targets, labelled = np.full(len(source), -1), np.zeros(len(source), np.bool_)
        if classes:
            model.num_outputs(x)  # raises where it is no classifier
    else:
        classes = _check_targets(targets, len(source), model, x, classes, optional)
        labelled = targets >= 0 if classes else np.ones(len(targets), np.bool_)
    transform = model.preprocessing.transform()
    if targets.ndim > 2 and isinstance(first, Image.Image) and _changes(transform, first):
        raise BnpatchError(
            f"the images would be resized or cropped, their targets of shape {targets.shape} would not",
            "give the inputs as floats, just as the model takes them",
        )
    examples = Examples(
        source, targets, transform, classes=classes, labelled=labelled, cache_gb=cache_gb, **options
    )
    examples.as_they_are = isinstance(first, Tensor) and first.is_floating_point()
    examples.in_memory = isinstance(source, ArrayInputs) and source.mode is None
    if limit is not None and limit < len(examples):
        examples.keep(subset(examples.strata, limit / len(examples), seed))
    return examples


def _open(
    data: Any,
    model: ImageModel,
    optional: bool,
    class_map: str | os.PathLike[str] | None,
    data_root: str | None,
    split_name: str,
    budget: int,
) -> tuple[Source, Array | None]:
    """The source, and the targets of shape (N, ...), None where there are none."""
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        if path.is_dir():
            return open_folder(path, model, class_map, optional)
        if path.suffix == ".npz":
            return _pair(*_read_npz(path, optional), model)
        if _NAMED.fullmatch(str(data)):
            return _open_named(str(data), data_root, split_name, model, budget)
        if path.exists():
            raise BnpatchError(f"{path} is not a data set", "give a folder with a folder of images per class")
        raise BnpatchError(
            f"there is no {path}", "give a folder with a folder of images per class, or an .npz file"
        )
    if isinstance(data, (np.ndarray, Tensor)):
        return _pair(data, None, model)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _pair(data[0], data[1], model)
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, Mapping)):
        return _open_dataset(data, model, budget)
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        return _pair(*drain(data, budget), model)
    raise BnpatchError(
        f"data is a {type(data).__name__}", "give a path, a pair of arrays, a torch data set or a loader"
    )


def _called(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else "the data"


def _first(source: Source) -> Image.Image | Tensor | None:
    """The first input, if it isn't a file; None if it can't be read, which counts when its turn comes."""
    if not isinstance(source, FileImages):
        with contextlib.suppress(Exception):
            return source.read(0)
    return None


def _check_targets(
    targets: Array, count: int, model: ImageModel, x: Tensor | None, classes: bool, optional: bool
) -> bool:
    """Are they class indices of the model? Raises where they should be and aren't."""
    if targets.ndim < 1 or len(targets) != count:
        raise BnpatchError(
            f"there are {count} images and targets of shape {targets.shape}", "give one target per image"
        )
    if targets.dtype.kind not in "biuf":
        raise BnpatchError(f"the targets are of type {targets.dtype}", "give numbers")
    lowest = -1 if optional else 0
    if not classes:
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            return False
        with contextlib.suppress(BnpatchError):  # no classifier, or one that the evaluation has to refuse
            return bool(targets.min() >= lowest and targets.max() < model.num_outputs(x))
        return False
    remedy = "give one class index per image, or a metric of your own for other targets"
    if targets.ndim != 1:
        raise BnpatchError(f"targets of shape {targets.shape} are no classes", remedy)
    if not np.array_equal(targets, targets.astype(np.int64)):
        raise BnpatchError("the classes are not whole numbers", remedy)
    num_outputs = model.num_outputs(x)
    wrong = (targets >= num_outputs) | (targets < lowest)
    if wrong.any():
        raise BnpatchError(
            f"the data has class {int(targets[wrong][0])}, "
            f"{model.name} has the outputs 0 to {num_outputs - 1}",
            "use the data set that the model was trained for",
        )
    return True


def _changes(transform: Any, image: Image.Image) -> bool:
    """Does preprocessing move the pixels of an image?"""
    before = np.asarray(image)
    return not np.array_equal(
        transform(image), before[None] if before.ndim == 2 else before.transpose(2, 0, 1)
    )


def _read_npz(path: Path, optional: bool) -> tuple[Array, Array | None]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for images, targets in _KEYS:
                if images in arrays and (optional or targets in arrays):
                    return arrays[images], arrays.get(targets)
            raise BnpatchError(
                f"{path} has the arrays {', '.join(arrays) or 'none'}",
                "name the images x and the classes y" + (f", {WITHOUT_LABELS}" if "x" in arrays else ""),
            )
    except OSError as error:
        raise BnpatchError(f"cannot read {path}: {error}", "check the path") from error
    except (ValueError, EOFError, KeyError) as error:
        raise BnpatchError(f"{path} is damaged or not an .npz file ({error})", "write it again") from error


def _pair(x: Any, y: Any, model: ImageModel) -> tuple[Source, Array | None]:
    x = np.asarray(x) if isinstance(x, list) else x
    dtype = torch.as_tensor(x[:0]).dtype
    if not dtype.is_floating_point and dtype != torch.uint8:
        raise BnpatchError(
            f"the images are of type {dtype}", "give bytes, or floating-point inputs as they are"
        )
    mode = None if dtype.is_floating_point else model.preprocessing.image_mode
    return ArrayInputs(x, mode), None if y is None else np.asarray(y)


def _open_named(
    name: str, root: str | None, split_name: str, model: ImageModel, budget: int
) -> tuple[Source, Array | None]:
    from timm.data import create_dataset

    mode = model.preprocessing.image_mode
    try:
        dataset = create_dataset(name, root=root, split=split_name, input_img_mode=mode)
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError, ImportError) as error:
        raise BnpatchError(
            f"cannot open the data set {name}: {first_line(error)}",
            "see --data-root and --split, and that it is downloaded",
        ) from error
    return _open_dataset(dataset, model, budget)


def _open_dataset(dataset: Any, model: ImageModel, budget: int) -> tuple[Source, Array | None]:
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise BnpatchError("the data set is a stream", "give a DataLoader of it, or write it to a folder")
    source = IndexedImages(dataset, model.preprocessing)
    return source, source.targets(budget)
