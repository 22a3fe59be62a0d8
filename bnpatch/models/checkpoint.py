"""Read a checkpoint file: the weights, and what it says of the model that they belong to."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError, first_line

StateDict = dict[str, Tensor]

SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors")

_np_multiarray: Any = import_module("numpy._core.multiarray")  # where NumPy's own pickles point to

# Where checkpoints keep their weights, in order of preference; the averaged ones apart.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "net", "weights", "module")
_EMA_WEIGHTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
_CLASS_NAMES = ("class_names", "classes", "label_names")

# Plain data that training scripts store beside the weights: harmless to unpickle.
_SAFE: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    np.ndarray,
    _np_multiarray.scalar,
    _np_multiarray._reconstruct,
    (_np_multiarray.scalar, "numpy.core.multiarray.scalar"),  # the names of NumPy 1
    (_np_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"},
]


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        state_dict: the weights, without the prefixes that wrappers add.
        module: the model itself, where the file is a pickled one (only with ``unsafe``).
        arch: name of the architecture, where the file says it.
        library: whose training script wrote the file, timm or torchvision, where its layout tells.
        args: the training arguments, where the file has them.
        class_names: names of the classes in the order of the outputs, where the file has them.
        bnpatch: what bnpatch stored: recipe and preprocessing.
    """

    path: Path
    state_dict: StateDict
    module: nn.Module | None = None
    arch: str | None = None
    library: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    bnpatch: Mapping[str, Any] | None = None


def read_checkpoint(
    path: str | os.PathLike[str], *, use_ema: bool = False, unsafe: bool = False
) -> Checkpoint:
    """Read a checkpoint file of timm, torchvision, Lightning, bnpatch, or a bare state dict.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        use_ema: take the averaged weights rather than the last ones.
        unsafe: allow pickled objects, which can run any code that their author wants.

    Raises:
        BnpatchError: the file can't be read, is no checkpoint, or has weights that are not finite.
    """
    path = Path(path)
    content = _read(path, unsafe)
    if isinstance(content, nn.Module):
        return _checked(Checkpoint(path, dict(content.state_dict()), module=content))
    if not isinstance(content, Mapping):
        raise BnpatchError(f"{path} holds a {type(content).__name__}, not weights", "save a state dict")
    weights = _find_weights(content, path, use_ema)
    about = content if weights is not content else {}
    args = _as_mapping(about.get("args") or about.get("hyper_parameters"))
    module = weights if isinstance(weights, nn.Module) else None
    return _checked(
        Checkpoint(
            path,
            _strip_prefixes(module.state_dict() if module is not None else weights),
            module=module,
            arch=_first_string(
                about.get("arch"), args.get("model"), args.get("arch"), args.get("model_name")
            ),
            library=_library(about),
            args=args,
            class_names=_class_names(about),
            bnpatch=_as_mapping(about.get("bnpatch")) or None,
        )
    )


def _read(path: Path, unsafe: bool) -> Any:
    if path.is_dir():
        raise BnpatchError(f"{path} is a folder, not a checkpoint", "name the file inside it")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BnpatchError(f"cannot read {path}: {reason}", "check the path") from error
    if not head:
        raise BnpatchError(f"{path} is empty", "copy or download it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        _refuse_programs(path)
        return _torch_load(path, unsafe)
    except BnpatchError:
        raise
    except Exception as error:  # a damaged file makes zipfile, pickle and torch trip in many ways
        raise BnpatchError(
            f"{path} is damaged or not a checkpoint ({first_line(error)})",
            "copy it again, and see that it is complete",
        ) from error


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise BnpatchError(
            f"{path} is damaged or not a safetensors file ({error})", "copy it again"
        ) from error


def _refuse_programs(path: Path) -> None:
    """Tell archives that hold a program from those that hold weights: both are zip files."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        raise BnpatchError(
            f"{path} is a TorchScript archive, which can't be patched",
            "give the state dict of the Python model, or an export to ONNX",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise BnpatchError(
            f"{path} is a torch.export program, which this version can't patch",
            "give the checkpoint that it was exported from",
        )


def _torch_load(path: Path, unsafe: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
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


def _find_weights(content: Mapping[str, Any], path: Path, use_ema: bool) -> Any:
    candidates = _EMA_WEIGHTS if use_ema else (*_WEIGHTS, *_EMA_WEIGHTS)
    for key in candidates:
        if isinstance(content.get(key), nn.Module) or _is_state_dict(content.get(key)):
            return content[key]
    if use_ema:
        raise BnpatchError(f"{path} has no averaged weights", "leave out --use-ema")
    if _is_state_dict(content):
        return content
    keys = ", ".join(map(str, list(content)[:8]))
    raise BnpatchError(
        f"{path} has no weights that bnpatch can find among its keys {keys}", "save a state dict"
    )


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(v, Tensor) for v in value.values())
    return all(isinstance(key, str) for key in value) and tensors > len(value) / 2


def _strip_prefixes(state_dict: Mapping[str, Any]) -> StateDict:
    state = {
        key: value for key, value in state_dict.items() if isinstance(value, Tensor) and key != "n_averaged"
    }
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # torchvision's published DenseNets still have the names of 2017.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in state.items()
    }


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    for name, tensor in checkpoint.state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BnpatchError(
                f"{checkpoint.path}: the weights {name} are not finite",
                "take a checkpoint from before training diverged",
            )
    return checkpoint


def _library(about: Mapping[str, Any]) -> str | None:
    """Both scripts store ``args``; timm's also the name of the architecture and a version."""
    if "arch" in about and ("version" in about or "args" in about):
        return "timm"
    return "torchvision" if "model" in about and "args" in about else None


def _class_names(about: Mapping[str, Any]) -> tuple[str, ...] | None:
    if indices := _as_mapping(about.get("class_to_idx")):
        return tuple(str(name) for name in sorted(indices, key=lambda name: int(indices[name])))
    for key in _CLASS_NAMES:
        names = about.get(key)
        if isinstance(names, Sequence) and not isinstance(names, str) and names:
            return tuple(map(str, names))
    return None


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _first_string(*values: Any) -> str | None:
    return next((value for value in values if isinstance(value, str) and value), None)
