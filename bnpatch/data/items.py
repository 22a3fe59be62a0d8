"""What the examples and batches of a data set may be: pairs or dictionaries, of images in many forms."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bnpatch.core.errors import BnpatchError

# Keys of an image and of its class in examples that are dictionaries, as those of Hugging Face's data sets.
_IMAGES = ("image", "img", "pixel_values", "images", "x", "input", "inputs")
TARGETS = ("label", "labels", "target", "targets", "fine_label", "y", "class")


def parts(item: Any) -> tuple[Any, Any]:
    """Return the image and the target (None if there is none) of an example or of a batch."""
    if isinstance(item, Mapping):
        image, target = (next((k for k in keys if k in item), None) for keys in (_IMAGES, TARGETS))
        if image is None or (target is None and len(item) > 1):
            raise BnpatchError(
                f"the data gives dictionaries ({', '.join(map(str, item))})",
                "call the parts image and label, or give pairs (image, target)",
            )
        return item[image], None if target is None else item[target]
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def are_batches(data: Any) -> bool:
    """Tell whether a list has batches (x, y), and not examples: as many targets as inputs in each."""
    pairs = [tuple(batch) for batch in data if isinstance(batch, (tuple, list)) and len(batch) in (2, 3)]
    return 0 < len(data) == len(pairs) and all(
        hasattr(x, "shape") and len(x.shape) > 3 and hasattr(y, "shape") and y.shape[:1] == x.shape[:1]
        for x, y, *_ in pairs
    )


def as_tensor(values: Any) -> Tensor:
    """Return values as a tensor, and copy arrays that torch refuses: reversed ones, as BGR made RGB."""
    if isinstance(values, np.ndarray) and (min(values.strides, default=0) < 0 or not values.dtype.isnative):
        values = np.array(values, values.dtype.newbyteorder("="))
    return torch.as_tensor(values)


def opened(item: Any) -> Image.Image | Tensor:
    """Return the image of an example; or floats as a tensor, which are inputs as the model takes them."""
    image, _ = parts(item)
    if isinstance(image, Mapping):  # of Hugging Face's data sets, if they are told not to decode
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, (np.ndarray, Tensor)):
        values = as_tensor(image)
        return values if values.is_floating_point() else image_of(image)
    return image if isinstance(image, Image.Image) else Image.open(image)


def image_of(values: npt.NDArray[Any] | Tensor) -> Image.Image:
    """Make an image of an array of bytes, or of deeper gray, whose channels may be first or last."""
    image = np.asarray(values)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.transpose(1, 2, 0)
    try:
        return Image.fromarray(np.ascontiguousarray(image.squeeze()))
    except TypeError as error:
        raise ValueError(f"an image of {image.dtype} and shape {image.shape}, not of bytes") from error
