"""Several processes as one, started by ``torchrun`` or ``accelerate launch``: each scores its share.

The first process searches. The others wait to be told which weights to score which examples with, so that
every decision is taken once and the result is that of a single process. What is no mean over examples, the
label-free objectives and learning by gradient, is computed by the first alone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnpatch.data.examples import Batch, Examples, Indices
from bnpatch.errors import BnpatchError
from bnpatch.evaluation import NoExamplesError, Scores, evaluate
from bnpatch.metrics import Metric, Values
from bnpatch.model import TorchModel
from bnpatch.moments import Moments
from bnpatch.patchable import Patchable
from bnpatch.search.judge import ByMetric
from bnpatch.setting import Setting


def is_first() -> bool:
    """Is this the process that searches, prints and writes? With one process it is."""
    return int(os.environ.get("RANK", "0")) == 0


def start() -> "Processes | None":
    """The processes of this run; None where there is only one.

    Raises:
        BnpatchError: there are several, and accelerate is not installed.
    """
    return Processes() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


class Processes:
    """What the processes say to each other, by way of accelerate."""

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise BnpatchError(
                "several processes need accelerate", "pip install 'bnpatch[distributed]', or start one"
            ) from error
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.count = int(state.process_index), int(state.num_processes)
        if self.count != int(os.environ["WORLD_SIZE"]):
            raise BnpatchError(
                f"accelerate sees {self.count} of {os.environ['WORLD_SIZE']} processes",
                "start them with torchrun or accelerate launch",
            )

    def tell(self, message: Any) -> Any:
        """What the first process says, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([message if self.rank == 0 else None])[0]

    def collect(self, part: Any) -> list[Any]:
        """What each of them has, in the order of their ranks, in all of them."""
        from accelerate.utils import gather_object

        return list(gather_object([part]))


@dataclass(frozen=True)
class _Work:
    """What the first process wants scored: by which judge, on which examples, with which weights."""

    judge: int
    indices: Indices
    setting: Setting
    targets: Mapping[str, Moments[Any]] | None  # only where they are new


@dataclass(frozen=True)
class _Done:
    """There is no more work; the result, or None where the first process failed."""

    result: Any


class SharedJudge:
    """A judge whose examples are scored by all processes; for the first of them."""

    def __init__(self, judge: ByMetric, number: int, processes: Processes) -> None:
        self._judge, self._number, self._processes = judge, number, processes
        self._told: Mapping[str, Moments[Any]] | None = None

    @property
    def metric(self) -> Metric:
        """What is tuned."""
        return self._judge.metric

    @property
    def set_size(self) -> int:
        """Every example has a score of its own."""
        return 1

    def scores(self, model: Patchable, examples: Examples, indices: Indices) -> dict[str, Values]:
        """See :class:`bnpatch.search.judge.Judge`."""
        targets = dict(model.targets())
        told = self._told or {}
        news = None if all(told.get(name) is part for name, part in targets.items()) else targets
        self._told = targets
        self._processes.tell(_Work(self._number, indices, model.setting(), news))
        return _score(self._judge, model, examples, indices, self._processes)

    def loss(self, model: TorchModel, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Of the first process alone."""
        return self._judge.loss(model, batches)


def serve(processes: Processes, model: Patchable, judges: Mapping[int, tuple[ByMetric, Examples]]) -> Any:
    """Score what the first process asks for, until it is done.

    Args:
        processes: of which this is not the first.
        model: the same as there.
        judges: by number, a judge and the examples that it is asked about, the same as there.

    Returns:
        The result of the first process.

    Raises:
        BnpatchError: that process failed, and says why.
    """
    while True:
        message = processes.tell(None)
        if isinstance(message, _Done):
            if message.result is None:
                raise BnpatchError("the first process failed", "see what it says")
            return message.result
        if message.targets is not None:
            model.retarget(message.targets)
        model.set(message.setting)
        judge, examples = judges[message.judge]
        with suppress(BnpatchError):  # the first process has it as well, and decides
            _score(judge, model, examples, message.indices, processes)


def dismiss(processes: Processes, result: Any) -> None:
    """Tell the other processes that there is no more work."""
    processes.tell(_Done(result))


def _score(
    judge: ByMetric, model: Patchable, examples: Examples, indices: Indices, processes: Processes
) -> dict[str, Values]:
    """This process scores its share, and all of them get all scores, in the order of ``indices``."""
    mine: Any
    try:
        share = indices[processes.rank :: processes.count]
        mine = evaluate(model, examples, judge.metrics, indices=share, batch_size=judge.batch_size)
    except NoExamplesError:
        mine = Scores(np.zeros(0, np.int64), {m.name: np.zeros(0) for m in judge.metrics})
    except BnpatchError as error:
        mine = error  # the others must not wait for ever
    parts = processes.collect((mine, examples.skipped))
    if errors := [part for part, _ in parts if isinstance(part, BnpatchError)]:
        raise errors[0]
    for _, skipped in parts:
        examples.skipped.update(skipped)
    place = {int(index): position for position, index in enumerate(indices)}
    read = np.concatenate([part.indices for part, _ in parts])
    order = np.argsort([place[int(index)] for index in read], kind="stable")
    return {
        metric.name: np.concatenate([part.values[metric.name] for part, _ in parts])[order]
        for metric in judge.metrics
    }
