"""Sources of examples: image files, arrays, data sets that can be indexed, and loaders of batches."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.preprocessing import Preprocessing

Array = npt.NDArray[Any]


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

    def content(self, index: int) -> bytes:
        """Nothing: a path is enough, and reading the file is not cheap."""
        return b""


class ArrayInputs:
    """Arrays: bytes are images, floating-point values are inputs as they are."""

    def __init__(self, x: Array | Tensor, mode: str | None) -> None:
        # Without a mode, inputs as they are.
        self.x, self.mode = torch.as_tensor(x) if mode is None else x, mode

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

    def content(self, index: int) -> bytes:
        """Some hundred of the values, spread evenly."""
        values = torch.as_tensor(self.x[index]).reshape(-1)
        return values[:: max(1, len(values) // 256)].contiguous().view(torch.uint8).numpy().tobytes()


class IndexedImages:
    """A map-style data set of images, or of (image, target) pairs as torchvision's and timm's are."""

    def __init__(self, dataset: Any, preprocessing: Preprocessing) -> None:
        # timm's wrapper hands out the next image where one is broken; its reader doesn't.
        self.dataset, self.preprocessing = getattr(dataset, "reader", dataset), preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Image.Image | Tensor:
        """The image, converted; a tensor is taken as an input as it is."""
        image, _ = _parts(self.dataset[index])
        if isinstance(image, Tensor):
            return image
        with image if isinstance(image, Image.Image) else Image.open(image) as opened:
            return as_mode(opened, self.preprocessing.image_mode)

    def targets(self, budget: int) -> Array | None:
        """Target of each example, of shape (N, ...); None for a data set of images alone.

        Raises:
            BnpatchError: they differ in shape, or take more than ``budget`` bytes.
        """
        # A list of targets saves decoding every image, unless something is done to them on the way.
        if not getattr(self.dataset, "target_transform", None):
            with contextlib.suppress(ValueError):  # they differ in shape: boxes, for example
                listed = np.asarray(getattr(self.dataset, "targets", None))
                if listed.shape[:1] == (len(self),) and listed.dtype.kind in "biuf":
                    return listed
        if not len(self) or _parts(self.dataset[0])[1] is None:
            return None
        parts: list[Tensor] = []
        used = 0
        for index in range(len(self)):
            target = _parts(self.dataset[index])[1]
            parts.append(_copied(np.asarray(target) if isinstance(target, Image.Image) else target)[None])
            used += parts[-1].nbytes
            _check_budget(used, budget)
        return _joined(parts, "targets").numpy()

    def name(self, index: int) -> str:
        """The position."""
        return f"example {index}"

    def content(self, index: int) -> bytes:
        """Nothing: decoding is not cheap."""
        return b""


def drain(loader: Iterable[Any], budget: int) -> tuple[Tensor, Array | None]:
    """Take all batches of a loader into memory.

    Args:
        loader: gives batches (x, y), or x alone, of tensors or arrays.
        budget: bytes that they may take.

    Returns:
        x of shape (N, ...), and y of shape (N, ...), or None where there is none.

    Raises:
        BnpatchError: they take more, batches differ in shape, or are something else.
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    used = 0
    for batch in loader:
        x, y = _parts(batch)
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


def _parts(item: Any) -> tuple[Any, Any]:
    """The image and the target, None where there is none, of an example or of a batch."""
    if isinstance(item, Mapping):
        raise BnpatchError(
            f"the data gives dictionaries ({', '.join(map(str, item))})", "give pairs (image, target)"
        )
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _copied(values: Any) -> Tensor:
    """A copy: what a loader's process sends holds a file descriptor, and others use their memory again."""
    try:
        return torch.as_tensor(values).detach().cpu().clone()
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
    """Concatenate, taking the parts out of the list so that memory holds them hardly more than once."""
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
