"""Open the databases that keep Optuna's studies, and turn their errors into messages."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePath
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from bnpatch.core.errors import BnpatchError, BnpatchWarning, first_line, root_cause
from bnpatch.core.text import masked

#: Seconds between two heartbeats of a running trial, and after which a trial without one has no process any
#: more. A heartbeat is a small write. A process may miss some while the machine is busy or another process
#: locks the database (up to LOCK_SECONDS), so the second is several times the first; a search that is
#: started again after it was killed waits that long at most.
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60

#: Seconds to wait for other processes that write to the same SQLite file; a write takes milliseconds.
LOCK_SECONDS = 20


class StorageError(BnpatchError):
    """A database can't be opened, read or written."""


class Storage:
    """A database for the studies of one search; it is opened when the first study is.

    A database that fails when studies are in it, because the disk is full or the server is gone, is not asked
    again: the search goes on in memory, because its results are worth more than its continuation.

    Attributes:
        url: the database, as an SQLAlchemy URL.
        heartbeat_seconds: seconds between two heartbeats.
        has_studies: whether a study was opened in it.
        failed: whether it failed after that.
    """

    def __init__(
        self,
        url: str,
        *,
        heartbeat_seconds: int = HEARTBEAT_SECONDS,
        grace_seconds: int = GRACE_SECONDS,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self.url, self.heartbeat_seconds = url, heartbeat_seconds
        self._grace_seconds, self._lock_seconds = grace_seconds, lock_seconds
        self.has_studies = self.failed = False

    @cached_property
    def database(self) -> RDBStorage:
        """The database as Optuna opens it; BnpatchError if it can't be used."""
        with usable(self.url), experimental():
            return connect(
                self.url,
                lock_seconds=self._lock_seconds,
                heartbeat_interval=self.heartbeat_seconds,
                grace_period=self._grace_seconds,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(
                    inherit_intermediate_values=True
                ),
            )

    def give_up(self, error: StorageError) -> None:
        """Ask the database no more, and warn of it."""
        if not self.failed:
            self.failed = True
            warnings.warn(f"{error.problem}; the search goes on in memory", BnpatchWarning, stacklevel=2)


def connect(url: str, *, lock_seconds: float = LOCK_SECONDS, **options: Any) -> RDBStorage:
    """Open a database, and create Optuna's tables where it has none.

    Args:
        url: an SQLAlchemy URL, such as ``sqlite:///x.db``.
        lock_seconds: how long to wait for other processes that write to the same SQLite file.
        options: further arguments of ``optuna.storages.RDBStorage``.

    Raises:
        BnpatchError: the text is not the URL of a database. :func:`usable` handles errors of the database.
    """
    from sqlalchemy.exc import DBAPIError  # slow to import

    if "://" not in url or url.startswith("journal:"):
        name = PurePath(url.removeprefix("journal:")).stem or "study"
        raise BnpatchError(
            f"{masked(url)!r} is no database, and nothing else shows whether a search was killed",
            f"give a database such as sqlite:///{name}.db",
        )
    engine = {"connect_args": {"timeout": lock_seconds}} if url.startswith("sqlite") else {}
    for _ in range(3):
        started = time.monotonic()
        try:
            return RDBStorage(url, engine_kwargs=engine, **options)
        except (DBAPIError, OptunaError):
            # Where two processes create the tables at the same time, one of them gets an error at once. A
            # process that has waited for a lock until the end does not try again.
            if time.monotonic() - started >= lock_seconds:
                raise
            time.sleep(0.2)
    return RDBStorage(url, engine_kwargs=engine, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages on stderr, which don't help the user."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def experimental() -> Iterator[None]:
    """Silence the warning that Optuna's heartbeats may change in later versions.

    Use it rarely: afterwards, Python shows warnings again that it shows once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def usable(url: str) -> Iterator[None]:
    """Turn errors of a database into a StorageError that names it, without its password."""
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError  # slow to import

    try:
        yield
    # Drivers that are missing or refuse an address raise errors of the other four types.
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError, ValueError) as error:
        # Optuna wraps the error of the database, and SQLAlchemy that of the driver.
        cause = root_cause(error)
        said = cause.strerror if isinstance(cause, OSError) else None
        reason = said.lower() if said else first_line(cause)
        remedy = "give a database that can be written and that no other program locks, or a new one"
        if isinstance(cause, ImportError | NoSuchModuleError):
            remedy = "install its driver, or give a database such as sqlite:///study.db"
        raise StorageError(f"cannot use {masked(url)} for a study: {masked(url, reason)}", remedy) from error
