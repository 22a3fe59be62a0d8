"""Read and decode examples into inputs, in threads if there are enough of them.

Pillow and the file system release Python's lock most of the time, so that threads decode as fast as processes
do, and nothing has to be started, sent or ended (docs/decisions/0015).
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Indices = npt.NDArray[np.int64]
ItemTransform = Callable[[Image.Image], npt.NDArray[np.uint8]]

#: An input, or None if it can't be read; and the reason for that, or "".
Item = tuple[Tensor | None, str]

# Number of examples per thread that are decoded before they are asked for: enough to keep the threads busy
# while a model computes, and memory for a few dozen examples.
_AHEAD = 32

# The most pixels that all threads together hold at a time; an image that has more is decoded alone. Pillow
# takes 4 bytes for a pixel, and as many again while it converts the image.
_MOST_PIXELS = 128_000_000


class _Room:
    """A limit to the pixels in memory. A thread waits until its image fits, before it decodes the image."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.changed = threading.Condition()
        self.mine = threading.local()  # "pixels": what this thread has taken; missing outside of reserved()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Give back, when the block ends, the room that :meth:`take` took inside it."""
        self.mine.pixels = 0
        try:
            yield
        finally:
            with self.changed:
                self.used -= self.mine.pixels
                self.changed.notify_all()
            del self.mine.pixels

    def take(self, pixels: int) -> None:
        """Wait until there is room for an image.

        Do nothing outside of :meth:`reserved`, nor for a second image in the same block.
        """
        if getattr(self.mine, "pixels", None) == 0:
            pixels = min(pixels, self.size)
            with self.changed:
                self.changed.wait_for(lambda: self.used + pixels <= self.size)
                self.used += pixels
            self.mine.pixels = pixels


#: The room for the images that are decoded in this process.
ROOM = _Room(_MOST_PIXELS)


class Source(Protocol):
    """The images of a data set before any preprocessing, by index."""

    thread_safe: bool  #: whether several threads may read at the same time

    def __len__(self) -> int:
        """Return the number of examples."""

    def read(self, index: int) -> Image.Image | Tensor:
        """Return an image to preprocess, or an input as the model takes it; raise if it can't be read.

        A source of images that may be large takes room in :data:`ROOM` before it decodes one.
        """

    def name(self, index: int) -> str:
        """Return the name of the example, for messages."""

    def content(self, index: int) -> bytes:
        """Return bytes that differ if the content does, or none if reading the content is slow."""


def decoded(
    source: Source, transform: ItemTransform, indices: list[int], num_workers: int | None
) -> Iterator[Item]:
    """Read examples in this order; yield the input and "" for each, or None and why it can't be read.

    Args:
        source: where the examples come from.
        transform: converts an image to bytes (C, H, W).
        indices: which examples to read.
        num_workers: number of threads, 0 to read in the caller's thread; None for a number that suits the
            machine and the data, which is 0 if the source is not safe to read from several threads.
    """

    def read(index: int) -> Item:
        try:
            with ROOM.reserved():
                item = source.read(index)
                if isinstance(item, Tensor):
                    return item.clone(), ""  # a data set may write its next input to the same memory
                return torch.from_numpy(np.array(transform(item))), ""
        except Exception as error:  # decoders raise errors of any type; a broken file must not end the run
            return None, f"{type(error).__name__}: {error}"

    if num_workers is None:
        num_workers = min(8, os.cpu_count() or 1, len(indices) // _AHEAD) if source.thread_safe else 0
    return _in_threads(read, indices, num_workers) if num_workers else map(read, indices)


def _in_threads(read: Callable[[int], Item], indices: list[int], num_workers: int) -> Iterator[Item]:
    """Yield what ``read`` returns for each index, in this order."""
    pool = ThreadPoolExecutor(num_workers, "bnpatch-decoding")
    waiting: deque[Future[Item]] = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > _AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also where the caller stops early or is interrupted
        pool.shutdown(wait=False, cancel_futures=True)


class Part:
    """A source with some of the examples of another source."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source, self.indices = source, indices
        self.thread_safe = source.thread_safe

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
