"""Find the layer that normalizes images inside of a model, as projects on robustness build them.

The mean and the standard deviation are buffers, so that a state dict has them, or attributes of the layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.data.preprocessing import Preprocessing

# How layers call the mean and the standard deviation.
_NAMES = (("mean", "std"), ("new_mean", "new_std"), ("mu", "sigma"), ("pixel_mean", "pixel_std"))
_CHANNELS = (1, 3)
_BYTES = 255.0


@dataclass(frozen=True)
class Normalizer:
    """A layer that normalizes images.

    Attributes:
        name: name of its mean, among the weights or in the module.
        mean: mean per channel.
        std: standard deviation per channel.
        scale: the largest value of an image as the layer takes it, 1 or 255.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    def in_place_of(self, preprocessing: Preprocessing) -> Preprocessing:
        """Return a preprocessing that does what the layer does, for the model without it."""
        mean, std = (tuple(round(v / self.scale, 6) for v in part) for part in (self.mean, self.std))
        source = f"{preprocessing.source}, but mean and std of the weights' {self.name}"
        return replace(preprocessing, mean=mean, std=std, source=source)


def split_off(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Normalizer | None]:
    """Return a state dict without the mean and std of such a layer, and the layer.

    Without such a layer, and with two that differ, the state dict stays as it is.
    """
    found: list[Normalizer] = []
    left = dict(state_dict)
    for key in state_dict:
        prefix, dot, last = key.rpartition(".")
        for mean, std in _NAMES:
            other = f"{prefix}{dot}{std}"
            if last == mean and (layer := _normalizer(key, state_dict[key], state_dict.get(other))):
                found.append(layer)
                del left[key], left[other]
    if not found or any((n.mean, n.std) != (found[0].mean, found[0].std) for n in found):
        return dict(state_dict), None
    return left, found[0]


def inside(module: nn.Module) -> Normalizer | None:
    """Return the first such layer in a module; None if it has none.

    Lists count only in a layer of nothing else, such as torchvision's Normalize. A whole model may have such
    lists to tell how images have to be prepared for it.
    """
    for name, part in module.named_modules():
        is_layer = not any(True for _ in part.parameters()) and not any(True for _ in part.children())
        values = vars(part) | part._buffers
        for mean, std in _NAMES:
            pair = values.get(mean), values.get(std)
            found = _normalizer(f"{name}.{mean}".lstrip("."), *pair)
            if found and (is_layer or all(isinstance(p, Tensor) for p in pair)):
                return found
    return None


def _normalizer(name: str, mean: Any, std: Any) -> Normalizer | None:
    """Return a layer; None if the values can't be a mean and a deviation of colors or of gray."""
    try:
        low, high = (torch.as_tensor(part).detach().cpu().double().flatten() for part in (mean, std))
    except (TypeError, ValueError, RuntimeError):  # None, texts, other objects
        return None
    if len(low) != len(high) or len(low) not in _CHANNELS:
        return None
    both = torch.cat([low, high])
    if not (bool((high > 0).all()) and bool((low >= 0).all()) and float(both.max()) <= _BYTES):
        return None  # nan, too
    return Normalizer(name, tuple(low.tolist()), tuple(high.tolist()), _BYTES if both.max() > 1 else 1.0)
