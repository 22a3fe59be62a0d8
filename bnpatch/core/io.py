"""Files that are whole or not there, and devices to compute on."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnpatch.core.errors import BnpatchError

if TYPE_CHECKING:
    import torch


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``target``; what was written there becomes ``target`` when the block ends.

    If the block raises, nothing is left and ``target`` is as it was. The suffix is kept, since writers
    choose the format by it.

    Raises:
        BnpatchError: the folder can't be made or written, or the disk is full.
    """
    target = Path(target)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner can read
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing_to(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusal to write ``target`` into an error that names it."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BnpatchError(
            f"cannot write {target}: {reason}", "choose another place with --output"
        ) from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder if it isn't there, and see that files can be made in it.

    Raises:
        BnpatchError: they can't.
    """
    if Path(folder).is_file():
        raise BnpatchError(f"cannot write to {folder}: it is a file, not a folder", "choose another --output")
    with writing_to(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``target`` atomically, in UTF-8."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def pick_device(name: str = "auto") -> "torch.device":
    """Resolve a device name; "auto" is the accelerator if there is one.

    Raises:
        BnpatchError: no such device here.
    """
    import torch  # seconds: whoever only writes a file does without

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and (rank := os.environ.get("LOCAL_RANK")):
            return torch.device(accelerator.type, int(rank))  # one of several processes, each with its own
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BnpatchError(
            f"there is no device {name!r} here", "leave out --device to have one chosen"
        ) from error
    return device
