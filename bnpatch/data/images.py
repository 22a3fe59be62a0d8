"""Sources of examples: image files, arrays, data sets that can be indexed, and loaders of batches."""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import counted
from bnpatch.data.bit_depth import STANDARD, BitDepth, deep_colors, deep_values, of_sample
from bnpatch.data.decoding import ROOM
from bnpatch.data.image_files import open_image
from bnpatch.data.items import TARGETS, as_tensor, image_of, opened, parts
from bnpatch.data.preprocessing import Preprocessing

Array = npt.NDArray[Any]

_ORIENTATION = 0x0112  # EXIF tag: how to turn the image until it is upright; 1 for not at all
_SAMPLE = 16  # images that are decoded to find their bit depth


class FileImages:
    """A source of images in files, which are read as they are stored.

    An image whose EXIF says that it must be turned is not turned, because torchvision and timm don't turn it
    either where they train and evaluate.

    Args:
        paths: the files.
        mode: mode of PIL to convert images to.
        root: a folder that all files are in.
        bit_depth: how many bits the values of 16- and 32-bit images have.
        problems: why some of the paths can't be read, if that is known.
    """

    thread_safe = True

    def __init__(
        self,
        paths: Sequence[Path],
        mode: str,
        root: Path,
        bit_depth: BitDepth = STANDARD,
        problems: Mapping[Path, str] | None = None,
    ) -> None:
        self.paths, self.mode, self.root, self.bit_depth = paths, mode, root, bit_depth
        self.problems = dict(problems or {})
        self.left_out: dict[str, str] = {}  # what else is there, and why it is none of the images
        self._on_their_sides: set[int] = set()
        self._warned = False

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """Open the image, decode it completely, and convert it to the mode.

        Raises:
            OSError: the path is no file, or not one that Pillow can read.
            ValueError: its values don't fit the bit depth, see :func:`as_mode`.
        """
        path = self.paths[index]
        if problem := self.problems.get(path):
            raise OSError(problem)
        with open_image(path) as image:
            deep = self.bit_depth.needs_low_bytes
            ROOM.take(image.width * image.height * (2 if deep else 1))
            colors = deep_colors(path, image) if deep else None
            if colors is None:
                read = as_mode(image, self.mode, self.bit_depth)
            else:
                shallow = Image.fromarray(self.bit_depth.to_bytes(colors))
                del colors  # of a large image, a gigabyte
                read = as_mode(shallow, self.mode)
            with contextlib.suppress(Exception):  # EXIF may be damaged; the image has been read all the same
                if image.getexif().get(_ORIENTATION, 1) != 1:
                    self._on_their_sides.add(index)
            return read

    def warn_of_orientation(self) -> None:
        """Warn, once, if images that were read have an EXIF orientation."""
        if self._on_their_sides and not self._warned:
            self._warned = True
            images, first = counted(len(self._on_their_sides), "image"), self.name(min(self._on_their_sides))
            warnings.warn(
                f"{images}, such as {first}, must be turned to be upright, as EXIF says, and are read as "
                "stored, as torchvision and timm read them; if the model is used on upright images, turn the "
                "files (PIL.ImageOps.exif_transpose)",
                BnpatchWarning,
                stacklevel=4,
            )

    def name(self, index: int) -> str:
        """Return the path below the root."""
        return str(self.paths[index].relative_to(self.root))

    def content(self, index: int) -> bytes:
        """Return the bit depth if it is unusual: the path identifies the image, and reading it is slow."""
        return b"" if self.bit_depth.bits == STANDARD.bits else str(self.bit_depth.bits).encode()


