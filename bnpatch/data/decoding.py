"""Read and decode examples into inputs, in worker processes if there are enough of them."""

import multiprocessing
import os
import signal
import threading
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

# What a worker process returns: an array (a process sends it faster than a tensor), or a tensor that is no
# image, or None; and why it is None.
_Item = tuple[npt.NDArray[np.uint8] | Tensor | None, str]

# Number of examples that a process sends together: few enough waits, and memory for a few dozen examples.
_AT_ONCE = 8


class Source(Protocol):
    """The images of a data set before any preprocessing, by index."""

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, index: int) -> Image.Image | Tensor:
        """Return an image to preprocess, or an input as the model takes it; raise if it can't be read."""

    def name(self, index: int) -> str:
        """Return the name of the example, for messages."""

    def content(self, index: int) -> bytes:
        """Return bytes that differ if the content does, or none if reading the content is slow."""


def decoded(
    source: Source, transform: ItemTransform, indices: list[int], num_workers: int | None
) -> Iterator[tuple[Tensor | None, str]]:
    """Read examples in this order; yield the input and "" for each, or None and why it can't be read.

    Args:
        source: where the examples come from.
        transform: converts an image to bytes (C, H, W).
        indices: which examples to read.
        num_workers: number of processes; None for a number that suits the machine and the data.
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
        worker_init_fn=serve_the_main_process,
    ):
        for x, problem in some:
            if isinstance(x, np.ndarray):
                x = torch.from_numpy(x)
            elif x is not None:
                x = x.clone()  # a tensor from another process holds a file descriptor; the copy does not
            yield x, problem


def _as_they_are(items: list[_Item]) -> list[_Item]:
    return items


def serve_the_main_process(worker: int) -> None:
    """Make a worker process of a data loader end when the main process ends it or has ended itself.

    Signals often reach all processes of a program. The worker ignores interrupts and the first request to
    terminate, because the main process decides whether the work ends.
    """
    asked: list[int] = []

    def terminate(number: int, frame: object) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """Wait until the main process ends; a worker that is blocked would not notice it otherwise."""
    main, parent = multiprocessing.parent_process(), os.getppid()
    if main is None:
        return  # this is the main process
    # Other workers may hold the pipe that signals the end open, so the parent's id is checked as well.
    while main.is_alive() and os.getppid() == parent:
        main.join(1)
    os._exit(1)


class Part:
    """A source with some of the examples of another source."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image | Tensor:
        """Return the image or input."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Return the name."""
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        """Return the content."""
        return self.source.content(int(self.indices[index]))


class _Decoded(Dataset[_Item]):
    """The data set that worker processes read: an example's input, or why it can't be read."""

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
        ) as error:  # decoders raise any type of error for a broken file, which must not end the run
            return None, f"{type(error).__name__}: {error}"
