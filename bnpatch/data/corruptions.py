"""Shifts that the data does not have: contrast, brightness, noise and blur, mildly and at random.

What is tuned on them is insured against images that the data at hand does not show. What that may cost on
those that it does show is for :mod:`bnpatch.search.robustness`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Batch, Examples
from bnpatch.data.decoding import Indices

CLEAN_SHARE = 0.5  #: of the examples; the others get one of the kinds each
MAX_STRENGTH = 1.5  #: beyond it an image could lose all of its contrast

_MID_GRAY = 127.5


def augmented(
    examples: Examples, kinds: str | Sequence[str], seed: int = 0, *, strength: float = 1.0
) -> "Augmented":
    """View examples as half clean, half shifted.

    Each example is clean with a chance of one half, or else one of the kinds with equal chances. How much is
    drawn evenly from a range, given here for ``strength`` 1 and in proportion to it:

    - contrast: distance from mid-gray times 0.4 to 1.4;
    - brightness: values times 0.4 to 1.4;
    - noise: Gaussian, of a standard deviation of 0 to 0.1 of the range of values;
    - blur: Gaussian, of a standard deviation of 0 to 0.02 of the shorter side.

    What an example gets depends on its index and the seed alone. Nothing is decoded or kept twice: both serve
    from one cache.

    Args:
        examples: images as bytes.
        kinds: names of the shifts, or a text with commas between them.
        seed: of the random choices.
        strength: in (0, 1.5].

    Raises:
        BnpatchError: a kind is not known, the strength is out of range, or inputs are no bytes.
    """
    if not 0 < strength <= MAX_STRENGTH:
        raise BnpatchError(f"a strength of {strength} is out of range", f"choose up to {MAX_STRENGTH}")
    if examples.as_they_are:
        raise BnpatchError(
            "inputs that are floats can't be augmented, because their range is not known",
            "give images as bytes or files, or leave out --augment",
        )
    return Augmented(examples, parse_kinds(kinds), seed, strength)


def parse_kinds(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """Names of shifts, of a list or of a text with commas between them.

    Raises:
        BnpatchError: there is none, one is not known, or one comes twice.
    """
    names = kinds.split(",") if isinstance(kinds, str) else kinds
    names = tuple(name.strip().lower() for name in names if name.strip())
    remedy = f"choose from {','.join(_SHIFTS)}"
    if not names:
        raise BnpatchError("there is nothing to augment with", remedy)
    if unknown := next((name for name in names if name not in _SHIFTS), None):
        raise BnpatchError(f"there is no augmentation {unknown!r}", remedy)
    if len(set(names)) < len(names):
        raise BnpatchError(f"{','.join(names)} has one twice", remedy)
    return names


class Augmented(Examples):
    """A view of examples, see :func:`augmented`, with what was read and what was skipped in common."""

    def __init__(self, examples: Examples, kinds: tuple[str, ...], seed: int, strength: float) -> None:
        vars(self).update(vars(examples))
        self.kinds, self.seed, self.strength = kinds, seed, strength
        # One row per example: clean or which kind, and how much. A row does not depend on how many follow.
        self._draws = np.random.default_rng(seed).random((len(examples), 3))

    def kinds_of(self, indices: Indices) -> list[str]:
        """What the examples with these indices get: the name of a kind, or "clean"."""
        return [("clean", *self.kinds)[number] for number in self._numbers(indices)]

    def _numbers(self, indices: Indices) -> Indices:
        """0 for clean, or 1 + the position of the kind, of shape (N,)."""
        shifted = self._draws[indices, 0] >= CLEAN_SHARE
        return np.where(shifted, 1 + (self._draws[indices, 1] * len(self.kinds)).astype(np.int64), 0)

    def batches(self, batch_size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """As of the examples that this is a view of, with shifts.

        Raises:
            BnpatchError: inputs are no bytes, besides what :meth:`Examples.batches` raises.
        """
        for batch in super().batches(batch_size, indices):
            x = self._shifted(batch)
            yield replace(batch, x=x.pin_memory() if self.pin_memory else x)

    def fingerprint(self) -> str:
        """Different from that of the examples themselves, and for each setting."""
        return f"{super().fingerprint()}+{','.join(self.kinds)}@{self.strength:g}#{self.seed}"

    def _shifted(self, batch: Batch) -> Tensor:
        if batch.x.dtype != torch.uint8 or batch.x.ndim != 4:
            raise BnpatchError(
                f"inputs of {batch.x.dtype} can't be augmented", "give images as bytes or files"
            )
        x, numbers = batch.x, self._numbers(batch.indices)  # a batch is a copy already
        for number, kind in enumerate(self.kinds, start=1):
            (chosen,) = np.nonzero(numbers == number)
            if len(chosen):
                indices = batch.indices[chosen]
                draws = torch.from_numpy(self._draws[indices, 2]).float().view(-1, 1, 1, 1)
                keys = np.stack([np.full(len(indices), self.seed), indices], axis=1)
                values = _SHIFTS[kind](x[chosen].float(), draws, self.strength, keys)
                x[chosen] = values.round_().clamp_(0, 255).to(torch.uint8)
        return x


# Each takes images (N, C, H, W) of values in [0, 255], which it may overwrite; draws (N, 1, 1, 1) in [0, 1);
# the strength; and seeds (N, 2) for what takes more than one draw. `augmented` documents the ranges.
_Shift = Callable[[Tensor, Tensor, float, Indices], Tensor]


def _factor(draws: Tensor, strength: float) -> Tensor:
    return 1 + strength * (draws - 0.6)


def _contrast(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    return x.sub_(_MID_GRAY).mul_(_factor(draws, strength)).add_(_MID_GRAY)


def _brightness(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    return x.mul_(_factor(draws, strength))


def _noise(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    # One generator per example, so that its noise does not depend on the batch that it is in.
    shape = tuple(x.shape[1:])
    noise = np.stack([np.random.default_rng(key).standard_normal(shape, np.float32) for key in keys])
    return x.addcmul_(torch.from_numpy(noise), 0.1 * 255 * strength * draws)


def _blur(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    height, width = x.shape[2:]
    sigmas = (0.02 * strength * min(height, width) * draws.flatten()).tolist()
    # A product per example: one of the batch may be rounded otherwise for another size of the batch.
    return torch.stack(
        [
            _gaussian(height, sigma) @ image @ _gaussian(width, sigma).T
            for image, sigma in zip(x, sigmas, strict=True)
        ]
    )


def _gaussian(size: int, sigma: float) -> Tensor:
    """The matrix (size, size) that blurs along an axis; its rows sum to 1, at the border too."""
    at = torch.arange(size, dtype=torch.float32)
    return torch.softmax(-((at[:, None] - at) ** 2) / (2 * max(sigma, 1e-3) ** 2), dim=1)


_SHIFTS: dict[str, _Shift] = {
    "contrast": _contrast,
    "brightness": _brightness,
    "noise": _noise,
    "blur": _blur,
}
