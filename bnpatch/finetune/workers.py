"""Processes that load training images, of which each has random generators of its own."""

import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import DataLoader

from bnpatch.core.errors import BnpatchWarning

# Bytes that the copies of a data set in all processes may take.
_COPIES = 4 * 10**9


def loaded(loader_options: dict[str, Any], num_workers: int) -> Iterator[Any]:
    """Yield the batches of a data loader with this number of worker processes.

    A process that has threads must not be forked: a thread may hold a lock that the copy waits for forever.
    The workers are forked by a server process that has no threads, or start from nothing where there is no
    fork. They do not run the main script of the program again, so it needs no ``if __name__ == "__main__"``.

    Args:
        loader_options: arguments of the data loader.
        num_workers: number of processes; 0 to load in this one.
    """
    if not num_workers:
        yield from DataLoader(**loader_options)
        return
    with _hidden_main():
        loader = DataLoader(
            **loader_options,
            num_workers=num_workers,
            multiprocessing_context=_context(),
            worker_init_fn=_serve_the_main_process,
        )
        batches = iter(loader)
    yield from batches


def affordable(dataset: Any, num_workers: int) -> int:
    """Return how many processes can get a copy of a data set: at most ``num_workers``, perhaps 0.

    Warns:
        BnpatchWarning: there are fewer than asked for.
    """
    if not num_workers:
        return 0
    try:
        with _hidden_main():
            size = len(ForkingPickler.dumps(dataset))
    except Exception as error:  # the data set may be of the user's own classes, which raise what they like
        allowed, reason = 0, f"the training data can't be sent to another process ({error})"
    else:
        allowed, reason = _COPIES // size, f"each has a copy of the training data, {size / 1e9:.1f} GB"
    if allowed < num_workers:
        who = f"{allowed} of {num_workers} processes" if allowed else "the main process"
        warnings.warn(f"training images are loaded by {who}: {reason}", BnpatchWarning, stacklevel=2)
    return min(allowed, num_workers)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm.data"])  # imported once, for all workers and epochs
    return context


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide the main module, which a new process would run again to have its classes and functions."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve_the_main_process(worker: int) -> None:
    """Make a worker process end when the main process ends it or has ended itself.

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
    if main := multiprocessing.parent_process():
        main.join()
        os._exit(1)
