"""Optuna studies whose trials are scored block by block, by one process or by several that share a database.

Every change is one write, made at once, so that a process may be killed at any moment, and the next one finds
what was finished. A new trial waits in Optuna's queue until a process takes it over, and that process then
records heartbeats for it. Where the heartbeats stop, Optuna fails the trial and enqueues it again with its
parameters, scores and intermediate values. A process that ends by itself enqueues its trials again at once.
"""

import base64
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from bnpatch import __version__
from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.metrics import Values
from bnpatch.search.storages import Storage, StorageError, experimental, quiet, usable
from bnpatch.search.trials import StoredTrial

Direction = Literal["minimize", "maximize"]
T = TypeVar("T")

# User attributes of a trial, besides the means of its metrics.
_ROUND, _SCORES, _FAILURE = "bnpatch:round", "bnpatch:block scores", "bnpatch:failure"
# User attributes of a study, besides those that say what it is about.
_MADE_WITH, _OPENED = "bnpatch:made with", "bnpatch:opened"
_FORMAT = 2  # how trials are stored: part of what a study was made with


class Study:
    """An Optuna study whose trials are scored block by block; :func:`open_study` makes it.

    Attributes:
        optuna_study: the study, to look at it with Optuna.
    """

    def __init__(self, optuna_study: optuna.Study, backend: BaseStorage, storage: Storage | None) -> None:
        self.optuna_study = optuna_study
        self._backend, self._storage = backend, storage
        self._id = backend.get_study_id_from_name(optuna_study.study_name)
        self._own: set[int] = set()  # identifiers of the trials that this process works on
        self._latest: list[FrozenTrial] = []

    def trials(self) -> list[StoredTrial]:
        """Return all trials, in the order in which they began.

        Failed trials without a reason are left out: they were enqueued again, or ended before any score.
        """
        self._latest = self._do(lambda study: study.get_trials(deepcopy=False))
        ours = [t for t in self._latest if _ROUND in t.user_attrs]
        kept = [t for t in ours if t.state != TrialState.FAIL or _FAILURE in t.user_attrs]
        # Optuna notes in a trial that it enqueues again the number of the first that failed.
        kept.sort(key=lambda t: (t.system_attrs.get("failed_trial", t.number), t.number))
        return [self._stored(number, trial) for number, trial in enumerate(kept)]

    def begin(
        self, params: Mapping[str, float], space: Mapping[str, tuple[float, float]], number: int = 0
    ) -> None:
        """Enqueue a trial, for :meth:`take_over`; ``number`` is that of its round."""
        trial = create_trial(
            state=TrialState.WAITING,
            params=dict(params),
            distributions={name: FloatDistribution(low, high) for name, (low, high) in space.items()},
            user_attrs={_ROUND: number},
        )
        self._do(lambda study: study.add_trial(trial))

    def take_over(self) -> None:
        """Work on all trials that wait, among them those whose process was killed.

        Optuna's ``ask`` would start a trial before it has a heartbeat, so that a process that is killed in
        between leaves a trial that never counts as stale. It would also add a trial where none waits.
        """

        def act(study: optuna.Study) -> None:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if any(trial._trial_id not in self._own for trial in running):
                with experimental():
                    fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                if _ROUND in trial.user_attrs:
                    self._record_heartbeat(trial._trial_id)
                    with suppress(UpdateFinishedTrialError):  # another process started and ended it
                        if self._backend.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                            self._own.add(trial._trial_id)

        self._do(act)

    def record(self, trial: StoredTrial, examples: int, mean: float) -> None:
        """Store the scores of a running trial.

        Args:
            trial: the trial, with the scores of all blocks that are finished.
            examples: number of examples in these blocks.
            mean: mean of the tuned metric over these examples, which becomes an intermediate value.
        """
        packed = {
            block: {name: _pack(values) for name, values in scores.items()}
            for block, scores in trial.blocks.items()
        }

        def act(study: optuna.Study) -> None:
            trial_id = self._trial_id(trial)
            with suppress(UpdateFinishedTrialError):  # another process saw no heartbeat
                self._backend.set_trial_user_attr(trial_id, _SCORES, packed)
                self._backend.set_trial_intermediate_value(trial_id, examples, mean)

        self._do(act)

    def end(
        self, trial: StoredTrial, state: TrialState, value: float | None, attributes: Mapping[str, Any]
    ) -> None:
        """End a trial.

        Args:
            trial: the trial.
            state: COMPLETE, PRUNED or FAIL.
            value: mean of the tuned metric, for COMPLETE alone; Optuna gives a pruned trial its last
                intermediate value.
            attributes: user attributes of the trial, such as the means of other metrics by name.
        """

        def act(study: optuna.Study) -> None:
            with suppress(UpdateFinishedTrialError):  # another process saw no heartbeat
                for name, attribute in attributes.items():
                    self._backend.set_trial_user_attr(self._trial_id(trial), name, attribute)
            study.tell(trial.stored, value, state, skip_if_finished=True)

        self._do(act)

    def fail(self, trial: StoredTrial, reason: str = "") -> None:
        """End a trial that has no value; without a reason, as if it had never begun."""
        self.end(trial, TrialState.FAIL, None, {_FAILURE: reason} if reason else {})

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Record heartbeats of this process's trials meanwhile, and then enqueue those that still run."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._do(self._enqueue_again)

    def remember(self, key: str, value: Any) -> None:
        """Store a plain value with the study."""
        self._do(lambda study: study.set_user_attr(f"bnpatch:{key}", value))

    def recall(self, key: str) -> Any:
        """Return the value that was stored under a key; None if there is none."""
        return self._do(lambda study: study.user_attrs.get(f"bnpatch:{key}"))

    def _beat(self, over: threading.Event) -> None:
        while (storage := self._storage) is not None and not over.wait(storage.heartbeat_seconds):
            with suppress(StorageError), usable(storage.url):  # the next write says what is wrong
                for trial_id in tuple(self._own):
                    self._record_heartbeat(trial_id)

    def _record_heartbeat(self, trial_id: int) -> None:
        if self._storage is not None:
            self._storage.database.record_heartbeat(trial_id)

    def _enqueue_again(self, study: optuna.Study) -> None:
        """Do with the running trials of this process what Optuna does with stale ones.

        In memory they stay those of this process, because there is no other.
        """
        if self._storage is None:
            return
        enqueue = self._storage.database.get_heartbeat_stale_trial_callback()
        assert enqueue is not None  # Storage gives the database one
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            if trial._trial_id in self._own:
                study.tell(trial.number, state=TrialState.FAIL)
                enqueue(study, trial)
        self._own.clear()

    def _do(self, act: Callable[[optuna.Study], T]) -> T:
        """Do something with the study; where its database fails, with a copy of it in memory from then on."""
        if self._storage is None:
            return act(self.optuna_study)
        try:
            with usable(self._storage.url):
                return act(self.optuna_study)
        except StorageError as error:
            self._storage.give_up(error)
        name, direction = self.optuna_study.study_name, self.optuna_study.direction
        self._storage, self._backend = None, InMemoryStorage()
        self.optuna_study = _created(self._backend, name, direction)
        self._id = self._backend.get_study_id_from_name(name)
        self.optuna_study.add_trials(self._latest)
        # Other processes can't be reached any more, so this one takes over all running trials.
        running = self.optuna_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._own = {t._trial_id for t in running}
        return act(self.optuna_study)

    def _trial_id(self, trial: StoredTrial) -> int:
        return self._backend.get_trial_id_from_study_id_trial_number(self._id, trial.stored)

    def _stored(self, number: int, trial: FrozenTrial) -> StoredTrial:
        packed = trial.user_attrs.get(_SCORES, {})
        return StoredTrial(
            number,
            trial.params,
            trial.user_attrs[_ROUND],
            {int(n): {m: _unpack(text) for m, text in scores.items()} for n, scores in packed.items()},
            trial.state,
            trial._trial_id in self._own,
            trial.number,
        )


