"""Where examples come from: folders of class folders, .npz files, arrays, timm's named data sets."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bnpatch.classes import ClassOrder, read_class_map, targets_of_folders
from bnpatch.data import Examples, Source, split
from bnpatch.errors import BnpatchError, BnpatchWarning, first_line
from bnpatch.model import Patchable

_NAMED = re.compile(r"(torch|hfds|wds|tfds|hfids)/.+", re.IGNORECASE)
_KEYS = (("x", "y"), ("images", "labels"), ("data", "targets"), ("x_test", "y_test"))


def open_examples(
    data: Any,
    model: Patchable,
    *,
    class_map: str | os.PathLike[str] | None = None,
    data_root: str | None = None,
    split_name: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Examples:
    """Open a data set for a model.

    Args:
        data: a folder with a folder of images per class; an ``.npz`` file with ``x`` and ``y``; one of
            timm's names (``torch/cifar10``, ``hfds/imagenet-1k``); a pair of arrays (x, y); a torch
            data set of (image, class) pairs.
        model: its preprocessing is used, and its classes where it knows them.
        class_map: file with the class folders, one a line in the order of the outputs, or name and
            index.
        data_root: folder that a named data set lies in.
        split_name: split of a named data set.
        limit: use at most so many examples, chosen at random class by class.
        seed: of that choice.
        options: see :class:`~bnpatch.data.Examples`.

    Raises:
        BnpatchError: there is nothing to read, or its classes are not the model's.
    """
    source, targets = _open(data, model, class_map, data_root, split_name)
    if len(targets) == 0:
        raise BnpatchError(f"{data} has no examples", "name a data set with some")
    first = source.read(0) if isinstance(source, ArrayInputs) else None
    num_outputs = model.num_outputs(first[None] if isinstance(first, Tensor) else None)
    if targets.min() < 0 or targets.max() >= num_outputs:
        raise BnpatchError(
            f"the data has class {targets.max() if targets.max() >= num_outputs else targets.min()}, "
            f"{model.name} has the outputs 0 to {num_outputs - 1}",
            "use the data set that the model was trained for",
        )
    examples = Examples(source, targets, model.preprocessing.transform(), **options)
    examples.as_they_are = isinstance(first, Tensor)
    if limit is not None and limit < len(examples):
        _, chosen = split(targets, limit / len(examples), seed)
        examples.keep(chosen)
    return examples


def _open(
    data: Any,
    model: Patchable,
    class_map: str | os.PathLike[str] | None,
    data_root: str | None,
    split_name: str,
) -> tuple[Source, npt.NDArray[np.int64]]:
    mode = model.preprocessing
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        if path.is_dir():
            return _open_folder(path, model, class_map)
        if path.suffix == ".npz":
            return _pair(*_read_npz(path), model)
        if _NAMED.fullmatch(str(data)):
            return _open_named(str(data), data_root, split_name, mode.image_mode)
        if path.exists():
            raise BnpatchError(f"{path} is not a data set", "give a folder with a folder of images per class")
        raise BnpatchError(
            f"there is no {path}", "give a folder with a folder of images per class, or an .npz file"
        )
    if isinstance(data, (np.ndarray, Tensor)):
        raise BnpatchError("there are images without classes", "give a pair (images, classes)")
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _pair(data[0], data[1], model)
    if hasattr(data, "__getitem__"):
        return _open_dataset(data, mode.image_mode)
    raise BnpatchError(
        f"data is a {type(data).__name__}", "give a path, a pair of arrays, or a torch data set"
    )


class FileImages:
    """Images in files."""

    def __init__(self, paths: Sequence[Path], mode: str, root: Path) -> None:
        self.paths, self.mode, self.root = paths, mode, root

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """Open, decode completely, turn as its EXIF says, and convert."""
        with Image.open(self.paths[index]) as image:
            return as_mode(ImageOps.exif_transpose(image), self.mode)

    def name(self, index: int) -> str:
        """The path below the root."""
        return str(self.paths[index].relative_to(self.root))


class ArrayInputs:
    """Arrays: bytes are images, floating-point values are inputs as they are."""

    def __init__(self, x: npt.NDArray[Any] | Tensor, mode: str | None) -> None:
        self.x, self.mode = x, mode  # without a mode, inputs as they are

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: int) -> Image.Image | Tensor:
        """An image of the bytes, channels first or last; or the floats."""
        if self.mode is None:
            return torch.as_tensor(self.x[index])
        image = np.asarray(self.x[index])
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
            image = image.transpose(1, 2, 0)
        return as_mode(Image.fromarray(np.ascontiguousarray(image.squeeze())), self.mode)

    def name(self, index: int) -> str:
        """The position."""
        return f"example {index}"


class NamedImages:
    """A map-style data set of (image, target) pairs, as torchvision's and timm's are."""

    def __init__(self, dataset: Any, mode: str) -> None:
        # timm's wrapper hands out the next image where one is broken; its reader doesn't.
        self.dataset, self.mode = getattr(dataset, "reader", dataset), mode

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Image.Image | Tensor:
        """The image, converted; a tensor is taken as an input as it is."""
        item = self.dataset[index][0]
        if isinstance(item, Tensor):
            return item
        with item if isinstance(item, Image.Image) else Image.open(item) as image:
            return as_mode(image, self.mode)

    def target(self, index: int) -> int:
        """The class index."""
        return int(self.dataset[index][1])

    def name(self, index: int) -> str:
        """The position."""
        return f"example {index}"


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to L or RGB; 16-bit gray is scaled, where PIL would clip it to white.

    Raises:
        ValueError: the image has floating-point values, whose range is anybody's guess.
    """
    if image.mode == "F":
        raise ValueError("floating-point image")
    if image.mode.startswith("I"):  # 16 bits, in 32 with some versions of PIL
        values = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def _open_folder(
    folder: Path, model: Patchable, class_map: str | os.PathLike[str] | None
) -> tuple[Source, npt.NDArray[np.int64]]:
    by_class = _images_by_class(folder)
    outside = len(by_class.pop("", []))
    if not by_class:
        if outside:
            raise BnpatchError(f"the images of {folder} are in no class folders", "make one folder per class")
        raise BnpatchError(f"{folder} has no images", "it needs a folder of images per class")
    if outside:
        warnings.warn(
            f"{outside} images of {folder} are in no class folder: left out", BnpatchWarning, stacklevel=2
        )
    targets = targets_of_folders(
        list(by_class),
        num_outputs=model.num_outputs(),
        class_names=read_class_map(class_map) if class_map else model.class_names,
        order=ClassOrder(model.class_order),
        sure=class_map is not None,
        where=str(folder),
    )
    if model.class_names is None and len(targets) == model.num_outputs():
        model.class_names = tuple(
            sorted(targets, key=lambda name: targets[name])
        )  # from now on they are known
    pairs = [(path, targets[name]) for name, paths in by_class.items() for path in paths]
    source = FileImages([path for path, _ in pairs], model.preprocessing.image_mode, folder)
    return source, np.array([target for _, target in pairs], dtype=np.int64)


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by the folder directly below the root, at any depth; the root's own under ""."""
    from timm.utils.misc import natural_key

    Image.init()
    types = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    by_class: dict[str, list[Path]] = {}
    for root, _, files in os.walk(folder, followlinks=True):
        parts = Path(root).relative_to(folder).parts
        images = [Path(root, name) for name in files if Path(name).suffix.lower() in types]
        if images:
            by_class.setdefault(parts[0] if parts else "", []).extend(images)
    return {
        name: sorted(paths, key=lambda path: natural_key(str(path)))
        for name, paths in sorted(by_class.items())
    }


