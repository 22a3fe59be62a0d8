"""Storages of Optuna's studies: open databases and journals, and repair damaged journals."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

from bnpatch.core.errors import BnpatchError, first_line, root_cause
from bnpatch.core.text import masked

# Every line of a journal begins with this.
_RECORD = b'{"op_code":'
# The lock is held for one short write, so a process that holds it longer was killed. Optuna's default is 30.
_GRACE_SECONDS = 5
_DAMAGE = (OSError, ValueError, KeyError, AssertionError)
# Symbolic links need a privilege on Windows.
_Lock: Any = JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock


def connect(storage: str) -> BaseStorage:
    """Open a database or a journal; create it if it doesn't exist.

    Args:
        storage: a database as an SQLAlchemy URL (``sqlite:///x.db``), or a journal: ``x.journal``, ``x.log``,
            ``journal:///absolute/path``.

    Raises:
        BnpatchError: the text names no storage. :func:`usable` handles errors of the storage itself.
    """
    if storage.startswith("journal://"):
        return _journal(Path(storage.removeprefix("journal://")))
    if "://" in storage:
        return _database(storage)
    if storage.endswith((".journal", ".log")):
        return _journal(Path(storage))
    raise BnpatchError(
        f"{masked(storage)!r} names no storage for a study",
        "give a database such as sqlite:///study.db, or a journal such as study.journal",
    )


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
def usable(storage: str) -> Iterator[None]:
    """Turn errors of databases and files into an error that names the storage."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except _DAMAGE as error:
        raise BnpatchError(
            f"cannot use {masked(storage)} for a study: {masked(storage, _reason(error))}",
            "choose another storage",
        ) from error
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError) as error:
        # Optuna wraps the error of the database, and SQLAlchemy that of the driver.
        raise BnpatchError(
            f"cannot use {masked(storage)} for a study: {masked(storage, _reason(error))}",
            "give a database that can be written, or one that isn't there yet",
        ) from error


def _reason(error: BaseException) -> str:
    error = root_cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return first_line(error)


def _database(url: str) -> BaseStorage:
    # Processes that share a SQLite file wait for each other.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for _ in range(3):
        try:
            return get_storage(RDBStorage(url, engine_kwargs=options))
        except Exception as error:
            # If two processes create the tables at the same time, one of them gets these errors.
            if "already exists" not in str(error) and "UNIQUE constraint" not in str(error):
                raise
            time.sleep(0.2)
    return get_storage(RDBStorage(url, engine_kwargs=options))


def _journal(path: Path) -> BaseStorage:
    lock = _RepairingLock(path)
    if path.exists():
        _check_is_journal(path)
        lock.acquire()  # repairs the end of the journal
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class _RepairingLock(_Lock):  # type: ignore[misc]
    """Optuna's lock of a journal, which removes an incomplete last line whenever it is acquired.

    The holder of the lock is the only writer, so an incomplete last line was left by a dead process or a full
    disk. Optuna would append the next record to that line, and could then not read the journal any more.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=_GRACE_SECONDS)
        self.path = path

    def acquire(self) -> bool:
        """Wait for the lock, then repair the journal."""
        acquired: bool = super().acquire()
        try:
            _repair(self.path)
        except BaseException:
            self.release()
            raise
        return acquired


def _repair(path: Path) -> None:
    """Remove a last line that has no line end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0 or _last_byte(file) == b"\n":
            return
        file.seek(0)
        whole = file.read().rpartition(b"\n")[0]
        file.truncate(len(whole) + 1 if whole else 0)


def _last_byte(file: IO[bytes]) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _check_is_journal(path: Path) -> None:
    """Check that every line is a record, and an incomplete last line the beginning of one.

    Raises:
        ValueError: a line is not a record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            torn = not line.endswith(b"\n")
            if not line.startswith(_RECORD[: len(line)]) or not (torn or _is_json(line)):
                raise ValueError(f"line {number} is no record of an Optuna journal")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
