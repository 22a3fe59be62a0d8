"""Optuna studies that can be continued after a process was killed, and shared by several processes.

A study is in memory, in a database or in a journal. Every change is one write, made at once: a new trial with
its parameters, or the scores of a finished block of examples. So a process may be killed at any moment, and
the next one finds everything that was finished.

**Owners of trials.** A trial that a process works on has an owner: host, process number and start time of the
process. An owner on this host is alive while that process is; an owner on another host counts as alive for
``STALE_SECONDS`` after its last block. Any process may continue a running trial whose owner is not alive.
"""

import base64
import json
import os
import socket
import time
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.metrics import Values
from bnpatch.search.storages import connect, quiet, usable

#: Seconds for which an owner on another host counts as alive after its last write.
STALE_SECONDS = 600.0

BlockScores = Mapping[str, Values]

# Names of user attributes.
_FINGERPRINT, _OPENED, _RUNG = "bnpatch:fingerprint", "bnpatch:opened", "bnpatch:rung"
_OWNER, _BLOCK = "bnpatch:owner", "bnpatch:block:"
_KEPT = "bnpatch:kept:"


@dataclass(frozen=True)
class StoredTrial:
    """A trial as it is stored in the study.

    Attributes:
        number: number in the order in which trials began.
        params: values by name of parameter.
        rung: rung of successive halving on which the trial began.
        blocks: scores by name of metric, by number of finished block.
        state: Optuna's state of the trial.
        owner: the process that works on the trial; "" where none does.
        seen: time of the owner's last write, in seconds since 1970.
    """

    number: int
    params: Mapping[str, float]
    rung: int
    blocks: Mapping[int, BlockScores]
    state: TrialState
    owner: str
    seen: float

    @property
    def running(self) -> bool:
        """Is the trial neither complete nor pruned nor failed?"""
        return self.state == TrialState.RUNNING

    @property
    def busy(self) -> bool:
        """Does another process, which is alive, work on the trial?"""
        return self.running and self.owner not in ("", this_process()) and _alive(self.owner, self.seen)


