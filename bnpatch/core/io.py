"""Write files atomically, check output folders, and choose the device to compute on.

Everything that bnpatch writes goes to a temporary file first, which is renamed when it is complete. If the
program is killed, the target is either the old file or the new one, never a part; the next run that writes to
the folder removes the temporary file.
"""

import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bnpatch.core.errors import BnpatchError
from bnpatch.core.leftovers import (
    RUNNING,
    is_alive,
    own_start,
    owner,
    remove_leftovers,
    running_in,
    without_temporary,
)

if TYPE_CHECKING:
    import torch

# A run touches its mark every so many seconds. A run of another machine counts as ended once its mark has not
# been touched for the second number of seconds.
_TOUCH_SECONDS, _ENDED_SECONDS = 20.0, 120.0


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``target``, and rename it to ``target`` when the block ends.

    If the block raises, the temporary file is removed and ``target`` stays as it was. The temporary path has
    the suffix of ``target``, because many writers choose the format by the suffix.

    Raises:
        BnpatchError: the folder can't be created or written, or the disk is full.
    """
    target = Path(target)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=own_start(), suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp creates files that only the owner can read
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder in ``parent`` for files that are moved to their places together.

    The folder is removed when the block ends.
    """
    remove_leftovers(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=own_start()) as folder:
        yield Path(folder)


@contextmanager
def writing_to(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError from the block into a BnpatchError that names ``target``."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BnpatchError(
            f"cannot write {without_temporary(target)}: {reason}", "choose another place with --output"
        ) from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create a folder if it does not exist, and check that files can be created in it.

    Raises:
        BnpatchError: the folder or a file in it can't be created, or the path is a file.
    """
    if Path(folder).is_file():
        raise BnpatchError(f"cannot write to {folder}: it is a file, not a folder", "choose another --output")
    with writing_to(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    remove_leftovers(folder)


@contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Mark a folder as used by this process until the context ends, by a file in it.

    The marks of processes that have ended are ignored. A thread touches the file every few seconds, so that
    processes on other machines that share the folder see that this one is alive.

    Raises:
        BnpatchError: another run uses the folder, or the folder can't be written.
    """
    mark = Path(folder) / f"{own_start()}{RUNNING}"
    with writing_to(mark.parent):
        mark.touch()
    over = threading.Event()
    try:
        now = mark.stat().st_mtime
        for other in running_in(folder):
            here, process = owner(other) or (True, os.getpid())
            with suppress(FileNotFoundError):  # the other run has just ended
                is_running = is_alive(process) if here else now - other.stat().st_mtime < _ENDED_SECONDS
                if other != mark and is_running:
                    raise BnpatchError(
                        f"another run of bnpatch (process {process}{'' if here else ' of another machine'}) "
                        f"writes to {folder}",
                        "wait for its end, or choose another --output",
                    )
        threading.Thread(target=_keep_touching, args=(mark, over), daemon=True).start()
        yield
    finally:
        over.set()
        mark.unlink(missing_ok=True)


def _keep_touching(mark: Path, over: threading.Event) -> None:
    while not over.wait(_TOUCH_SECONDS):
        with suppress(OSError):  # the folder was removed or is out of reach; what is written next says so
            os.utime(mark)


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, because opening a pipe or a device may never end.

    Raises:
        OSError: the path does not exist, or is something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``target`` atomically, in UTF-8; bytes of file names that are no text are escaped."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def pick_device(name: str = "auto") -> "torch.device":
    """Resolve a device name; "auto" means the accelerator if there is one, else the CPU.

    Raises:
        BnpatchError: the machine has no such device.
    """
    import torch  # imported here because it takes seconds, and callers that only write files don't need it

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and (rank := os.environ.get("LOCAL_RANK")):
            return torch.device(accelerator.type, int(rank))  # under torchrun each process has its own
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for "meta", whose tensors have no values
    # torch raises RuntimeError for a name that it does not know or a device that is not there, AssertionError
    # where it was built without that kind of device, and NotImplementedError for "meta".
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BnpatchError(
            f"there is no device {name!r} here", "leave out --device to have one chosen"
        ) from error
    return device
