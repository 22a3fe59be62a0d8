"""Check files that other programs wrote before a parser reads them, and turn parser errors into messages."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.limits import TEXT_MB

#: The remedy for a model of TensorFlow.
TO_ONNX = "convert the model to ONNX, with tf2onnx for example"

# By first bytes, files that are no weights of torch: what they are, and the remedy.
_OTHERS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull"),
    b"<!doctype html": ("an HTML page", "download the file itself, not the page that shows it"),
    b"<html": ("an HTML page", "download the file itself, not the page that shows it"),
    b"<?xml": ("an XML document, as a server answers when it refuses a download", "download it again"),
    b"\x1f\x8b": ("a gzip archive", "unpack it, and give the file inside"),
    b"bzh": ("a bzip2 archive", "unpack it, and give the file inside"),
    b"\xfd7zxz": ("an xz archive", "unpack it, and give the file inside"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it, and give the file inside"),
    b"rar!": ("a rar archive", "unpack it, and give the file inside"),
    b"\x89hdf": ("an HDF5 file, as Keras writes them", TO_ONNX),
}


@contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn any error of a parser in the block into a BnpatchError that names the file.

    Parsers raise errors of many types for damaged data: ValueError for numbers with thousands of digits,
    RecursionError for deep nesting, MemoryError for absurd sizes, KeyError, TypeError and AttributeError for
    values of other types.

    Args:
        path: the file.
        what: what the file should be, with an article.
        remedy: what the user can do.
    """
    try:
        yield
    except BnpatchError:
        raise
    except Exception as error:  # readers of damaged files raise errors of many types
        raise BnpatchError(f"{path} is damaged or not {what} ({_reason(error)})", remedy) from error


def check_kind(path: Path) -> None:
    """Raise an error if a path is no file that can hold a model; the first bytes of the file decide.

    Raises:
        BnpatchError: the path can't be read, is a folder, a pipe or a device, is empty, or is a file of
            another kind.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise BnpatchError(f"{path} is a folder, not a checkpoint", "name the file inside it")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            raise BnpatchError(f"{path} is no regular file but a pipe or a device", "copy it into a file")
        with path.open("rb") as file:
            head = file.read(256)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise BnpatchError(f"cannot read {path}: {reason}", "check the path") from error
    if not head:
        raise BnpatchError(f"{path} is empty", "copy or download it again")
    if head[4:8] == b"TFL3":
        raise BnpatchError(f"{path} is a TensorFlow Lite file", TO_ONNX)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, (kind, remedy) in _OTHERS.items():
        if start.startswith(beginning):
            raise BnpatchError(f"{path} is {kind}", remedy)


def check_not_onnx(path: Path) -> None:
    """Raise an error if a file is an ONNX model; such a file begins with the version of its layout.

    Raises:
        BnpatchError: the file is an ONNX model; :func:`bnpatch.load` knows these by their suffix.
    """
    if start_of(path)[:1] == b"\x08":  # the number of the protobuf field; no pickle begins with it
        raise BnpatchError(f"{path} is an ONNX model under another name", "give it a name that ends in .onnx")


def is_safetensors(path: Path) -> bool:
    """Tell whether a file is in the layout of safetensors: the length of a header in JSON, and the header.

    A damaged file with the suffix of safetensors counts, too.
    """
    start = start_of(path)
    by_torch = start.startswith((b"PK", b"\x80"))
    return start[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and not by_torch)


def start_of(path: Path) -> bytes:
    """Return the first 16 bytes of a file."""
    with path.open("rb") as file:
        return file.read(16)


def read_json(path: Path) -> Any:
    """Read a small JSON file; return None if it does not exist.

    Raises:
        BnpatchError: the file can't be read, is larger than :data:`~bnpatch.core.limits.TEXT_MB`, or is not
            JSON.
    """
    if not path.is_file():
        return None
    remedy = f"mend it, or move it away from beside the weights: {path.name} describes them"
    with reading(path, "a JSON file", remedy):
        size = path.stat().st_size / 1e6
        TEXT_MB.check(size, f"the configuration {path} has {size:,.0f} MB")
        return json.loads(path.read_text(encoding="utf-8"))


def _reason(error: Exception) -> str:
    """Return the reason of an error, without torch's advice to load unsafely, which would not help here."""
    text = str(error)
    if "WeightsUnpickler error:" in text or "weights_only" in text:
        lines = text.split("WeightsUnpickler error:")[-1].strip().splitlines()
        said = [line for line in lines if line.strip() and "weights_only" not in line]
        return f"not what torch.save writes: {said[0].strip()}" if said else "not what torch.save writes"
    return first_line(error)
