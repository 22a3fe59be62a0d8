"""Read files of ``torch.save`` and safetensors without running code that is in the file."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import types
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.limits import UNPACKED_MB
from bnpatch.models.foreign import TO_ONNX, check_kind, check_not_onnx, is_safetensors, reading

_np_multiarray: Any = import_module("numpy._core.multiarray")  # where NumPy's own pickles point to

# Where classes of bnpatch were when models were pickled with version 0.1, and are now.
_MOVED = {
    "bnpatch.moments": "bnpatch.core.moments",
    "bnpatch.spec": "bnpatch.core.norm_spec",
    "bnpatch.nn.folded": "bnpatch.nn.fused_conv",
}
_RENAMED = {"ExampleWeighedNorm": "ExampleWeightedNorm", "VirtualNorm": "RecoveredNorm"}

# Classes of paths, by the names that they have in any version of Python and on any system, and the pure class
# to use instead, which every system has.
_PATHS = {
    f"{module}.{name}": pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
}
_NOT_HERE = "PosixPath" if os.name == "nt" else "WindowsPath"

# Types of plain data that training scripts store beside the weights, which are safe to unpickle.
_SAFE: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    *((path, name) for name, path in _PATHS.items()),
    np.dtype,
    np.ndarray,
    _np_multiarray.scalar,
    _np_multiarray._reconstruct,
    (_np_multiarray.scalar, "numpy.core.multiarray.scalar"),  # the names of NumPy 1
    (_np_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"},
]


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows earlier names of bnpatch's classes, and paths of other systems."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("bnpatch."):
            module, name = _MOVED.get(module, module), _RENAMED.get(name, name)
        if module in ("pathlib", "pathlib._local"):
            if name == _NOT_HERE:
                return _PATHS[f"{module}.{name}"]
            module = "pathlib"
        return super().find_class(module, name)


# Replaces the module pickle in torch.load.
_PICKLE: Any = types.SimpleNamespace(**{**vars(pickle), "Unpickler": _Unpickler})


def read_content(path: Path, unsafe: bool) -> Any:
    """Return the content of a checkpoint file: mostly a dictionary, and with ``unsafe`` any object.

    Raises:
        BnpatchError: the file can't be read, is not a checkpoint, or would have to run code.
    """
    check_kind(path)
    remedy = "copy it again, and check that it is complete"
    check_not_onnx(path)
    if is_safetensors(path):
        from safetensors.torch import load_file

        with reading(path, "a safetensors file", remedy):
            return load_file(path)
    with reading(path, "a checkpoint", remedy):
        _check_archive(path)
        return _torch_load(path, unsafe)


def _check_archive(path: Path) -> None:
    """Raise an error for a zip file that has no weights, or that would fill the memory if unpacked."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        unpacked = sum(member.file_size for member in archive.infolist())
    if any(name.endswith("constants.pkl") for name in names):
        raise BnpatchError(
            f"{path} is a TorchScript archive, which can't be patched",
            "give the state dict of the Python model, or an export to ONNX",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise BnpatchError(
            f"{path} is a torch.export program under another name", "give it a name that ends in .pt2"
        )
    if any(name.endswith(".weights.h5") for name in names):
        raise BnpatchError(f"{path} is a Keras archive", TO_ONNX)
    if not any(name.endswith("data.pkl") for name in names):
        raise BnpatchError(
            f"{path} is a zip archive that torch.save did not write", "unpack it, and give the file inside"
        )
    more = (unpacked - path.stat().st_size) / 1e6
    UNPACKED_MB.check(
        more, f"{path} unpacks to {more:,.0f} MB more than its size (torch.save compresses nothing)"
    )


def _torch_load(path: Path, unsafe: bool) -> Any:
    try:
        # torch would choose how to read a path by its suffix; an open file has none.
        with torch.serialization.safe_globals(_SAFE), path.open("rb") as file:
            if unsafe:
                return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch names the class in the text alone
        if found is None:
            raise
        raise BnpatchError(
            f"{path} holds a pickled {found[1]}, and unpickling can run any code",
            "save a state dict instead, or add --unsafe-load if you trust whoever made the file",
        ) from error
    except (AttributeError, ImportError) as error:
        if not unsafe:
            raise
        raise BnpatchError(
            f"{path} needs Python code that is not here: {first_line(error)}", "run where it can be imported"
        ) from error
