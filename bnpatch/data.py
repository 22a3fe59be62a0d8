"""Labelled examples, decoded once and served in batches any number of times."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnpatch.errors import BnpatchError

Indices = npt.NDArray[np.int64]
ItemTransform = Callable[[Image.Image], npt.NDArray[np.uint8]]


class Source(Protocol):
    """Where examples come from, before any preprocessing."""

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, index: int) -> Image.Image | Tensor:
        """An image to preprocess, or an input as it is; raises where it can't be read."""

    def name(self, index: int) -> str:
        """What to call the example in messages."""


@dataclass(frozen=True)
class Batch:
    """Some examples, in the order of their indices: ``x`` (N, C, H, W), ``targets`` (N,)."""

    indices: Indices
    x: Tensor
    targets: Tensor


class Examples:
    """A data set of labelled examples that serves batches any number of times.

    What is decoded stays in memory as bytes, up to ``cache_gb``; the rest is decoded again at each
    pass. Examples that can't be read are left out and counted in ``skipped``.

    Args:
        source: where images come from.
        targets: class index of each example, of shape (N,).
        transform: from an image to bytes (C, H, W).
        num_workers: decoding processes; None for a number that suits the machine and the data.
        cache_gb: memory for decoded examples, in units of 10^9 bytes.
        strict: raise at the first example that can't be read.
        pin_memory: hand out batches in memory from which a GPU copies without waiting.
    """

    def __init__(
        self,
        source: Source,
        targets: npt.ArrayLike,
        transform: ItemTransform,
        *,
        num_workers: int | None = None,
        cache_gb: float = 4.0,
        strict: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.source = source
        self.targets = np.asarray(targets, dtype=np.int64)
        self.transform = transform
        self.num_workers = num_workers
        self.strict = strict
        self.pin_memory = pin_memory
        self.skipped: dict[int, str] = {}
        self.as_they_are = False  # inputs that no preprocessing was done to
        self._cache: dict[int, Tensor] = {}
        self._cache_left = int(cache_gb * 1e9)

    def __len__(self) -> int:
        """Number of examples, unreadable ones included until they are met."""
        return len(self.targets)

    def keep(self, indices: Indices) -> None:
        """Use only the examples with these indices from now on."""
        self.source = _Some(self.source, indices)
        self.targets = self.targets[indices]

    def batches(self, batch_size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield the examples with these indices (default: all) in this order, without the unreadable ones.

        Each index at most once.

        Raises:
            BnpatchError: an example can't be read and ``strict`` is set, or inputs differ in shape.
        """
        kept: list[tuple[int, Tensor]] = []
        for item in self._items(np.arange(len(self)) if indices is None else indices):
            kept.append(item)
            if len(kept) == batch_size:
                yield self._batch(kept)
                kept = []
        if kept:
            yield self._batch(kept)

    def fingerprint(self) -> str:
        """A hash of the names and the classes of the examples."""
        digest = hashlib.sha256(self.targets.tobytes())
        for index in range(len(self)):
            digest.update(self.source.name(index).encode())
        return digest.hexdigest()[:16]

    def _items(self, indices: Indices) -> Iterator[tuple[int, Tensor]]:
        wanted = dict.fromkeys(map(int, indices))
        missing = [i for i in wanted if i not in self._cache and i not in self.skipped]
        decoded: Iterator[tuple[Tensor | None, str]] = iter(self._loader(missing) if missing else ())
        for index in wanted:
            if index in self.skipped:
                continue
            if index in self._cache:
                yield index, self._cache[index]
                continue
            x, problem = next(decoded)
            if x is None:
                self._skip(index, problem)
                continue
            x = x.clone()  # a worker's tensor holds a file descriptor
            size = x.numel() * x.element_size()
            if size <= self._cache_left:
                self._cache[index] = x
                self._cache_left -= size
            yield index, x

    def _loader(self, indices: list[int]) -> DataLoader[Any]:
        workers = self.num_workers
        if workers is None:  # starting a process costs as much as decoding some hundred images
            workers = min(8, os.cpu_count() or 1, len(indices) // 256)
        dataset: Dataset[Any] = _Decoded(self.source, self.transform, indices)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=32 if workers else None,
            worker_init_fn=_leave_interrupts_to_the_main_process,
        )

    def _skip(self, index: int, problem: str) -> None:
        name = self.source.name(index)
        if self.strict:
            raise BnpatchError(f"cannot read {name}: {problem}", "remove it, or leave out --strict")
        self.skipped[index] = problem

    def _batch(self, items: list[tuple[int, Tensor]]) -> Batch:
        indices = np.array([index for index, _ in items])
        try:
            x = torch.stack([x for _, x in items])
        except RuntimeError as error:
            raise BnpatchError(f"inputs differ in shape ({error})", "give inputs of one shape") from error
        targets = torch.from_numpy(self.targets[indices])
        if self.pin_memory:
            x, targets = x.pin_memory(), targets.pin_memory()
        return Batch(indices, x, targets)


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Some:
    """Some examples of a source."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image | Tensor:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


class _Decoded(Dataset[tuple[Tensor | None, str]]):
    """Runs in the worker processes: an example's input, or why there is none."""

    def __init__(self, source: Source, transform: ItemTransform, indices: list[int]) -> None:
        self.source, self.transform, self.indices = source, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor | None, str]:
        try:
            item = self.source.read(self.indices[position])
            if isinstance(item, Tensor):
                return item, ""
            return torch.from_numpy(np.array(self.transform(item))), ""
        except (
            Exception
        ) as error:  # whatever a decoder raises for a broken file: it is one image, not the run
            return None, f"{type(error).__name__}: {error}"


def split(targets: npt.NDArray[np.int64], fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split examples at random into a part to tune on and a part held out, class by class.

    Args:
        targets: class indices, of shape (N,).
        fraction: of each class, how much is held out, in (0, 1).
        seed: of the random choice.

    Returns:
        Indices of the two parts, each in ascending order.
    """
    rng = np.random.default_rng(seed)
    held: list[int] = []
    debt = 0.0  # what rounding owes, carried from class to class, so that the total is right
    for value in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == value))
        debt += fraction * len(members)
        count = min(round(debt), len(members))
        debt -= count
        held.extend(members[:count].tolist())
    held_out = np.array(sorted(held), dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), held_out), held_out
