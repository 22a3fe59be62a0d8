"""Share the scoring between several processes, started by ``torchrun`` or ``accelerate launch``.

The first process searches. It tells the others which examples to score with which weights. So every decision
is made once, and the result is that of a single process. Label-free objectives and learning by gradient are
not means over examples, so the first process computes them alone.

Only the first process handles Ctrl-C. It does what a single process does: it ends the search and judges what
was found. torchrun passes Ctrl-C on to all processes, and kills those that still run half a minute later.
"""

import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.patch import PatchWeights, Statistics, as_arrays
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import NoExamplesError, OutputsNotFiniteError, Scores, evaluate
from bnpatch.evaluation.metrics import Metric, Values
from bnpatch.models.base import Model
from bnpatch.search.objective import LabelledObjective, Objective

Result = TypeVar("Result")

# How long the other processes wait while the first works alone: longer than any search.
_LONGEST_WAIT = timedelta(days=30)

_LAUNCH = "start them with torchrun or accelerate launch"


def is_first() -> bool:
    """Tell whether this is the process that searches, prints and writes; a single process is."""
    return int(os.environ.get("RANK", "0")) == 0


def start() -> "Processes | None":
    """Return the processes of this run; None where there is only one.

    Raises:
        BnpatchError: there are several, and accelerate is not installed; or the variable that counts them is
            no number.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise BnpatchError(f"the environment variable WORLD_SIZE is {count!r}", "set a number, or unset it")
    return Processes() if int(count) > 1 else None


@contextmanager
def connecting() -> Iterator[None]:
    """Turn errors of a process that finds no other into a BnpatchError."""
    try:
        yield
    # ValueError: an address is missing, because something else set WORLD_SIZE; RuntimeError: nobody answers.
    except (ValueError, RuntimeError) as error:
        raise BnpatchError(f"the processes can't be connected: {first_line(error)}", _LAUNCH) from error


def on_all_processes(
    model: Model[Any],
    objectives: Sequence[tuple[Objective, Examples]],
    metrics: Iterable[Metric],
    search: Callable[..., Result],
) -> Result:
    """Search in the first process; the others score what it asks for, and all return its result.

    Args:
        model: the same model in all processes.
        objectives: what the search scores, and the examples of each; the same in all processes.
        metrics: all metrics that the result may refer to.
        search: called in the first process, or in the only one, with the objectives to use.

    Raises:
        BnpatchError: there are several processes, and accelerate is not installed; or, in any other process,
            the first one failed.
    """
    processes = start()
    if processes is None:
        return search(*(objective for objective, _ in objectives))
    labelled = {
        number: (objective, examples)
        for number, (objective, examples) in enumerate(objectives)
        if isinstance(objective, LabelledObjective)
    }
    if processes.rank > 0:
        served: Result = _serve(processes, model, labelled, metrics)
        return served
    result = None
    try:
        result = search(
            *(
                _SharedObjective(**vars(objective), number=number, processes=processes)
                if number in labelled
                else objective
                for number, (objective, _) in enumerate(objectives)
            )
        )
        return result
    finally:
        _dismiss(processes, result)


class Processes:
    """Communication between the processes, by accelerate."""

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise BnpatchError(
                "several processes need accelerate", "pip install 'bnpatch[distributed]', or start one"
            ) from error
        with connecting():
            # If the user has initialized the process group before, its timeout stays.
            state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
        self.rank, self.count = int(state.process_index), int(state.num_processes)
        if self.count != int(os.environ["WORLD_SIZE"]):
            raise BnpatchError(
                f"accelerate sees {self.count} of {os.environ['WORLD_SIZE']} processes", _LAUNCH
            )

    def tell(self, message: Any) -> Any:
        """Broadcast the message of the first process; all return it."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([message if self.rank == 0 else None])[0]

    def collect(self, part: Any) -> list[Any]:
        """Gather a part from each process; all return the parts in the order of ranks."""
        from accelerate.utils import gather_object

        return list(gather_object([part]))


@dataclass(frozen=True)
class _Work:
    """A request of the first process: the objective, the examples and the weights to score."""

    objective: int
    indices: Indices
    weights: PatchWeights
    re_estimated: Statistics | None  # None where these statistics have not changed


