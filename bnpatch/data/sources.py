"""Open data sets as :class:`Examples`: folders, .npz files, arrays, loaders and timm's named data sets."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnpatch.core.errors import BnpatchError, BnpatchWarning, first_line
from bnpatch.core.text import counted
from bnpatch.data.bit_depth import given
from bnpatch.data.class_folders import WITHOUT_LABELS, open_folder
from bnpatch.data.class_names import outputs_by_name, outputs_by_synset
from bnpatch.data.dataset import Examples, subset
from bnpatch.data.decoding import Source
from bnpatch.data.groups import GroupsOf, number_groups
from bnpatch.data.images import Array, ArrayInputs, FileImages, IndexedImages, read_loader
from bnpatch.data.items import are_batches, as_tensor
from bnpatch.data.npz import array_names, read_arrays
from bnpatch.data.preprocessing import ImageModel

_NAMED = re.compile(r"(torch|hfds|wds|tfds|hfids)/.+", re.IGNORECASE)
_KEYS = (("x", "y"), ("images", "labels"), ("data", "targets"), ("x_test", "y_test"))
_PARTS = {"validation": ("val", "test"), "val": ("val",), "test": ("test",), "train": ("train",)}
_NAMES = 8  # the most names of arrays that a message lists


def open_examples(
    data: Any,
    model: ImageModel,
    *,
    labels: Literal["required", "optional"] = "required",
    classes: bool = True,
    groups: GroupsOf | None = None,
    class_map: str | os.PathLike[str] | None = None,
    data_root: str | None = None,
    split_name: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    cache_gb: float = 4.0,
    bit_depth: int | None = None,
    **options: Any,
) -> Examples:
    """Open a data set for a model.

    Bytes are images, which the model's preprocessing resizes and crops. Floating-point values are inputs as
    the model takes them. Image files are read as they are stored: an orientation in their EXIF is not
    applied, as torchvision and timm don't apply it.

        model = bnpatch.load("timm:resnet18")
        examples = bnpatch.open_examples("val/", model)

    Args:
        data: a folder with one folder of images per class, or with images whose classes are in a table there
            (:mod:`bnpatch.data.label_files`); an ``.npz`` file with ``x`` and ``y``, or in
            MedMNIST's layout; one of timm's names (``torch/cifar10``, ``hfds/imagenet-1k``); a pair of arrays
            (x, y); a torch or Hugging Face data set of pairs (image, target) or dictionaries of ``image`` and
            ``label``, whose names for its classes are matched with the model's; or a ``DataLoader`` or other
            iterable of batches (x, y), which is read once, into memory. If labels are optional, y may be
            missing.
        model: the model; the data set gets its preprocessing, and its class names if it has them.
        labels: "required" or "optional". If optional, an example without a label has the target -1: in a
            folder, the images outside class folders, and those in folders that aren't named after a class,
            provided that the names of the classes are known.
        classes: whether the targets must be class indices of the model. If not, they may be anything, of
            shape (N, ...), for a metric of the user's own.
        groups: which examples are not independent, such as frames of one video, views of one product or
            images of one patient: one label per example, or a function from the name of an example (for a
            file, its path below the folder) to its label. A group stays together in every split, and is the
            unit of all intervals; see :mod:`bnpatch.data.groups`.
        class_map: file with one class folder per line in the order of the outputs, or a name and an index
            per line, or JSON; see :func:`bnpatch.data.class_maps.read_class_map`.
        data_root: folder of a named data set.
        split_name: split of a named data set, or of an ``.npz`` file with ``val_images``, ``val_labels`` and
            so on, as in MedMNIST. Without validation images, "validation" means the test images.
        limit: use at most this many examples, chosen at random class by class.
        seed: seed of that choice.
        cache_gb: memory for decoded examples or for the batches of a loader, in units of 10^9 bytes.
        bit_depth: number of bits that the values of 16- and 32-bit images use, 8 to 32; by default the least
            of 8, 10, 12, 14 and 16 that a sample of the images needs, with a warning if that is not 16.
        options: see :class:`~bnpatch.data.dataset.Examples`.

    Returns:
        The examples, which :func:`bnpatch.evaluate` and the search read in batches.

    Raises:
        BnpatchError: there is nothing to read, the classes are not the model's, labels are missing, groups
            don't fit, or a loader gives more than ``cache_gb``.
    """
    optional = labels == "optional"
    settings = _Options(optional, class_map, data_root, split_name, int(cache_gb * 1e9), bit_depth)
    source, targets = _open(data, model, settings, bool(options.get("strict")))
    if len(source) == 0:
        raise BnpatchError(f"{_called(data)} has no examples", "name a data set with some")
    if targets is None and not optional:
        raise BnpatchError(
            "there are images without classes", f"give a pair (images, classes), {WITHOUT_LABELS}"
        )
    first = _first(source)
    x = first[None] if isinstance(first, Tensor) else None
    if x is not None and x.is_floating_point():
        model.preprocessing = model.preprocessing.for_inputs(x.shape[1:], "the data")
    transform = model.preprocessing.transform()
    if targets is not None:
        if classes and targets.ndim == 2 and targets.shape[1] == 1:  # a column
            targets = targets[:, 0]
        if classes and isinstance(source, IndexedImages):
            targets = _as_outputs(targets, source.classes(), model, x)
        classes = _check_targets(targets, len(source), model, x, classes, optional)
        if targets.ndim > 2 and isinstance(first, Image.Image) and _changes(transform, first):
            raise BnpatchError(
                f"the images would be resized or cropped, their targets of shape {targets.shape} would not",
                "give the inputs as floats, just as the model takes them",
            )
    elif classes:
        model.num_outputs(x)  # raises an error if the model is no classifier
    examples = Examples(source, targets, transform, classes=classes, cache_gb=cache_gb, **options)
    examples.as_they_are = isinstance(first, Tensor) and first.is_floating_point()
    if isinstance(source, FileImages):
        examples.left_out, examples.after_reading = source.left_out, source.warn_of_orientation
    examples.in_memory = isinstance(source, ArrayInputs) and source.mode is None
    if groups is not None:
        examples.groups = number_groups(groups, source)
    if limit is not None and limit < len(examples):
        examples.keep(subset(examples.strata, limit / len(examples), seed))
    return examples


@dataclass(frozen=True)
class _Options:
    """Options of :func:`open_examples`; ``budget`` is ``cache_gb`` in bytes."""

    optional: bool
    class_map: str | os.PathLike[str] | None
    data_root: str | None
    split_name: str
    budget: int
    bit_depth: int | None


def _open(data: Any, model: ImageModel, settings: _Options, strict: bool) -> tuple[Source, Array | None]:
    """Return the source, and the targets of shape (N, ...) or None."""
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        if path.is_dir():
            return open_folder(path, model, settings.class_map, settings.optional, settings.bit_depth, strict)
        if path.suffix.lower() == ".npz":
            return _pair(*_read_npz(path, settings), model)
        if _NAMED.fullmatch(str(data)):
            return _open_named(str(data), model, settings)
        if path.exists():
            raise BnpatchError(f"{path} is not a data set", "give a folder with a folder of images per class")
        raise BnpatchError(
            f"there is no {str(path)!r}", "give a folder with a folder of images per class, or an .npz file"
        )
    if isinstance(data, (np.ndarray, Tensor)):
        return _pair(data, None, model)
    if isinstance(data, (tuple, list)) and are_batches(data):
        return _pair(*read_loader(data, settings.budget), model)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _pair(data[0], data[1], model)
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, Mapping)):
        return _open_dataset(data, model, settings)
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        return _pair(*read_loader(data, settings.budget), model)
    raise BnpatchError(
        f"data is a {type(data).__name__}", "give a path, a pair of arrays, a torch data set or a loader"
    )


def _called(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else "the data"


def _first(source: Source) -> Image.Image | Tensor | None:
    """Return the first image or input; None for files, or if it can't be read (reported later)."""
    if not isinstance(source, FileImages):
        with contextlib.suppress(Exception):  # the user's data set may raise any error
            return source.read(0)
    return None