def open_study(
    storage: Storage | None = None,
    name: str | None = None,
    *,
    direction: Direction = "minimize",
    fingerprint: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> Study:
    """Open a study, or create it.

    Args:
        storage: a database; None for memory.
        name: name of the study; several studies may share a database.
        direction: minimize or maximize.
        fingerprint: what the scores depend on, as plain values by name: model, data, metric, range. A study
            whose fingerprint differs is refused.
        about: what people read about the study in other tools, by name.

    Raises:
        BnpatchError: the database can't be used, or the study has another fingerprint. Where the database
            fails after it had been opened, the study is kept in memory.
    """
    name = name or "bnpatch"
    if storage is not None and not storage.failed:
        try:
            database = storage.database
            with usable(storage.url):
                optuna_study = _created(database, name, direction)
                _check(optuna_study, direction, fingerprint or {})
                for key, text in (about or {}).items():
                    optuna_study.set_user_attr(key, text)
            storage.has_studies = True
            return Study(optuna_study, database, storage)
        except StorageError as error:
            if not storage.has_studies:
                raise
            storage.give_up(error)
    backend = InMemoryStorage()
    return Study(_created(backend, name, direction), backend, None)


def _created(backend: BaseStorage, name: str, direction: Direction | StudyDirection) -> optuna.Study:
    with quiet():
        return optuna.create_study(storage=backend, study_name=name, direction=direction, load_if_exists=True)


def _check(study: optuna.Study, direction: str, fingerprint: Mapping[str, Any]) -> None:
    """Write the fingerprint into a new study; compare it with the fingerprint of an existing one.

    Raises:
        BnpatchError: the study has another fingerprint or direction, or trials of other tools.
    """
    wanted = json.loads(json.dumps({**fingerprint, "format": _FORMAT}))
    found = study.user_attrs.get(_MADE_WITH)
    if study.direction != StudyDirection[direction.upper()]:
        raise _other(study, f"has the direction {study.direction.name.lower()}, not {direction}")
    if found is None:
        if study.get_trials(deepcopy=False):
            raise _other(study, "has trials that this version of bnpatch did not make")
        study.set_user_attr(_MADE_WITH, wanted)
        study.set_user_attr("bnpatch", __version__)
        return
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            values = f"{_brief(found.get(key))}, now {_brief(wanted.get(key))}"
            raise _other(study, f"was made with another {key} ({values})")
    # This write fails on a read-only database before any work is done.
    study.set_user_attr(_OPENED, datetime.now().isoformat())


def _other(study: optuna.Study, how: str) -> BnpatchError:
    return BnpatchError(
        f"the study {study.study_name!r} {how}", "choose another name for this one, or another storage"
    )


def as_stored(values: Values) -> Values:
    """Round scores to the precision of a study, so that they are the same when they are read again."""
    return values.astype(np.float32).astype(np.float64)


def _pack(values: Values) -> str:
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes())).decode()


@lru_cache(maxsize=4096)  # all trials are read again after each step
def _unpack(text: str) -> Values:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float64)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