@dataclass(frozen=True)
class _Done:
    """The end of the work, with the pickled result; a pickled None where the first process failed."""

    result: bytes


@dataclass(frozen=True, kw_only=True)
class _SharedObjective(LabelledObjective):
    """The objective of the first process, which has all processes score the examples.

    Attributes:
        number: the number by which the other processes know the objective.
        processes: all processes.
        told: the re-estimated statistics that the other processes have, as the last element.
    """

    number: int
    processes: Processes
    told: list[Statistics] = field(default_factory=list)

    def scores(self, model: Model[Any], examples: Examples, indices: Indices) -> dict[str, Values]:
        """See :class:`bnpatch.search.objective.Objective`."""
        re_estimated, news = model.state.re_estimated, None
        if not self.told or re_estimated is not self.told[-1]:
            self.told[:] = [re_estimated]
            news = {name: as_arrays(part) for name, part in re_estimated.items()}
        with _uninterrupted():
            self.processes.tell(_Work(self.number, indices, model.weights, news))
            return _score(self, model, examples, indices, self.processes)


def _serve(
    processes: Processes,
    model: Model[Any],
    objectives: Mapping[int, tuple[LabelledObjective, Examples]],
    metrics: Iterable[Metric],
) -> Any:
    """Score what the first process asks for, until it is done; return its result.

    The model, the objectives and their examples by number are the same as in the first process.

    Raises:
        BnpatchError: the first process failed; its own error has the reason.
    """
    with _uninterrupted(then=False):
        while True:
            message = processes.tell(None)
            if isinstance(message, _Done):
                result = _Unpickler(message.result, metrics).load()
                if result is None:
                    raise BnpatchError("the first process failed", "see what it says")
                return result
            state = model.state
            if message.re_estimated is not None:
                state = replace(state, re_estimated=message.re_estimated)
            model.set_state(state.with_weights(message.weights))
            objective, examples = objectives[message.objective]
            with suppress(BnpatchError):  # the first process gets the same error, and decides
                _score(objective, model, examples, message.indices, processes)


def _dismiss(processes: Processes, result: Any) -> None:
    """Tell the other processes that there is no more work."""
    file = io.BytesIO()
    _Pickler(file).dump(result)
    with _uninterrupted():
        processes.tell(_Done(file.getvalue()))


class _Pickler(pickle.Pickler):
    """Pickles a metric by its name, because a user's function may not be picklable."""

    def persistent_id(self, thing: Any) -> str | None:
        return thing.name if isinstance(thing, Metric) else None


class _Unpickler(pickle.Unpickler):
    """Replaces names of metrics by the metrics of this process."""

    def __init__(self, pickled: bytes, metrics: Iterable[Metric]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._metrics = {metric.name: metric for metric in metrics}

    def persistent_load(self, name: str) -> Metric:
        return self._metrics[name]


@contextmanager
def _uninterrupted(then: bool = True) -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, or ignore it if ``then`` is false.

    An interrupt in the middle would leave other processes waiting for this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and then:
            signal.raise_signal(signal.SIGINT)


def _score(
    objective: LabelledObjective,
    model: Model[Any],
    examples: Examples,
    indices: Indices,
    processes: Processes,
) -> dict[str, Values]:
    """Score this process's share of the examples; all processes return all scores, in the given order.

    If one process fails, all fail. The first process raises its own error, if it has one. Errors of others
    are passed on as text, because not every error can be pickled.
    """
    mine: Any
    failure: BaseException | None = None
    try:
        share = indices[processes.rank :: processes.count]
        mine = evaluate(model, examples, objective.metrics, indices=share, batch_size=objective.batch_size)
    except NoExamplesError:  # there are fewer examples than processes, or this share can't be read
        mine = Scores(np.zeros(0, np.int64), {m.name: np.zeros(0) for m in objective.metrics})
    except OutputsNotFiniteError as error:
        mine = error  # the search may rate these weights as the worst, and continue
    except BnpatchError as error:  # all processes raise it below
        failure, mine = error, BnpatchError(error.problem, error.remedy)
    except BaseException as error:  # the other processes must not wait forever
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
        for metric in objective.metrics
    }