def _check_targets(
    targets: Array, count: int, model: ImageModel, x: Tensor | None, classes: bool, optional: bool
) -> bool:
    """Tell whether the targets are class indices of the model; raise an error if they should be."""
    if targets.ndim < 1 or len(targets) != count:
        raise BnpatchError(
            f"the data has {counted(count, 'image')} and targets of shape {targets.shape}",
            "give one target per image",
        )
    if targets.dtype.kind not in "biuf":
        raise BnpatchError(f"the targets are of type {targets.dtype}", "give numbers")
    lowest = -1 if optional else 0
    if not classes:
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            return False
        with contextlib.suppress(BnpatchError):  # the model is no classifier; the evaluation reports that
            return bool(targets.min() >= lowest and targets.max() < model.num_outputs(x, _count(targets)))
        return False
    remedy = "give one class index per image, or a metric of your own for other targets"
    if targets.ndim != 1:
        raise BnpatchError(f"targets of shape {targets.shape} are no classes", remedy)
    if not np.array_equal(targets, targets.astype(np.int64)):
        raise BnpatchError("the classes are not whole numbers", remedy)
    num_outputs = model.num_outputs(x, _count(targets))
    wrong = (targets >= num_outputs) | (targets < lowest)
    if wrong.any():
        from_1 = targets.min() == 1 and targets.max() == num_outputs
        raise BnpatchError(
            f"the data has class {int(targets[wrong][0])}, "
            f"{model.name} has the outputs 0 to {num_outputs - 1}",
            "subtract 1, if the classes count from 1"
            if from_1
            else "use the data set that the model was trained for",
        )
    return True


