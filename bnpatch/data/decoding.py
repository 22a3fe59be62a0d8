"""From a place where examples lie to inputs, in processes of their own where that pays."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Indices = npt.NDArray[np.int64]
ItemTransform = Callable[[Image.Image], npt.NDArray[np.uint8]]

# An array, which a process sends faster than a tensor; or a tensor that is no image; or why there is none.
_Item = tuple[npt.NDArray[np.uint8] | Tensor | None, str]

# So many are sent by a process together: fewer waits, and memory for no more than some dozens.
_AT_ONCE = 8


class Source(Protocol):
    """Where examples come from, before any preprocessing."""

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, index: int) -> Image.Image | Tensor:
        """An image to preprocess, or an input as it is; raises where it can't be read."""

    def name(self, index: int) -> str:
        """What to call the example in messages."""

    def content(self, index: int) -> bytes:
        """What tells the example from others of the same name, if that is cheap to have."""


def decoded(
    source: Source, transform: ItemTransform, indices: list[int], num_workers: int | None
) -> Iterator[tuple[Tensor | None, str]]:
    """Read examples in this order; yield each one's input, or None and why there is none.

    Args:
        source: where they come from.
        transform: from an image to bytes (C, H, W).
        indices: which.
        num_workers: processes; None for a number that suits the machine and the data.
    """
    if not indices:
        return
    if num_workers is None:  # starting a process costs as much as decoding some hundred images
        num_workers = min(8, os.cpu_count() or 1, len(indices) // 256)
    for some in DataLoader(
        _Decoded(source, transform, indices),
        batch_size=_AT_ONCE,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_as_they_are,
        worker_init_fn=_leave_interrupts_to_the_main_process,
    ):
        for x, problem in some:
            if isinstance(x, np.ndarray):
                x = torch.from_numpy(x)
            elif x is not None:
                x = x.clone()  # what another process made holds a file descriptor
            yield x, problem


def _as_they_are(items: list[_Item]) -> list[_Item]:
    return items


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Part:
    """Some examples of a source, as a source."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image | Tensor:
        """Its image or input."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Its name."""
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        """Its content."""
        return self.source.content(int(self.indices[index]))


class _Decoded(Dataset[_Item]):
    """Runs in the worker processes: an example's input, or why there is none."""

    def __init__(self, source: Source, transform: ItemTransform, indices: list[int]) -> None:
        self.source, self.transform, self.indices = source, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        try:
            item = self.source.read(self.indices[position])
            if isinstance(item, Tensor):
                return item, ""
            return np.array(self.transform(item)), ""
        except (
            Exception
        ) as error:  # whatever a decoder raises for a broken file: it is one image, not the run
            return None, f"{type(error).__name__}: {error}"