class ArrayInputs:
    """A source of arrays: bytes are images, floating-point values are inputs as the model takes them.

    Args:
        x: the array, (N, ...).
        mode: mode of PIL to convert images to, or None if the array has inputs as the model takes them.
    """

    thread_safe = True

    def __init__(self, x: Array | Tensor, mode: str | None) -> None:
        self.x, self.mode = as_tensor(x) if mode is None else x, mode

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: int) -> Image.Image | Tensor:
        """Return an image made of the bytes, whose channels may be first or last; or the floats."""
        if self.mode is None:
            return as_tensor(self.x[index])
        return as_mode(image_of(self.x[index]), self.mode)

    def name(self, index: int) -> str:
        """Return the position."""
        return f"example {index}"

    def content(self, index: int) -> bytes:
        """Return a few hundred of the values, evenly spaced."""
        values = as_tensor(self.x[index]).reshape(-1)
        return values[:: max(1, len(values) // 256)].contiguous().view(torch.uint8).numpy().tobytes()


class IndexedImages:
    """A source over a map-style data set of images or (image, target) pairs, as in torchvision and timm.

    Args:
        dataset: the data set.
        preprocessing: preprocessing of the model.
        thread_safe: whether several threads may read at the same time. A data set may share an open file
            among its examples, or a connection that belongs to one thread.
    """

    def __init__(self, dataset: Any, preprocessing: Preprocessing, thread_safe: bool = False) -> None:
        # timm's wrapper silently returns the next image if one is broken; its reader raises an error.
        self.dataset, self.preprocessing = getattr(dataset, "reader", dataset), preprocessing
        self.bit_depth = STANDARD
        self.thread_safe = thread_safe
        self.problems: dict[int, str] = {}  # why examples can't be read, found while reading the targets

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Image.Image | Tensor:
        """Return the image, converted to the mode; or floats as a tensor, as they are."""
        if problem := self.problems.get(index):
            raise OSError(problem)
        image = opened(self.dataset[index])
        if isinstance(image, Tensor):
            return image
        with image:
            return as_mode(image, self.preprocessing.image_mode, self.bit_depth)

    def find_bit_depth(self) -> None:
        """Find how many bits the values of 16- and 32-bit images have, if the first image is one."""
        with contextlib.suppress(Exception):  # an image that can't be read is reported later
            if self._values(0) is not None:
                some = range(0, len(self), -(-len(self) // _SAMPLE))
                self.bit_depth = of_sample([functools.partial(self._values, i) for i in some], "the data set")

    def _values(self, index: int) -> Array | None:
        image = opened(self.dataset[index])
        if isinstance(image, Tensor):
            return None
        with image:
            return deep_values(image)

    def targets(self, budget: int) -> Array | None:
        """Return the target of each example, of shape (N, ...); None for a data set of images alone.

        Raises:
            BnpatchError: the targets differ in shape, or take more than ``budget`` bytes.
        """
        # The attribute "targets" saves decoding every image. It is wrong if a transform changes the targets.
        if not getattr(self.dataset, "target_transform", None):
            with contextlib.suppress(ValueError):  # the targets differ in shape, as boxes do
                listed = np.asarray(getattr(self.dataset, "targets", None))
                if listed.shape[:1] == (len(self),) and listed.dtype.kind in "biuf":
                    return listed
        found: dict[int, Tensor] = {}
        used = 0
        for index in range(len(self)):
            try:
                target = parts(self.dataset[index])[1]
            except BnpatchError:
                raise
            except Exception as error:  # the user's data set may raise any error for a damaged image
                self.problems[index] = f"{type(error).__name__}: {error}"
                continue
            if target is None and not found:
                return None
            found[index] = _copied(np.asarray(target) if isinstance(target, Image.Image) else target)[None]
            used += found[index].nbytes
            _check_budget(used, budget)
        if not found:
            return None
        blank = torch.zeros_like(next(iter(found.values())))  # nobody sees the target of a damaged image
        return _joined([found.pop(index, blank) for index in range(len(self))], "targets").numpy()

    def classes(self) -> dict[str, int]:
        """Return the targets by the names that the data set has for its classes, as far as it tells.

        The result is empty if a transform changes the targets.
        """
        dataset = self.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        if getattr(dataset, "target_transform", None):
            return {}
        for key in ("wnid_to_idx", "class_to_idx"):  # of torchvision, whose ImageNet also has names in words
            if isinstance(by_name := getattr(dataset, key, None), Mapping) and by_name:
                return {str(name): int(target) for name, target in by_name.items()}
        features = getattr(dataset, "features", None)  # of Hugging Face
        columns = features if isinstance(features, Mapping) else {}
        names = getattr(columns.get(next((k for k in TARGETS if k in columns), "")), "names", None)
        names = names or getattr(dataset, "classes", None)
        is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        by_name = {name: target for target, name in enumerate(names)} if names and is_list else {}
        return by_name if names and len(by_name) == len(names) else {}

    def name(self, index: int) -> str:
        """Return the position."""
        return f"example {index}"

    def content(self, index: int) -> bytes:
        """Return the bit depth if it is unusual, because decoding is slow."""
        return b"" if self.bit_depth.bits == STANDARD.bits else str(self.bit_depth.bits).encode()


def read_loader(loader: Iterable[Any], budget: int) -> tuple[Tensor, Array | None]:
    """Read all batches of a loader into memory.

    Args:
        loader: gives batches (x, y), or x alone, of tensors or arrays.
        budget: number of bytes that the batches may take.

    Returns:
        x of shape (N, ...), and y of shape (N, ...) or None if the loader gives none.

    Raises:
        BnpatchError: the batches take more memory, differ in shape, or are neither tensors nor arrays.
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    used = 0
    for batch in loader:
        x, y = parts(batch)
        xs.append(_copied(x))
        if y is not None:
            ys.append(_copied(y))
        used += xs[-1].nbytes + (0 if y is None else ys[-1].nbytes)
        _check_budget(used, budget)
    if ys and len(ys) != len(xs):
        raise BnpatchError("some batches have targets, others don't", "give batches of one kind")
    if not xs:
        raise BnpatchError(
            "the loader gives no batches", "give one that does; a generator gives them only once"
        )
    return _joined(xs, "inputs"), _joined(ys, "targets").numpy() if ys else None


def as_mode(image: Image.Image, mode: str, bit_depth: BitDepth = STANDARD) -> Image.Image:
    """Convert an image to mode L or RGB. Deeper gray is scaled to 8 bits; PIL would clip it to white.

    Args:
        image: an image of any mode.
        mode: "L" or "RGB".
        bit_depth: how many bits the values of a 16- or 32-bit image have.

    Raises:
        ValueError: the image has floating-point values, whose range is not known, or values that don't fit
            the bit depth.
    """
    if image.mode == "F":
        raise ValueError("floating-point image")
    values = deep_values(image)
    shallow = image if values is None else Image.fromarray(bit_depth.to_bytes(values))
    shallow.load()  # the file may be closed when the caller looks at the values
    return shallow if shallow.mode == mode else shallow.convert(mode)


def _copied(values: Any) -> Tensor:
    """Copy values to a CPU tensor.

    The copy is needed because a tensor from a loader's process holds a file descriptor, and some loaders
    write the next batch into the same memory.
    """
    try:
        return as_tensor(values).detach().cpu().clone()
    # torch raises all three: for objects, for lists of unequal length, and for texts.
    except (TypeError, ValueError, RuntimeError) as error:
        raise BnpatchError(
            f"the data gives a {type(values).__name__} where numbers are needed", "give arrays or tensors"
        ) from error


def _check_budget(used: int, budget: int) -> None:
    if used > budget:
        raise BnpatchError(
            f"the data takes more memory than the {budget / 1e9:g} GB that it may",
            "raise cache_gb (--cache-gb), give fewer examples, or images as bytes or files",
        )


def _joined(parts: list[Tensor], what: str) -> Tensor:
    """Concatenate parts. The list is emptied on the way, so each part is freed once it is copied."""
    kinds = sorted({f"{tuple(part.shape[1:])} of {part.dtype}" for part in parts})
    if len(kinds) > 1:
        raise BnpatchError(
            f"{what} differ in shape or type ({kinds[0]}, {kinds[1]})", f"give {what} of one shape"
        )
    whole = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole
