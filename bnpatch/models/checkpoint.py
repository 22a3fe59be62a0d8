"""Read a checkpoint file: the weights, and what the file says of their model."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.models.architecture import recognized
from bnpatch.models.foreign import reading
from bnpatch.models.labels import Labels, as_mapping, labels_of
from bnpatch.models.normalizers import Normalizer, split_off
from bnpatch.models.unpickle import read_content
from bnpatch.models.weights import StateDict, check_weights, find_weights, is_extra, strip_prefixes

_DEPTH, _SHORT = 3, 100  # how deep names of architectures are looked for, and how long they may be
SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors")


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: the file.
        state_dict: the weights, without the prefixes that wrappers add and without ``normalizer``.
        module: the model itself, if the file has a pickled one (only with ``unsafe``).
        arch: name of the architecture, if the file has it.
        library: the library whose training script wrote the file, timm or torchvision, if the layout tells.
        args: the training arguments, if the file has them.
        labels: lists of names of the classes, those at the top level of the file first.
        about: all that the file has beside the weights.
        bnpatch: recipe and preprocessing that bnpatch stored, or None.
        normalizer: a layer before the model that normalizes images, if the weights have one.
    """

    path: Path
    state_dict: StateDict
    module: nn.Module | None = None
    arch: str | None = None
    library: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[Labels, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    bnpatch: Mapping[str, Any] | None = None
    normalizer: Normalizer | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the outputs, if the file has them."""
        return next((labels.names for labels in self.labels if labels.names), None)


def read_checkpoint(
    path: str | os.PathLike[str], *, use_ema: bool = False, unsafe: bool = False
) -> Checkpoint:
    """Read a checkpoint file of timm, torchvision, Lightning, bnpatch, or a bare state dict.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        use_ema: read the averaged weights instead of the last ones.
        unsafe: allow pickled objects, which can run any code that their author wants.

    Raises:
        BnpatchError: the file can't be read, is not a checkpoint, or has weights that are not finite.
    """
    path = Path(path)
    content = read_content(path, unsafe)
    with reading(path, "a checkpoint", "save a state dict"):
        return _of_content(content, path, use_ema)


def _of_content(content: Any, path: Path, use_ema: bool) -> Checkpoint:
    """Find the weights, and what is beside them, in the content of a file."""
    about: Mapping[str, Any] = {}
    weights = content
    if not isinstance(content, nn.Module):
        if not isinstance(content, Mapping):
            raise BnpatchError(f"{path} holds a {type(content).__name__}, not weights", "save a state dict")
        weights, _ = find_weights(content, path, use_ema)
        about = content if weights is not content else {}
    args = as_mapping(about.get("args")) or as_mapping(about.get("hyper_parameters"))
    module = weights if isinstance(weights, nn.Module) else None
    state_dict = strip_prefixes(module.state_dict() if module is not None else weights)
    check_weights(state_dict, path)
    normalizer = None
    if module is None:
        state_dict, normalizer = split_off(state_dict)
        state_dict = strip_prefixes(state_dict)
    return Checkpoint(
        path,
        state_dict,
        module=module,
        arch=_architecture(about, args),
        library=_library(about),
        args=args,
        labels=tuple(labels_of(about)),
        about=about,
        bnpatch=as_mapping(about.get("bnpatch")) or None,
        normalizer=normalizer,
    )


def _architecture(about: Mapping[str, Any], args: Mapping[str, Any]) -> str | None:
    """Return the name of the architecture, from the usual places or any other text beside the weights."""
    usual = (about.get("arch"), args.get("model"), args.get("arch"), args.get("model_name"))
    named = [name for name in usual if isinstance(name, str) and name]
    known = (found for text in (*named, *_texts(about)) if (found := recognized(text)) is not None)
    return next(known, named[0] if named else None)


def _texts(content: Mapping[Any, Any], depth: int = _DEPTH) -> Iterator[str]:
    """Yield the short texts in a dictionary and in those inside it, without what is said of a teacher."""
    for key, value in content.items():
        if is_extra(str(key)):
            continue
        if isinstance(value, str) and 0 < len(value) < _SHORT:
            yield value
        elif depth:
            yield from _texts(as_mapping(value), depth - 1)


def _library(about: Mapping[str, Any]) -> str | None:
    """Tell whose training script wrote a checkpoint, or return None.

    Both scripts store ``args``; timm's also stores the name of the architecture and a version.
    """
    if "arch" in about and ("version" in about or "args" in about):
        return "timm"
    return "torchvision" if "model" in about and "args" in about else None
