"""Find the weights of a model in the content of a checkpoint, and the part of them that is the model."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted
from bnpatch.models import architecture
from bnpatch.models.labels import as_mapping
from bnpatch.models.reparametrized import computed

StateDict = dict[str, Tensor]

# Keys under which checkpoints have their weights, in order of preference.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "net", "weights", "module")
_PREFIXES = ("module.", "model.", "net.", "backbone.")
_DEPTH = 3  # the EMA of some projects is a dictionary with its own state dict

# Words in the keys of averaged weights, such as state_dict_ema, model_ema, ema_weights, averaged_model.
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?|averaging|shadow)([^a-z]|$)", re.IGNORECASE)
# The same, and the teacher of self-supervised learning, which is an average of the student.
_COPY = re.compile(rf"{_AVERAGED.pattern}|^teacher", re.IGNORECASE)
# First components of keys that don't belong to the model: losses, metrics, and copies of the model.
_NOT_THE_MODEL = re.compile(
    r"(^|_)(criterion|loss(es)?|loss_fn|metrics?|acc(uracy)?\d?|auroc|f1|teacher|ema|swa|averaged|momentum|target|encoder_k|"
    r"queue(_ptr)?|optimizer|scaler|n_averaged|total_ops|total_params)($|_)",
    re.IGNORECASE,
)
# Tensors of a head of several layers in the place of a classifier, such as that of contrastive learning.
_HEAD = re.compile(r"(fc|head|classifier)\.\d+\.\w+")
_COUNTERS = ("n_averaged", "total_ops", "total_params")  # the last two are thop's
_MOST_ELEMENTS = 1 << 28  # of a tensor whose elements share their memory: 1 GiB in float32


def find_weights(content: Mapping[str, Any], path: Path, use_ema: bool) -> tuple[Any, str]:
    """Return the module or the state dict in a checkpoint, and its key; the key is "" for the content itself.

    Raises:
        BnpatchError: there are no weights, or no averaged ones with ``use_ema``.
    """
    content = _with_tensors(content)
    if use_ema:
        averaged = [key for key in content if isinstance(key, str) and _COPY.search(key)]
        return _find_averaged(content, path, averaged)
    for key in _WEIGHTS:
        if (found := _weights_in(content.get(key))) is not None:
            return found, key
    if is_state_dict(content):
        return content, ""
    if (elsewhere := _under_other_keys(content)) is not None:
        return elsewhere
    keys = ", ".join(str(key)[:40] for key in list(content)[:8])
    raise BnpatchError(
        f"{path} has no weights that bnpatch can find among its keys {keys}", "save a state dict"
    )


def _find_averaged(content: Mapping[str, Any], path: Path, averaged: list[str]) -> tuple[Any, str]:
    last, last_key = next(
        ((found, key) for key in _WEIGHTS if (found := _weights_in(content.get(key))) is not None),
        (content, ""),
    )
    if "current_model_state" in content and last_key == "state_dict":
        return last, last_key  # Lightning's WeightAveraging stores the averaged weights as the state dict
    places = [(key, content[key]) for key in averaged]
    for name, callback in as_mapping(content.get("callbacks")).items():
        places += [
            (f"callbacks.{name}.{key}", value)
            for key, value in as_mapping(callback).items()
            if isinstance(key, str) and _AVERAGED.search(key)
        ]
    for key, value in places:
        found = _weights_in(value)
        if found is not None:
            return _averaged_part(found) or found, key
        if (found := _named_as(last, value)) is not None:
            return found, key
    if (found := _averaged_part(last)) is not None:
        return found, last_key
    said = f": {places[0][0]} is no state dict" if places else ""
    raise BnpatchError(f"{path} has no averaged weights{said}", "leave out --use-ema for the last ones")


def _averaged_part(weights: Any) -> Any:
    """Return the averaged weights among those of a state dict, such as ``ema_model.*``, or None."""
    if not is_state_dict(weights):
        return None
    for group in dict.fromkeys(key.split(".")[0] for key in weights):
        inside = {k.removeprefix(f"{group}."): v for k, v in weights.items() if k.startswith(f"{group}.")}
        if _COPY.search(group) and is_state_dict(inside):
            return inside
    return None


def _with_tensors(content: Mapping[str, Any], depth: int = _DEPTH) -> Mapping[str, Any]:
    """Return weights that are NumPy arrays as tensors, for the most part of a mapping; all else as it is."""
    arrays = {key: value for key, value in content.items() if _is_number_array(value)}
    if len(arrays) > len(content) / 2:
        return {**content, **{key: torch.as_tensor(value) for key, value in arrays.items()}}
    inside = {key: value for key, value in content.items() if isinstance(value, Mapping) and depth}
    changed = {key: new for key, old in inside.items() if (new := _with_tensors(old, depth - 1)) is not old}
    return {**content, **changed} if changed else content


def _is_number_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative


def _under_other_keys(content: Mapping[str, Any]) -> tuple[Any, str] | None:
    """Return the weights under a key of the project's own, and the key.

    The weights under several keys, such as "student" and "teacher", become one state dict in which the keys
    are prefixes, so that :func:`part_of` tells which are the model.
    """
    inside = {key: _weights_in(value) for key, value in content.items() if isinstance(key, str)}
    found = {key: value for key, value in inside.items() if value is not None and _has_weights(value)}
    if len(found) > 1 and not any(isinstance(value, nn.Module) for value in found.values()):
        return {f"{key}.{name}": t for key, value in found.items() for name, t in value.items()}, ""
    return next(((value, key) for key, value in found.items()), None)


def _has_weights(value: Any) -> bool:
    """Tell whether there are weights in a state dict, and not only random states and counters."""
    return isinstance(value, nn.Module) or any(
        isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim for tensor in value.values()
    )


def _weights_in(value: Any, depth: int = _DEPTH) -> Any:
    """Return a module or a state dict, also from a dictionary around it; None if there is neither."""
    if isinstance(value, nn.Module) or is_state_dict(value):
        return value
    if not isinstance(value, Mapping) or not depth:
        return None
    keys = [*_WEIGHTS, *(key for key in value if isinstance(key, str) and _AVERAGED.search(key))]
    inside = (_weights_in(value.get(key), depth - 1) for key in keys)
    return next((found for found in inside if found is not None), None)


def _named_as(state_dict: Any, values: Any) -> Any:
    """Return averaged weights with the names of the last ones, if a callback stored them as a list."""
    if not isinstance(values, (list, tuple)) or not is_state_dict(state_dict):
        return None
    if len(values) != len(state_dict) or not all(isinstance(value, Tensor) for value in values):
        return None
    named = dict(zip(state_dict, values, strict=True))
    shapes = ((value.shape, getattr(state_dict[key], "shape", None)) for key, value in named.items())
    return named if all(ours == theirs for ours, theirs in shapes) else None


def is_state_dict(value: Any) -> bool:
    """Return whether a value is a mapping from strings to tensors, for the most part."""
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(v, Tensor) for v in value.values())
    return all(isinstance(key, str) for key in value) and tensors > len(value) / 2


def strip_prefixes(state_dict: Mapping[str, Any]) -> StateDict:
    """Return the tensors of a state dict without the usual prefixes that all of them have."""
    state = {
        key: value
        for key, value in state_dict.items()
        if isinstance(value, Tensor) and key.rsplit(".", 1)[-1] not in _COUNTERS
    }
    # torch.compile marks each module that it compiled, also those inside.
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", key): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = computed(state)
    # torchvision's published DenseNet weights still have the tensor names of 2017.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in state.items()
    }


def check_weights(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors have values in memory that are finite.

    Raises:
        BnpatchError: a tensor has no values, is sparse, nested or quantized, too large for the memory that it
            has in the file, or not finite; the message names it.
    """
    for name, tensor in state_dict.items():
        if tensor.is_meta:
            raise BnpatchError(f"{path}: {name} has no values, only a shape", "save it from another device")
        if tensor.is_quantized:
            raise BnpatchError(f"{path}: {name} is quantized", "give the checkpoint from before quantization")
        if tensor.is_nested or tensor.layout != torch.strided:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise BnpatchError(f"{path}: {name} is no dense tensor ({layout})", "save it after .to_dense()")
        held = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        if tensor.numel() > max(held, _MOST_ELEMENTS):
            raise BnpatchError(
                f"{path}: {name} claims {tensor.numel()} elements and holds {held}; bnpatch expands a tensor "
                f"to at most {_MOST_ELEMENTS}",
                "save it after .contiguous()",
            )
        # What doesn't belong to the model, such as a metric, may well be nan.
        if tensor.is_floating_point() and not any(map(is_extra, name.split("."))) and not _is_finite(tensor):
            raise BnpatchError(
                f"{path}: the weights {name} are not finite",
                "take a checkpoint from before training diverged",
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    if tensor.element_size() == 1:  # no reduction supports the types of 8 bits
        tensor = tensor.float()
    return all(map(math.isfinite, map(float, tensor.aminmax())))  # nan if any is; isfinite would copy it all


def part_of(state_dict: StateDict, arch: str | None, path: Path) -> tuple[StateDict, str]:
    """Return the part of a state dict that is a known architecture, and a note on what was left out.

    Checkpoints of whole training programs have more than the model: losses, metrics, and copies of the model
    such as a teacher or an average. A part is the tensors under one prefix, such as ``student.backbone.``.
    The function looks for parts whose names without the prefix are those of an architecture. Among several,
    the model comes before a teacher or an average, and a larger part before a smaller one.

    Args:
        state_dict: the weights.
        arch: the architecture that the user named, or None. With one, all other tensors are left out.
        path: the file, for messages.

    Raises:
        BnpatchError: besides an architecture's weights there are others that may belong to the model, and the
            user named no architecture.
    """
    known = _names_of(arch) if arch else None
    if known is None and architecture.by_tensor_names(state_dict):
        return state_dict, ""
    parts = []  # whether it is a copy of the model, its size times -1, its prefix, its tensors
    heads = {}  # by prefix, the names of the tensors of a head that is no part of the architecture
    for prefix, part in _parts(state_dict):
        if known is not None:
            chosen = _only(part, {key.split(".")[0] for key in known})
            fits = known <= {key for key in chosen if not architecture.is_optional(key)}
        else:
            chosen = _only(part, {key.split(".")[0] for key in part if not is_extra(key.split(".")[0])})
            chosen = part if architecture.by_tensor_names(part) else chosen
            fits = bool(architecture.by_tensor_names(chosen))
        if not fits and (body := _without_head(chosen, known)) is not None:
            heads[prefix], chosen, fits = chosen.keys() - body.keys(), body, True
        if fits:
            parts.append((any(map(is_extra, prefix.split("."))), -len(chosen), prefix, chosen))
    if not parts:
        return state_dict, ""
    _, _, prefix, chosen = min(parts, key=lambda part: part[:3])
    copies = [f"{other}." for *_, other, _ in parts if other and other != prefix]
    left = [key for key in state_dict if key.removeprefix(f"{prefix}." if prefix else "") not in chosen]
    head = sorted(heads.get(prefix, ()))
    left = [key for key in left if key.removeprefix(f"{prefix}." if prefix else "") not in head]
    unknown = [
        key
        for key in left
        if not any(map(is_extra, key.split("."))) and not key.startswith(tuple(copies))
        and (state_dict[key].is_floating_point() or state_dict[key].numel() > 1)  # else a counter
    ]  # fmt: skip
    where = f"the weights under {prefix}. are" if prefix else "most weights are"
    if unknown and arch is None:
        some = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        names = " or ".join(architecture.by_tensor_names(chosen))
        raise BnpatchError(
            f"{path}: {where} those of {names}, but beside them are {some}",
            f"--arch {architecture.by_tensor_names(chosen)[0]} leaves these out, if the model works without",
        )
    groups = dict.fromkeys(_group(key, prefix) for key in left)
    notes = (
        [f"left out {counted(len(left), 'tensor')} beside the model: {', '.join(list(groups)[:6])}"]
        if left
        else []
    )
    if head:
        notes.append(
            f"left out a head of several layers ({', '.join(head)}), whose code the weights don't have"
        )
    return chosen, "; ".join(notes)


def _without_head(state_dict: StateDict, known: Collection[str] | None) -> StateDict | None:
    """Return the weights without a head of several layers, if they are an architecture's then; else None.

    ``known`` has the names of the tensors of the architecture that the user named.
    """
    head = {key for key in state_dict if _HEAD.fullmatch(key)}
    if sum(state_dict[key].ndim == 2 for key in head) < 2:
        return None
    body = {key: tensor for key, tensor in state_dict.items() if key not in head}
    if known is not None:
        return (
            body if {key for key in known if not key.startswith(architecture.HEADS)} <= body.keys() else None
        )
    return body if architecture.names_without_head(body) else None


def without_extras(state_dict: StateDict) -> StateDict:
    """Return the tensors that are not, by their names, losses, metrics or copies of the model."""
    return {key: t for key, t in state_dict.items() if not any(map(is_extra, key.split(".")))}


def _group(key: str, prefix: str) -> str:
    """Return the name under which a note lists a tensor that was left out: its first component and ``.*``."""
    inside = prefix and key.startswith(f"{prefix}.")
    first = key.removeprefix(f"{prefix}.").split(".")[0] if inside else key.split(".")[0]
    name = f"{prefix}.{first}" if inside else first
    return name if name == key else f"{name}.*"


def _parts(state_dict: StateDict) -> Iterator[tuple[str, StateDict]]:
    """Yield the tensors under each prefix, without it, beginning with all; a part has at least 4 tensors."""
    level: dict[str, StateDict] = {"": state_dict}
    while level:
        below: dict[str, StateDict] = {}
        for prefix, part in level.items():
            yield prefix, part
            for key, tensor in part.items():
                first, dot, rest = key.partition(".")
                if dot:
                    below.setdefault(f"{prefix}.{first}".lstrip("."), {})[rest] = tensor
        level = {prefix: part for prefix, part in below.items() if len(part) >= 4}


def _only(state_dict: StateDict, groups: Collection[str]) -> StateDict:
    return {key: tensor for key, tensor in state_dict.items() if key.split(".")[0] in groups}


def is_extra(component: str) -> bool:
    """Tell whether a component of a tensor's name shows that the tensor doesn't belong to the model."""
    return bool(_NOT_THE_MODEL.search(component))


def _names_of(arch: str) -> set[str]:
    """Return the names of the tensors of an architecture that the user named."""
    library, name = architecture.parse_name(arch)
    library = library or next(lib for lib in architecture.LIBRARIES if architecture.is_known(lib, name))
    tensors = architecture.Architecture(library, name).sketch().state_dict()
    return {key for key in tensors if not architecture.is_optional(key)}
