"""Views of examples with shifted images: at random to tune on, or all with one standard corruption.

A patch that is tuned on shifted images also works on images that the user's data does not contain.
:func:`bnpatch.search.selection.without_harm` limits what that may cost on the clean images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Batch, Cache, Examples
from bnpatch.data.decoding import Indices
from bnpatch.data.standard_corruptions import STANDARD, check_installed, corrupt, parse_names

CLEAN_SHARE = 0.5  #: expected share of clean examples; each of the others gets one kind of shift
MAX_STRENGTH = 1.5  #: above it, an image could lose all of its contrast

_MID_GRAY = 127.5


def augmented(
    examples: Examples, kinds: str | Sequence[str], seed: int = 0, *, strength: float = 1.0
) -> "Augmented":
    """Make a view of examples in which about half are clean and the others are shifted.

    Each example is clean with probability 0.5; otherwise it gets one of the kinds, all equally likely. Four
    kinds are bnpatch's own, mild and fast. The size of their shift is drawn uniformly from a range. These are
    the ranges at ``strength`` 1; other strengths scale their distance from no shift:

    - contrast: the distance from mid-gray is multiplied by 0.4 to 1.4;
    - brightness: the values are multiplied by 0.4 to 1.4;
    - noise: Gaussian, with a standard deviation of 0 to 0.1 of the range of values;
    - blur: Gaussian, with a standard deviation of 0 to 0.02 of the shorter side.

    The others are the standard corruptions (:data:`~bnpatch.data.standard_corruptions.STANDARD`), without
    contrast and brightness, because these names mean bnpatch's own kinds. Their severity is 1 to 5, all
    equally likely, and ``strength`` does not change it. ``gaussian_noise`` is stronger than ``noise``: its
    standard deviation is 0.08 to 0.38 of the range.

    The shift of an example depends only on its index and the seed. The view shares the cache of ``examples``,
    so no image is decoded or stored twice.

    Args:
        examples: images as bytes.
        kinds: names of the shifts, in a list or in a text with commas between them.
        seed: seed of the random choices.
        strength: scales bnpatch's own shifts; in (0, 1.5].

    Raises:
        BnpatchError: a kind is not known or its package is missing, the strength is out of range, or the
            inputs are not bytes.
    """
    if not 0 < strength <= MAX_STRENGTH:
        raise BnpatchError(f"a strength of {strength} is out of range", f"choose up to {MAX_STRENGTH}")
    if examples.as_they_are:
        raise BnpatchError(
            "inputs that are floats can't be augmented, because their range is not known",
            "give images as bytes or files, or leave out --augment",
        )
    return Augmented(examples, parse_kinds(kinds), seed, strength)


def corrupted(examples: Examples, kind: str, severity: int, seed: int = 0) -> "Corrupted":
    """Make a view of examples whose images all have one standard corruption.

    The corruption of an example depends only on the kind, the severity, the seed and the index of the
    example. The view keeps corrupted images in memory, as far as the budget of ``examples`` has room beside
    the images as they are.

        foggy = corrupted(examples, "fog", 3)

    Args:
        examples: images as bytes.
        kind: a key of :data:`~bnpatch.data.standard_corruptions.STANDARD`.
        severity: 1 to 5.
        seed: seed of what is random.

    Raises:
        BnpatchError: the package with the corruptions is missing, or the inputs are not bytes.
    """
    check_installed()
    if examples.as_they_are:
        raise BnpatchError(
            "inputs that are floats can't be corrupted, because their range is not known",
            "give images as bytes or files",
        )
    return Corrupted(examples, kind, severity, seed)


def parse_kinds(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of shifts that are in a list or in a text with commas between them.

    Raises:
        BnpatchError: there is no name, a name is not known, or a name comes twice; or a standard corruption
            is named, and their package is missing.
    """
    names = parse_names(kinds, _SHIFTS, "augmentation")
    if set(names) - _OWN.keys():
        check_installed()
    return names


