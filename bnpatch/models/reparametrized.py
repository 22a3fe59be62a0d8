"""Compute the tensors of a state dict that training stored in parts: pruned and normalized weights.

While a convolution is pruned, or its weight normalized, torch keeps other tensors in the place of the weight,
from which it computes the weight in each forward (``torch.nn.utils.prune``, ``weight_norm``,
``spectral_norm``). Each function here computes it once, as the forward in evaluation does.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# How weight_norm's parametrization names its parts, and what the older function calls the same.
_PARAMETRIZED = re.compile(r"^(.*?)(?:^|(?<=\.))parametrizations\.(\w+)\.original([01])$")
_NORMALIZED = {"0": "_g", "1": "_v"}


def computed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the tensors that parts stand for, in the place of the first part."""
    state = {_PARAMETRIZED.sub(_older_name, key): tensor for key, tensor in state_dict.items()}
    for suffixes, compute in _FORMULAS:
        for key in [key for key in state if key.endswith(suffixes[0])]:
            base = key.removesuffix(suffixes[0])
            names = [f"{base}{suffix}" for suffix in suffixes]
            if base in state or not all(name in state for name in names):
                continue
            weight = compute(*(state[name] for name in names))
            if weight is not None:
                state = {base if k == key else k: weight if k == key else t for k, t in state.items()}
                for name in names:
                    state.pop(name, None)
    return state


def _older_name(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2]}{_NORMALIZED[match[3]]}"


def _pruned(original: Tensor, mask: Tensor) -> Tensor | None:
    return original * mask if original.shape == mask.shape else None


def _spectral(original: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    """Divide a weight by its largest singular value, of which u and v are the vectors."""
    for axis in range(min(2, original.ndim)):  # the second for a transposed convolution
        matrix = original.movedim(axis, 0).flatten(1)
        if matrix.shape == (u.numel(), v.numel()):
            return original / (u.flatten() @ matrix @ v.flatten())
    return None


def _normalized(magnitude: Tensor, direction: Tensor) -> Tensor | None:
    """Return a weight of the given magnitude and direction; a magnitude has size 1 where it is common."""
    if magnitude.ndim not in (0, direction.ndim):
        return None
    axes = [axis for axis in range(magnitude.ndim) if magnitude.shape[axis] == 1] or None
    length = direction.square().sum(axes, keepdim=axes is not None).sqrt()
    return direction * magnitude / length if length.shape == magnitude.shape else None


_FORMULAS: tuple[tuple[tuple[str, ...], Callable[..., Tensor | None]], ...] = (
    (("_orig", "_mask"), _pruned),
    (("_orig", "_u", "_v"), _spectral),
    (("_g", "_v"), _normalized),
)