def _read_npz(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = next((pair for pair in _KEYS if all(key in arrays for key in pair)), None)
            if keys is None:
                raise BnpatchError(
                    f"{path} has the arrays {', '.join(arrays) or 'none'}",
                    "name the images x and the classes y",
                )
            return arrays[keys[0]], arrays[keys[1]]
    except OSError as error:
        raise BnpatchError(f"cannot read {path}: {error}", "check the path") from error
    except (ValueError, EOFError, KeyError) as error:
        raise BnpatchError(f"{path} is damaged or not an .npz file ({error})", "write it again") from error


def _pair(x: Any, y: Any, model: Patchable) -> tuple[Source, npt.NDArray[np.int64]]:
    x, labels = (np.asarray(v) if isinstance(v, list) else v for v in (x, y))
    labels = np.asarray(labels)
    if len(x) != len(labels) or labels.ndim != 1:
        raise BnpatchError(
            f"there are {len(x)} images and classes of shape {labels.shape}", "give one class index per image"
        )
    if not np.array_equal(labels, labels.astype(np.int64)):
        raise BnpatchError("the classes are not whole numbers", "give class indices")
    dtype = torch.as_tensor(x[:0]).dtype
    as_they_are = dtype.is_floating_point
    if not as_they_are and dtype != torch.uint8:
        raise BnpatchError(
            f"the images are of type {dtype}", "give bytes, or floating-point inputs as they are"
        )
    mode = None if as_they_are else model.preprocessing.image_mode
    return ArrayInputs(x, mode), labels.astype(np.int64)


def _open_named(
    name: str, root: str | None, split_name: str, mode: str
) -> tuple[Source, npt.NDArray[np.int64]]:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=root, split=split_name, input_img_mode=mode)
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError, ImportError) as error:
        raise BnpatchError(
            f"cannot open the data set {name}: {first_line(error)}",
            "see --data-root and --split, and that it is downloaded",
        ) from error
    return _open_dataset(dataset, mode)


def _open_dataset(dataset: Any, mode: str) -> tuple[Source, npt.NDArray[np.int64]]:
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise BnpatchError("the data set is a stream", "use one that can be indexed, or write it to a folder")
    source = NamedImages(dataset, mode)
    # A list of targets saves decoding every image, unless something is done to them on the way.
    targets = None if getattr(dataset, "target_transform", None) else getattr(dataset, "targets", None)
    if targets is None or len(targets) != len(source):
        targets = [source.target(index) for index in range(len(source))]
    return source, np.asarray(targets, dtype=np.int64)
