"""Several processes as one, started by ``torchrun`` or ``accelerate launch``: each scores its share.

The first process searches. The others wait to be told which weights to score which examples with, so that
every decision is taken once and the result is that of a single process. What is no mean over examples, the
label-free objectives and learning by gradient, is computed by the first alone.

Ctrl-C is for the first process, too: it ends the search in peace, as that of a single process, and the others
ignore it. torchrun passes it on, but kills what is still at work half a minute later.
"""

import io
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.evaluation.evaluate import NoExamplesError, OutputsNotFiniteError, Scores, evaluate
from bnpatch.evaluation.metrics import Metric, Values
from bnpatch.models.base import Patchable
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.objective import ByMetric

# So long the others wait at most while the first works alone: longer than any search.
_PATIENCE = timedelta(days=30)


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
        # Where the user has set up the processes before, that is as it is, and so is its timeout.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
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
    setting: PatchWeights
    targets: Mapping[str, Moments[Any]] | None  # only where they are new


@dataclass(frozen=True)
class _Done:
    """There is no more work; the result, or None where the first process failed, pickled."""

    result: bytes


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
        """See :class:`bnpatch.search.objective.Judge`."""
        targets = dict(model.targets())
        told = self._told or {}
        news = None
        if any(told.get(name) is not part for name, part in targets.items()):
            news = {name: _on_cpu(part) for name, part in targets.items()}
        self._told = targets
        with _uninterrupted():
            self._processes.tell(_Work(self._number, indices, model.setting(), news))
            return _score(self._judge, model, examples, indices, self._processes)

    def loss(self, model: TorchModel, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Of the first process alone."""
        return self._judge.loss(model, batches)


def serve(
    processes: Processes,
    model: Patchable,
    judges: Mapping[int, tuple[ByMetric, Examples]],
    metrics: Iterable[Metric],
) -> Any:
    """Score what the first process asks for, until it is done.

    Args:
        processes: of which this is not the first.
        model: the same as there.
        judges: by number, a judge and the examples that it is asked about, the same as there.
        metrics: those that the result may be of.

    Returns:
        The result of the first process.

    Raises:
        BnpatchError: that process failed, and says why.
    """
    with _uninterrupted(then=False):
        while True:
            message = processes.tell(None)
            if isinstance(message, _Done):
                result = _Unpickler(message.result, metrics).load()
                if result is None:
                    raise BnpatchError("the first process failed", "see what it says")
                return result
            if message.targets is not None:
                model.retarget(message.targets)
            model.set(message.setting)
            judge, examples = judges[message.judge]
            with suppress(BnpatchError):  # the first process has it as well, and decides
                _score(judge, model, examples, message.indices, processes)


def dismiss(processes: Processes, result: Any) -> None:
    """Tell the other processes that there is no more work."""
    file = io.BytesIO()
    _Pickler(file).dump(result)
    with _uninterrupted():
        processes.tell(_Done(file.getvalue()))


class _Pickler(pickle.Pickler):
    """Sends the name of a metric in its place: a user's function may be one that can't be pickled."""

    def persistent_id(self, thing: Any) -> str | None:
        return thing.name if isinstance(thing, Metric) else None


class _Unpickler(pickle.Unpickler):
    """Puts the metrics of this process in the place of their names."""

    def __init__(self, pickled: bytes, metrics: Iterable[Metric]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._metrics = {metric.name: metric for metric in metrics}

    def persistent_load(self, name: str) -> Metric:
        return self._metrics[name]


@contextmanager
def _uninterrupted(then: bool = True) -> Iterator[None]:
    """Ctrl-C does nothing in here; what it does otherwise it does ``then``, when this is over, or never.

    Between processes that wait for each other nothing may be left undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread is interrupted
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and then:
            signal.raise_signal(signal.SIGINT)


def _on_cpu(moments: Moments[Any]) -> Moments[Tensor]:
    """To be sent: a tensor of a GPU would take memory of that very GPU in every process."""
    return Moments(*(torch.as_tensor(part).cpu() for part in (moments.mean, moments.var)))


def _score(
    judge: ByMetric, model: Patchable, examples: Examples, indices: Indices, processes: Processes
) -> dict[str, Values]:
    """This process scores its share, and all of them get all scores, in the order of ``indices``.

    Where one fails, all do. The first raises its own error, if it has one; errors of others are told in
    words, since not every error can be pickled.
    """
    mine: Any
    failure: BaseException | None = None
    try:
        share = indices[processes.rank :: processes.count]
        mine = evaluate(model, examples, judge.metrics, indices=share, batch_size=judge.batch_size)
    except NoExamplesError:
        mine = Scores(np.zeros(0, np.int64), {m.name: np.zeros(0) for m in judge.metrics})
    except OutputsNotFiniteError as error:
        mine = error  # a search may take these weights for the worst, and go on
    except BnpatchError as error:
        failure, mine = error, BnpatchError(error.problem, error.remedy)
    except BaseException as error:  # the others must not wait for ever
        failure = error
        said = f"{type(error).__name__}: {first_line(error)}"
        mine = BnpatchError(f"process {processes.rank} of {processes.count} failed: {said}")
    parts = processes.collect((mine, examples.skipped))
    if failure is not None and processes.rank == 0:
        raise failure
    if errors := [part for part, _ in parts if isinstance(part, BnpatchError)]:
        raise min(errors, key=lambda error: isinstance(error, OutputsNotFiniteError))
    for _, skipped in parts:
        examples.skipped.update(skipped)
    place = {int(index): position for position, index in enumerate(indices)}
    read = np.concatenate([part.indices for part, _ in parts])
    order = np.argsort([place[int(index)] for index in read], kind="stable")
    return {
        metric.name: np.concatenate([part.values[metric.name] for part, _ in parts])[order]
        for metric in judge.metrics
    }
