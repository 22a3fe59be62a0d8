"""The fifteen standard corruptions, each in five severities, from the package imagecorruptions-imaug.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. Their severities are made for images of 224 pixels. On smaller images the same
number of pixels is a larger part, so that the same severity is a stronger corruption.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.core.errors import BnpatchError, first_line

Bytes = npt.NDArray[np.uint8]

#: The kinds of corruption, and the group that the paper puts each in.
STANDARD: Mapping[str, str] = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "defocus_blur": "blur",
    "glass_blur": "blur",
    "motion_blur": "blur",
    "zoom_blur": "blur",
    "snow": "weather",
    "frost": "weather",
    "fog": "weather",
    "brightness": "weather",
    "contrast": "digital",
    "elastic_transform": "digital",
    "pixelate": "digital",
    "jpeg_compression": "digital",
}

SEVERITIES = (1, 2, 3, 4, 5)

#: The shortest side of an image that the package takes.
SHORTEST_SIDE = 32

# Kinds that draw from a generator of their own, whose seed they take as an argument. All others draw from
# NumPy's global generator.
_SEEDED_BY_ARGUMENT = {"impulse_noise", "glass_blur"}

_GLOBAL_GENERATOR = threading.Lock()


def check_installed() -> None:
    """Check that the package with the corruptions can be imported.

    Raises:
        BnpatchError: it can't; the message says what to install.
    """
    try:
        import imagecorruptions  # noqa: F401
    except ModuleNotFoundError as error:
        raise BnpatchError(
            f"the standard corruptions need the package imagecorruptions-imaug, and there is no {error.name}",
            "pip install 'bnpatch[robustness]'",
        ) from error
    except ImportError as error:  # OpenCV with windows needs libraries that servers don't have
        raise BnpatchError(
            f"the package imagecorruptions can't be imported: {first_line(error)}",
            "if OpenCV lacks a library: pip uninstall -y opencv-python; pip install opencv-python-headless",
        ) from error


def corrupt(image: Bytes, kind: str, severity: int, key: Sequence[int]) -> Bytes:
    """Corrupt an image. The result depends on the arguments alone, in any thread or process.

    An image with a side below 32 pixels, which the package refuses, is padded by its mirror image to 32
    pixels, corrupted, and cut out again. A gray image is corrupted as a color image of three equal channels.
    The result is then the first channel for kinds of noise, which are independent in each channel, and the
    luminance for all other kinds.

        corrupt(image, "fog", 3, key=(0, index))

    Args:
        image: bytes of shape (C, H, W), with 1 or 3 channels.
        kind: a key of :data:`STANDARD`.
        severity: 1 to 5.
        key: numbers that seed what is random, such as a seed and the index of the image.

    Returns:
        Bytes of the same shape.

    Raises:
        BnpatchError: the package is missing, or the image has another number of channels.
    """
    check_installed()
    from imagecorruptions import corrupt as corrupted

    channels, height, width = image.shape
    if channels not in (1, 3):
        raise BnpatchError(
            f"images of {channels} channels can't be corrupted", "use a model that takes 1 or 3 channels"
        )
    low, high = zip(*map(_margins, (height, width)), strict=True)
    margins = [(0, 0), (low[0], high[0]), (low[1], high[1])]
    padded = np.pad(image, margins, mode="symmetric").transpose(1, 2, 0)
    seed = _seed(kind, severity, key)
    options: dict[str, Any] = {"severity": severity, "corruption_name": kind}
    with _global_generator(seed):
        if kind in _SEEDED_BY_ARGUMENT:
            options["seed"] = seed
        result: Bytes = corrupted(np.ascontiguousarray(padded), **options)
    if channels == 1:
        result = result[..., :1] if STANDARD[kind] == "noise" else _luminance(result)
    result = result[low[0] : low[0] + height, low[1] : low[1] + width].transpose(2, 0, 1)
    return np.array(result, order="C")  # a copy that can be written to, in the order of its axes


def parse_standard_kinds(kinds: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of standard corruptions in a list or in a text with commas; None means all of them.

    Raises:
        BnpatchError: there is no name, a name is not known, or a name comes twice.
    """
    return parse_names(STANDARD if kinds is None else kinds, STANDARD, "corruption")


def parse_names(
    names: str | Sequence[str] | Mapping[str, Any], known: Mapping[str, Any], what: str
) -> tuple[str, ...]:
    """Return the names in a list, or in a text with commas between them.

    Args:
        names: the list or the text.
        known: the names that are allowed.
        what: what a name stands for, for messages.

    Raises:
        BnpatchError: there is no name, a name is not known, or a name comes twice.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    found = tuple(name.strip().lower() for name in parts if name.strip())
    remedy = f"choose from {','.join(known)}"
    if not found:
        raise BnpatchError(f"no {what} is named", remedy)
    if unknown := next((name for name in found if name not in known), None):
        raise BnpatchError(f"there is no {what} {unknown!r}", remedy)
    if len(set(found)) < len(found):
        raise BnpatchError(f"{','.join(found)} has one twice", remedy)
    return found


def _margins(side: int) -> tuple[int, int]:
    """Return how many pixels to add before and after a side."""
    missing = max(0, SHORTEST_SIDE - side)
    return missing // 2, missing - missing // 2


def _luminance(image: Bytes) -> Bytes:
    """Return an image (H, W, 3) as gray (H, W, 1), by the weights of ITU-R 601, as Pillow does."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def _seed(kind: str, severity: int, key: Sequence[int]) -> int:
    """Return a seed that differs for each kind, severity and key."""
    words = np.random.SeedSequence([*key, list(STANDARD).index(kind), severity])
    return int(words.generate_state(1)[0])


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, and restore its state when the context ends; one thread at a time."""
    with _GLOBAL_GENERATOR:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
