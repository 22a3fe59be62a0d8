"""Find the names of classes in checkpoints, configurations and modules."""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bnpatch.core.text import counted

# Keys of class names: a list in order, a dictionary by index, or a dictionary from name to index.
_NAMES = (
    *("class_to_idx", "class_names", "classes", "label_names", "idx_to_class", "id2label", "label2id"),
    *("CLASSES", "names"),
)
# Keys of dictionaries that may have these keys: training arguments, hyper-parameters, configurations.
_INSIDE = (
    *("hyper_parameters", "datamodule_hyper_parameters", "args", "config", "cfg", "meta", "dataset_meta"),
    *("pretrained_cfg", "default_cfg", "data_config", "datamodule", "data", "hparams"),
)
_DEPTH = 3  # hyper_parameters.config.data holds names in projects that nest their configuration
_MOST = 1_000_000  # the most classes that are accepted

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # Hugging Face's default if the user gave no names


@dataclass(frozen=True)
class Labels:
    """Names of the classes in the order of the outputs.

    Attributes:
        names: the names; empty if the value can't be read as names.
        source: the place of the names, such as ``hyper_parameters.class_names``.
    """

    names: tuple[str, ...]
    source: str


def labels_of(content: Mapping[Any, Any], depth: int = _DEPTH) -> Iterator[Labels]:
    """Yield all lists of names in a checkpoint or a configuration, those at its top level first."""
    for key in _NAMES:
        value = content.get(key)
        if isinstance(value, (list, tuple, np.ndarray, Mapping)) and len(value):
            names = _read(value)
            if not _are_placeholders(names):
                yield Labels(names, key)
    for key in _INSIDE if content and depth else ():
        for labels in labels_of(as_mapping(content.get(key)), depth - 1):
            yield Labels(labels.names, f"{key}.{labels.source}")


def labels_of_module(module: nn.Module) -> Iterator[Labels]:
    """Yield the names in a module's attributes or in its ``config``, as in Hugging Face's models."""
    holders = {"": module, "config": getattr(module, "config", None), "model": getattr(module, "model", None)}
    holders["pretrained_cfg"] = getattr(module, "pretrained_cfg", None)
    for where, holder in holders.items():
        attributes = {key: _attribute(holder, key) for key in _NAMES}
        for labels in labels_of(attributes, depth=0):
            yield Labels(labels.names, f"{where}.{labels.source}".lstrip("."))


def _attribute(holder: Any, key: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(key)
    try:
        return getattr(holder, key, None)
    except Exception:  # a property of the user's class may raise any error
        return None


def choose(
    candidates: Iterable[Labels], num_classes: int | None, where: str
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the first list with one name per output, and notes on its place or on lists that don't fit.

    Args:
        candidates: the lists of names.
        num_classes: number of outputs; None if it isn't known, and 0 if there is no classifier.
        where: name of the file that has the lists, for the notes.
    """
    notes = []
    for labels in candidates:
        if not labels.names:
            notes.append(f"{labels.source} of {where} can't be read as names of classes: not used")
        elif num_classes and len(labels.names) != num_classes:
            counts = (
                f"{counted(len(labels.names), 'class')}, but the model has {counted(num_classes, 'output')}"
            )
            notes.append(f"{labels.source} of {where} names {counts}: not used")
        else:
            return labels.names, [f"names of the classes from {labels.source} of {where}"]
    return None, notes[:1]


def read_names(value: Any) -> tuple[str, ...] | None:
    """Return names from a list, or from a dictionary by index (a number or text) or by name; else None.

    Hugging Face's placeholders, LABEL_0 and so on, are no names.
    """
    names = _read(value)
    return None if _are_placeholders(names) else names or None


def _read(value: Any) -> tuple[str, ...]:
    """Return what a value has in the place of names; empty if it can't be read as names."""
    names: list[Any] = []
    if isinstance(value, Mapping):
        by_name = all(isinstance(key, str) and _is_index(index) for key, index in value.items())
        names = _ordered({i: name for name, i in value.items()} if by_name else value, len(value))
    elif isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        names = list(value)
    if not 0 < len(names) <= _MOST or not all(isinstance(n, str) or _is_index(n) for n in names):
        return ()
    return tuple(map(str, names))


def _are_placeholders(names: tuple[str, ...]) -> bool:
    return bool(names) and all(map(_PLACEHOLDER.fullmatch, names))


def _is_index(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= int(value) < _MOST


def _ordered(by_index: Mapping[Any, Any], count: int) -> list[Any]:
    """Return the names in order if their indices are 0 to K - 1, each once; else an empty list."""
    found: dict[int, Any] = {}
    for index, name in by_index.items():
        if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
            index = int(index)
        if not _is_index(index):
            return []
        found[int(index)] = name
    return [found[i] for i in range(count)] if found.keys() == set(range(count)) else []


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a dictionary or the arguments of a script as a mapping; it is empty for anything else."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}
