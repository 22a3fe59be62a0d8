"""Names of temporary files that tell which process made them.

A later run uses the names to remove the temporary files of a run that was killed.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

_START = ".bnpatch-"
_NAME = re.compile(r"\.bnpatch-([0-9a-f]{8})-(\d+)-")
#: End of the name of the file that marks a folder as used by a run, see :func:`bnpatch.core.io.claimed`.
RUNNING = "running"
# A temporary file of another machine counts as left over after this many seconds without a change, because
# this machine can't tell whether its process still runs.
_LONGEST_ELSEWHERE = 24 * 3600


def own_start() -> str:
    """Return the prefix of the names of this process's temporary files."""
    return f"{_START}{_place()}-{os.getpid()}-"


def owner(path: str | os.PathLike[str]) -> tuple[bool, int] | None:
    """Return whether this machine made a temporary file, and the process id; None for any other file."""
    found = _NAME.match(Path(path).name)
    return None if found is None else (found[1] == _place(), int(found[2]))


def without_temporary(path: str | os.PathLike[str]) -> Path:
    """Return a path without the temporary folders in it, as the user knows it."""
    return Path(*(part for part in Path(path).parts if not part.startswith(_START)))


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files in a folder whose process has ended, and nothing else."""
    for path in _temporaries(folder):
        here, process = owner(path) or (True, os.getpid())
        with suppress(OSError):  # another process has removed it, or it belongs to another user
            elsewhere_over = not here and time.time() - path.lstat().st_mtime > _LONGEST_ELSEWHERE
            if not elsewhere_over and not (here and not is_alive(process)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def running_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the files that mark a folder as used by runs, see :func:`bnpatch.core.io.claimed`."""
    return (path for path in _temporaries(folder) if path.name.endswith(f"-{RUNNING}"))


def is_alive(process: int) -> bool:
    """Tell whether a process with this id runs on this machine. A zombie does not count."""
    if sys.platform == "win32":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # the process belongs to another user
        return True
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except OSError:  # the system has no /proc, or the process has just ended
        return True


def _is_alive_on_windows(process: int) -> bool:
    """Tell on Windows whether a process runs; ``os.kill`` would end it there."""
    import ctypes

    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - type checkers know it on Windows only
    handle = kernel.OpenProcess(0x1000, False, process)  # 0x1000: the right to read its state
    if not handle:
        return bool(kernel.GetLastError() == 5)  # access denied: the process runs for another user
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE


def _temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if owner(entry.name) is not None]
    except OSError:  # a folder that can't be listed; writing to it will say so
        return []


@cache
def _place() -> str:
    """Return a hash of the machine and its process namespace, within which process ids are unique."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # the system has no such namespaces
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
