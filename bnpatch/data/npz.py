"""Read arrays of .npz files, after a check that their headers are plausible."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import check_regular
from bnpatch.core.limits import UNPACKED_MB

# The most bytes that a compressed byte can become. Deflate has a limit, other methods hardly have one.
_MOST_PER_BYTE = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1100}
_MOST_OTHERWISE = 10**6


def read_arrays(path: Path, wanted: Sequence[Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
    """Read some arrays of an .npz file.

    Args:
        path: the file.
        wanted: groups of names; the arrays of the first group that the file has completely are read.

    Returns:
        Those arrays by name; empty if the file has no group completely.

    Raises:
        BnpatchError: the file can't be read, is damaged, has arrays that aren't numbers, or unpacks to more
            than :data:`~bnpatch.core.limits.UNPACKED_MB` allows.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:
            members = _members(file)
            group = next((group for group in wanted if all(name in members for name in group)), ())
            size = path.stat().st_size
            return {name: _read(file, members[name], size) for name in group}
    except OSError as error:
        raise BnpatchError(f"cannot read {path}: {first_line(error)}", "check the path") from error
    except MemoryError as error:
        raise BnpatchError(f"{path} does not fit into memory", "give fewer examples, or a folder") from error
    except RuntimeError as error:  # the file is encrypted, or compressed by a method that Python lacks
        raise BnpatchError(f"cannot read {path}: {first_line(error)}", "write it with numpy.savez") from error
    except BnpatchError as error:
        raise BnpatchError(f"{path}: {error.problem}", error.remedy) from error
    except Exception as error:  # NumPy parses the header as Python, and raises errors of many types
        raise BnpatchError(
            f"{path} is damaged or not an .npz file ({first_line(error)})", "write it again"
        ) from error


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file.

    Raises:
        BnpatchError: the file can't be read.
    """
    read_arrays(path, ())
    with zipfile.ZipFile(path) as file:
        return list(_members(file))


def _members(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in file.infolist()}


def _read(file: zipfile.ZipFile, info: zipfile.ZipInfo, file_size: int) -> npt.NDArray[Any]:
    """Read one array. The size in its header is compared with the file before memory is allocated."""
    with file.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None and version != (3, 0):
            raise ValueError(f"version {version} of the format")
        shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(stream)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} has Python objects, not numbers")
        size = math.prod(shape) * dtype.itemsize
        most = _MOST_PER_BYTE.get(info.compress_type, _MOST_OTHERWISE) * min(info.compress_size, file_size)
        if min(shape, default=0) < 0 or size > min(info.file_size, most):
            raise ValueError(f"{info.filename} claims {size:,} bytes, and has {info.file_size:,}")
    more = (size - file_size) / 1e6
    UNPACKED_MB.check(
        more, f"{info.filename} unpacks to {more:,.0f} MB more than the file (numpy.savez compresses nothing)"
    )
    with file.open(info) as stream:
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
