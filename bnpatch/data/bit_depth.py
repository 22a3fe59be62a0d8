"""Find how many bits the values of 16- and 32-bit images use: many cameras store 12 bits in 16."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.image_files import check_size, open_image

_ROWS = 256  # number of rows of an image that are converted at a time
_BITS = (8, 10, 12, 14, 16)  # the bit depths of sensors
_MOST = 32
_DEEP_COLOR = 4  # a pixel with 16 bits per channel counts as this many, because the image is decoded twice

# Suffixes of formats that have only 8 bits.
_EIGHT_BITS = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"}

# The size of a sample: the most files per folder, the most of all folders (but at least one of each), and the
# most that are opened.
_PER_FOLDER, _DECODED, _OPENED = 8, 128, 512

# An image that uses fewer bits than this would be almost black as a 16-bit image, so it probably isn't one.
_DARK = 12


@dataclass(frozen=True)
class BitDepth:
    """The number of bits that the values of images in 16 or 32 bits use.

    Attributes:
        bits: the number of bits.
        origin: "given": the user gave it, and larger values become white. "found": it comes from a sample of
            the images, and an image with larger values can't be read. "unseen": the sample had no such image,
            and an image that would be almost black can't be read either. "standard": always 16 bits.
    """

    bits: int = 16
    origin: Literal["given", "found", "unseen", "standard"] = "standard"

    @property
    def needs_low_bytes(self) -> bool:
        """Whether the high byte of a 16-bit value isn't enough to know the eight bits that count."""
        return self.bits != STANDARD.bits or self.origin == "unseen"

    def to_bytes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return the eight highest bits of values of any shape.

        Raises:
            ValueError: a value is negative or has more bits, or the image is suspiciously dark.
        """
        largest = _largest(values)
        if self.origin != "given":
            if largest >> self.bits:
                raise ValueError(f"values up to {largest}, beyond {self.bits} bits (--bit-depth)")
            if self.origin == "unseen" and 0 < largest < 1 << _DARK:
                raise ValueError(f"values up to {largest} only, almost black as 16 bits (--bit-depth)")
        eight = np.empty(values.shape, np.uint8)
        for rows in _strips(len(values)):
            eight[rows] = (values[rows].astype(np.uint32) >> (self.bits - 8)).clip(0, 255)
        return eight


STANDARD = BitDepth()


def given(bits: int) -> BitDepth:
    """Return the bit depth that a user gives.

    Raises:
        BnpatchError: the number is less than 8 or more than 32.
    """
    if not 8 <= bits <= _MOST:
        raise BnpatchError(f"images of {bits} bits can't be read", f"choose a --bit-depth of 8 to {_MOST}")
    return BitDepth(bits, "given")


def of_sample(images: Iterable[Callable[[], npt.NDArray[Any] | None]], where: str) -> BitDepth:
    """Find the bit depth of a data set from the largest value in a sample of its images.

    A single image is not enough, because it may be dark. The function warns if the values need less than 16
    bits.

    Args:
        images: one function per image of the sample, which returns its values, or None for 8 bits.
        where: name of the data set, for the message.
    """
    largest = -1
    for values in images:
        with contextlib.suppress(Exception):  # an image that can't be read is reported when it is used
            found = values()
            largest = max(largest, -1 if found is None else _largest(found))
            del found  # before the next one is decoded
        if largest >> _BITS[-2] > 0:
            return BitDepth(16, "found")
    if largest < 0:
        return BitDepth(16, "unseen")
    bits = next(bits for bits in _BITS if not largest >> bits)
    warnings.warn(
        f"images of {where} that are stored in 16 or 32 bits have values up to {largest}: they are taken for "
        f"{bits} bits, --bit-depth N (bit_depth=N) says otherwise",
        BnpatchWarning,
        stacklevel=4,
    )
    return BitDepth(bits, "found")


def of_files(folders: Collection[Sequence[Path]], where: str) -> BitDepth:
    """Find the bit depth of images in folders, see :func:`of_sample`.

    Args:
        folders: the files of each folder, of which a few are opened and, if they have more than 8 bits,
            decoded.
        where: the data set, for the message.
    """
    each = max(1, min(_PER_FOLDER, _DECODED // max(1, len(folders))))
    sample = [path for paths in folders for path in _spread(paths, each)]
    deep = [path for path in sample if path.suffix.lower() not in _EIGHT_BITS]
    return of_sample((functools.partial(_values_of_file, path) for path in _spread(deep, _OPENED)), where)


def _values_of_file(path: Path) -> npt.NDArray[Any] | None:
    with open_image(path) as image:
        colors = deep_colors(path, image)
        return deep_values(image) if colors is None else colors


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Return ``count`` of the paths, evenly spaced."""
    return [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else list(paths)


def deep_values(image: Image.Image) -> npt.NDArray[Any] | None:
    """Return the values (H, W) of an image of 16 or 32 bits in one channel; None for other images."""
    return np.asarray(image) if image.mode.startswith("I") else None


def deep_colors(path: Path, image: Image.Image) -> npt.NDArray[np.uint16] | None:
    """Return the values (H, W, 3) of a 16-bit color image. Pillow itself decodes only its high bytes.

    An alpha channel is left out, because it has 16 bits even if the colors have fewer.

    Args:
        path: the file.
        image: the same image, opened and not yet decoded; it is not changed.

    Returns:
        None for other images, and where Pillow has no decoder for the low bytes.
    """
    tiles: list[Any] = getattr(image, "tile", None) or []
    modes = {_raw_mode(tile) for tile in tiles}
    if image.mode not in ("RGB", "RGBA") or len(modes) != 1:
        return None
    if not (swapped := _swapped(modes.pop())):
        return None
    check_size(image, weight=_DEEP_COLOR)
    values = np.zeros((image.height, image.width, 3), np.uint16)
    for raw_mode in ("", swapped):  # one after the other: each takes 4 bytes per pixel while it is decoded
        with Image.open(path) as part:
            if raw_mode:
                vars(part)["tile"] = [_with_mode(tile, raw_mode) for tile in tiles]
            try:
                part.load()
            except ValueError:  # Pillow has no such raw mode
                return None
            for rows in _strips(part.height):
                strip = np.asarray(part.crop((0, rows.start, part.width, rows.stop)))
                values[rows] = values[rows] << 8 | strip[..., :3]
    return values


def _with_mode(tile: Any, raw_mode: str) -> Any:
    """Return a copy of a tile, which tells Pillow how to decode a part of an image, with another raw mode."""
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    return type(tile)(*tile[:3], arguments)


def _strips(height: int) -> Iterator[slice]:
    """Yield strips of rows, so that intermediate values of a large image are never there for all of it."""
    return (slice(start, min(start + _ROWS, height)) for start in range(0, height, _ROWS))


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _swapped(mode: str) -> str | None:
    """Return the 16-bit raw mode with the other byte order, by which Pillow reads the low bytes, or None."""
    name, _, bits = mode.partition(";")
    other = "B" if sys.byteorder == "little" else "L"
    swaps = {"16B": "16L", "16L": "16B", "16N": f"16{other}"}
    return f"{name};{swaps[bits]}" if bits in swaps else None


def _largest(values: npt.NDArray[Any]) -> int:
    if values.size and values.min() < 0:
        raise ValueError("negative values, whose range is not known")
    return int(values.max()) if values.size else 0