class Study:
    """An Optuna study whose trials are scored block by block; :func:`open_study` makes it.

    Attributes:
        storage: Optuna's storage, to open the same study with other tools.
        name: name of the study.
    """

    def __init__(self, storage: BaseStorage, study_id: int, name: str) -> None:
        self.storage, self.name = storage, name
        self._id = study_id
        self._decoded: dict[tuple[int, int], BlockScores] = {}

    @cached_property
    def direction(self) -> StudyDirection:
        """Minimize or maximize."""
        return self.storage.get_study_directions(self._id)[0]

    def trials(self) -> list[StoredTrial]:
        """All trials that have parameters, in the order of their numbers."""
        frozen = self.storage.get_all_trials(self._id, deepcopy=False)
        return [self._stored(trial) for trial in frozen if _RUNG in trial.user_attrs]

    def add(self, params: Mapping[str, float], space: Mapping[str, tuple[float, float]], rung: int) -> None:
        """Add a running trial, owned by this process, in one atomic write."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions={name: FloatDistribution(low, high) for name, (low, high) in space.items()},
            user_attrs={_RUNG: rung, _OWNER: [this_process(), time.time()]},
        )
        template.datetime_start = datetime.now()
        self.storage.create_new_trial(self._id, template)

    def claim(self, trial: StoredTrial) -> None:
        """Make this process the owner of a trial that has no live owner."""
        if trial.owner != this_process():
            with _unless_ended():
                self._set(trial.number, _OWNER, [this_process(), time.time()])

    def release(self) -> None:
        """Give up ownership of this process's running trials, so that others may continue them."""
        for trial in self.trials():
            if trial.running and trial.owner == this_process():
                with _unless_ended():
                    self._set(trial.number, _OWNER, ["", time.time()])

    def record(self, number: int, block: int, scores: BlockScores, value: float) -> None:
        """Store the scores of a finished block, and the mean over blocks so far as intermediate value."""
        packed = {name: _pack(values) for name, values in scores.items()}
        with _unless_ended():
            self.storage.set_trial_intermediate_value(self._trial_id(number), block, value)
            self._set(number, f"{_BLOCK}{block}", {"at": time.time(), "scores": packed})

    def finish(
        self,
        number: int,
        state: TrialState,
        value: float | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> None:
        """End a trial; ``notes`` become user attributes, which other tools show."""
        with _unless_ended():
            for name, note in (notes or {}).items():
                self._set(number, name, note)
            values = None if value is None else [value]
            self.storage.set_trial_state_values(self._trial_id(number), state, values)

    def remember(self, key: str, value: Any) -> None:
        """Store a plain value with the study."""
        self.storage.set_study_user_attr(self._id, f"{_KEPT}{key}", value)

    def recall(self, key: str) -> Any:
        """The value that was stored under a key; None if there is none."""
        return self.storage.get_study_user_attrs(self._id).get(f"{_KEPT}{key}")

    def check(self, direction: str, fingerprint: Mapping[str, Any]) -> None:
        """Write the fingerprint into a new study; compare it with the fingerprint of an existing one.

        Running trials that bnpatch did not make were left by other tools, and are ended as failed.

        Raises:
            BnpatchError: the study has another fingerprint or direction, or trials of other tools.
        """
        wanted = json.loads(json.dumps(fingerprint))
        if self.direction != StudyDirection[direction.upper()]:
            raise self._other(f"has the direction {self.direction.name.lower()}, not {direction}")
        found = self.storage.get_study_user_attrs(self._id).get(_FINGERPRINT)
        if found is None:
            if self.storage.get_n_trials(self._id):
                raise self._other("has trials that bnpatch did not make")
            self.storage.set_study_user_attr(self._id, _FINGERPRINT, wanted)
            return
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise self._other(f"was made with another {key} ({_brief(found.get(key))}, "
                                  f"now {_brief(wanted.get(key))})")  # fmt: skip
        # This write fails on a read-only storage before any work is done.
        self.storage.set_study_user_attr(self._id, _OPENED, datetime.now().isoformat())
        for trial in self.storage.get_all_trials(self._id, deepcopy=False):
            if trial.state == TrialState.RUNNING and _RUNG not in trial.user_attrs:
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _other(self, how: str) -> BnpatchError:
        return BnpatchError(
            f"the study {self.name!r} {how}", "choose another name for this one, or another storage"
        )

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _set(self, number: int, key: str, value: Any) -> None:
        self.storage.set_trial_user_attr(self._trial_id(number), key, value)

    def _stored(self, trial: FrozenTrial) -> StoredTrial:
        owner, seen = trial.user_attrs.get(_OWNER, ["", 0.0])
        blocks: dict[int, BlockScores] = {}
        for key, value in trial.user_attrs.items():
            if key.startswith(_BLOCK):
                block = int(key.removeprefix(_BLOCK))
                seen = max(seen, value["at"])
                if (trial.number, block) not in self._decoded:
                    unpacked = {name: _unpack(text) for name, text in value["scores"].items()}
                    self._decoded[trial.number, block] = unpacked
                blocks[block] = self._decoded[trial.number, block]
        return StoredTrial(
            trial.number, trial.params, trial.user_attrs[_RUNG], blocks, trial.state, owner, seen
        )


def open_study(
    storage: str | None = None,
    name: str | None = None,
    *,
    direction: Literal["minimize", "maximize"] = "minimize",
    fingerprint: Mapping[str, Any] | None = None,
) -> Study:
    """Open a study, or create it.

    Args:
        storage: None for memory; a database as an SQLAlchemy URL, such as ``sqlite:///x.db``; or a journal
            ``x.journal``, ``x.log`` or ``journal:///absolute/path``.
        name: name of the study; several studies may share a storage.
        direction: minimize or maximize.
        fingerprint: what the scores depend on, as plain values by name: model, data, metric, range. A study
            whose fingerprint differs is refused.

    Raises:
        BnpatchError: the storage can't be used, or the study has another fingerprint.
    """
    name = name or "bnpatch"
    with usable(storage or "memory"), quiet():
        where = InMemoryStorage() if storage is None else connect(storage)
        optuna.create_study(storage=where, study_name=name, direction=direction, load_if_exists=True)
        study = Study(where, where.get_study_id_from_name(name), name)
        study.check(direction, fingerprint or {})
    return study


def _unless_ended() -> AbstractContextManager[None]:
    """Ignore writes to a trial that another process has ended because it took the owner for dead."""
    return suppress(optuna.exceptions.UpdateFinishedTrialError)


def as_stored(values: Values) -> Values:
    """Round scores to the precision of a study, so that they are the same when they are read again."""
    return values.astype(np.float32).astype(np.float64)


def this_process() -> str:
    """The name of this process as an owner of trials."""
    return _named(os.getpid())


@cache
def _named(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}:{_start(pid)}"


def _alive(owner: str, seen: float) -> bool:
    host, pid, start = owner.rsplit(":", 2)
    if host != socket.gethostname() or os.name != "posix":
        return time.time() - seen < STALE_SECONDS
    try:
        os.kill(int(pid), 0)  # signal 0 only tests whether it exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process of another user
    return _start(int(pid)) == start


def _start(pid: int) -> str:
    """The start time of a process, because process numbers are reused; "" where it is unknown."""
    try:
        # The name in parentheses may contain anything; the start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _pack(values: Values) -> str:
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes())).decode()


def _unpack(text: str) -> Values:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float64)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