class Augmented(Examples):
    """A view of examples (see :func:`augmented`) that shares their cache and their list of skipped ones."""

    def __init__(self, examples: Examples, kinds: tuple[str, ...], seed: int, strength: float) -> None:
        vars(self).update(vars(examples))
        self.kinds, self.seed, self.strength = kinds, seed, strength
        # A row per example: clean or not, which kind, how much. It does not depend on the number of examples.
        self._draws = np.random.default_rng(seed).random((len(examples), 3))

    def shifts(self, indices: Indices) -> Indices:
        """Return the shift of each of these examples, (N,): 0 for none, else 1 + the position of its kind."""
        shifted = self._draws[indices, 0] >= CLEAN_SHARE
        return np.where(shifted, 1 + (self._draws[indices, 1] * len(self.kinds)).astype(np.int64), 0)

    def batches(self, batch_size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield batches as :meth:`Examples.batches` does, with shifted images.

        Raises:
            BnpatchError: the inputs are not bytes, or :meth:`Examples.batches` raises it.
        """
        for batch in super().batches(batch_size, indices):
            x = self._shifted(batch)
            yield replace(batch, x=x.pin_memory() if self.pin_memory else x)

    def fingerprint(self) -> str:
        """Hash the examples and the settings of the shifts."""
        return f"{super().fingerprint()}+{','.join(self.kinds)}@{self.strength:g}#{self.seed}"

    def _shifted(self, batch: Batch) -> Tensor:
        if batch.x.dtype != torch.uint8 or batch.x.ndim != 4:
            raise BnpatchError(
                f"inputs of {batch.x.dtype} can't be augmented", "give images as bytes or files"
            )
        x, numbers = batch.x, self.shifts(batch.indices)  # in place: a batch is a copy of the cache
        for number, kind in enumerate(self.kinds, start=1):
            (chosen,) = np.nonzero(numbers == number)
            if len(chosen):
                indices = batch.indices[chosen]
                draws = torch.from_numpy(self._draws[indices, 2]).float().view(-1, 1, 1, 1)
                keys = np.stack([np.full(len(indices), self.seed), indices], axis=1)
                values = _SHIFTS[kind](x[chosen].float(), draws, self.strength, keys)
                x[chosen] = values.round_().clamp_(0, 255).to(torch.uint8)
        return x


class Corrupted(Examples):
    """A view of examples (see :func:`corrupted`) that shares their cache and their list of skipped ones."""

    def __init__(self, examples: Examples, kind: str, severity: int, seed: int) -> None:
        vars(self).update(vars(examples))
        self.kind, self.severity, self.seed = kind, severity, seed
        self._made = Cache(self._cache.budget - self._cache.used)

    def _items(self, indices: Indices) -> Iterator[tuple[int, Tensor]]:
        for index, x in super()._items(indices):
            if x.dtype != torch.uint8 or x.ndim != 3:
                raise BnpatchError(f"inputs of {x.dtype} can't be corrupted", "give images as bytes or files")
            made = self._made.inputs.get(index)
            if made is None:
                made = torch.from_numpy(corrupt(x.numpy(), self.kind, self.severity, (self.seed, index)))
                self._made.offer(index, made)
            yield index, made

    def fingerprint(self) -> str:
        """Hash the examples and the settings of the corruption."""
        return f"{super().fingerprint()}+{self.kind}{self.severity}#{self.seed}"


# A shift takes images (N, C, H, W) with values in [0, 255], which it may overwrite; random numbers
# (N, 1, 1, 1) in [0, 1); the strength; and seeds (N, 2), from which it may draw more random numbers.
# `augmented` documents the ranges.
_Shift = Callable[[Tensor, Tensor, float, Indices], Tensor]


def _factor(draws: Tensor, strength: float) -> Tensor:
    return 1 + strength * (draws - 0.6)


def _contrast(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    return x.sub_(_MID_GRAY).mul_(_factor(draws, strength)).add_(_MID_GRAY)


def _brightness(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    return x.mul_(_factor(draws, strength))


def _noise(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    # There is one generator per example, so that its noise does not depend on its batch.
    shape = tuple(x.shape[1:])
    noise = np.stack([np.random.default_rng(key).standard_normal(shape, np.float32) for key in keys])
    return x.addcmul_(torch.from_numpy(noise), 0.1 * 255 * strength * draws)


def _blur(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
    height, width = x.shape[2:]
    sigmas = (0.02 * strength * min(height, width) * draws.flatten()).tolist()
    # There is one product per example, because a batched product may round differently in another batch size.
    return torch.stack(
        [
            _gaussian(height, sigma) @ image @ _gaussian(width, sigma).T
            for image, sigma in zip(x, sigmas, strict=True)
        ]
    )


def _gaussian(size: int, sigma: float) -> Tensor:
    """Return the matrix (size, size) that blurs along an axis; its rows sum to 1, also at the border."""
    at = torch.arange(size, dtype=torch.float32)
    return torch.softmax(-((at[:, None] - at) ** 2) / (2 * max(sigma, 1e-3) ** 2), dim=1)


def _standard(kind: str) -> _Shift:
    def shift(x: Tensor, draws: Tensor, strength: float, keys: Indices) -> Tensor:
        severities = (1 + 5 * draws.flatten()).int().tolist()
        images = x.to(torch.uint8).numpy()  # exact, because the values were bytes before
        made = [corrupt(image, kind, s, key) for image, s, key in zip(images, severities, keys, strict=True)]
        return torch.from_numpy(np.stack(made)).float()

    return shift


_OWN: dict[str, _Shift] = {
    "contrast": _contrast,
    "brightness": _brightness,
    "noise": _noise,
    "blur": _blur,
}
# bnpatch's own meaning counts where both have a name, because recipes of earlier versions mean it.
_SHIFTS: dict[str, _Shift] = _OWN | {kind: _standard(kind) for kind in STANDARD if kind not in _OWN}