def _as_outputs(targets: Array, classes: Mapping[str, int], model: ImageModel, x: Tensor | None) -> Array:
    """Return targets that a data set numbers in its own way as outputs of the model.

    That is done where all names that the data set has for its classes are certainly classes of the model.
    """
    if not classes or targets.ndim != 1 or targets.dtype.kind not in "iu":
        return targets
    num_outputs = model.num_outputs(x, _count(targets))
    found = outputs_by_synset(list(classes), num_outputs)
    found = found or outputs_by_name(list(classes), num_outputs, model.class_names)
    outputs = {target: found[name] for name, target in classes.items() if name in found}
    other = [name for name in found if found[name] != classes[name]]
    if not other or len(found) < len(classes) or len(outputs) < len(classes):
        return targets
    warnings.warn(
        f"the data set and the model number classes differently ({other[0]!r} is {classes[other[0]]} there, "
        f"and output {found[other[0]]} here): the names decide",
        BnpatchWarning,
        stacklevel=3,
    )
    return np.array([outputs.get(target, target) for target in targets.tolist()], dtype=np.int64)


def _count(targets: Array) -> int | None:
    """Return the number of classes that the targets have, if there are any."""
    return int(targets.max()) + 1 if len(targets) else None


def _changes(transform: Any, image: Image.Image) -> bool:
    """Tell whether preprocessing changes the pixels of an image."""
    before = np.asarray(image)
    return not np.array_equal(
        transform(image), before[None] if before.ndim == 2 else before.transpose(2, 0, 1)
    )


def _read_npz(path: Path, settings: _Options) -> tuple[Array, Array | None]:
    """Return the images and the targets of an .npz file."""
    names = array_names(path)
    pairs = [*_KEYS, *((f"{part}_images", f"{part}_labels") for part in _PARTS.get(settings.split_name, ()))]
    for images, targets in pairs:
        if images in names and (settings.optional or targets in names):
            arrays = read_arrays(path, ((images, targets) if targets in names else (images,),))
            if images.endswith("_images") and settings.split_name == "validation":  # the default
                warnings.warn(
                    f"{path} has several parts; read are {images}, --split NAME (split_name=) says otherwise",
                    BnpatchWarning,
                    stacklevel=4,
                )
            return arrays[images], arrays.get(targets)
    shown = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
    raise BnpatchError(
        f"{path} has the arrays {shown or 'none'}",
        "name the images x and the classes y" + (f", {WITHOUT_LABELS}" if "x" in names else ""),
    )


def _pair(x: Any, y: Any, model: ImageModel) -> tuple[Source, Array | None]:
    try:
        x = np.asarray(x) if isinstance(x, (list, tuple)) else x
        dtype = as_tensor(x[:0]).dtype
    except (TypeError, ValueError, IndexError) as error:  # texts, records, a single number, several shapes
        shape = f" and shape {x.shape}" if hasattr(x, "shape") else " of several shapes"
        raise BnpatchError(
            f"the images are of type {getattr(x, 'dtype', type(x).__name__)}{shape}",
            "give arrays of bytes or of floating-point values, of one shape",
        ) from error
    if not dtype.is_floating_point and dtype != torch.uint8:
        raise BnpatchError(
            f"the images are of type {dtype}", "give bytes, or floating-point inputs as they are"
        )
    mode = None if dtype.is_floating_point else model.preprocessing.image_mode
    return ArrayInputs(x, mode), None if y is None else np.asarray(y)


def _open_named(name: str, model: ImageModel, settings: _Options) -> tuple[Source, Array | None]:
    from timm.data import create_dataset

    mode = model.preprocessing.image_mode
    try:
        dataset = create_dataset(
            name, root=settings.data_root, split=settings.split_name, input_img_mode=mode
        )
    # timm hands the name to torchvision, tfds, Hugging Face datasets or its own readers. They raise these for
    # a name, a split or a folder that they don't have, and where their package is missing.
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError, ImportError) as error:
        raise BnpatchError(
            f"cannot open the data set {name}: {first_line(error)}",
            "check --data-root and --split, and that the data set is downloaded",
        ) from error
    # timm's readers share nothing among examples but names and arrays.
    return _open_dataset(dataset, model, settings, thread_safe=True)


def _open_dataset(
    dataset: Any, model: ImageModel, settings: _Options, thread_safe: bool = False
) -> tuple[Source, Array | None]:
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise BnpatchError("the data set is a stream", "give a DataLoader of it, or write it to a folder")
    source = IndexedImages(dataset, model.preprocessing, thread_safe)
    if settings.bit_depth:
        source.bit_depth = given(settings.bit_depth)
    else:
        source.find_bit_depth()
    return source, source.targets(settings.budget)
