"""Find the architecture in timm or torchvision that weights belong to, and build it."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError

LIBRARIES = ("torchvision", "timm")

#: How the names of a classifier's tensors begin in timm, if the classifier has one layer.
HEADS = ("fc.", "classifier.", "head.", "head.fc.")

# How the names of tensors end that architectures have and old checkpoints lack: counters of batches.
_OPTIONAL = "num_batches_tracked"

# MobileNets with TensorFlow's padding and eps of the Batch Norm, by names of our own, because timm has none.
_TENSORFLOW_MOBILENETS = {
    f"tf_mobilenetv{version}_{width:03}": (version, width / 100)
    for version, widths in ((1, (25, 50, 75, 100)), (2, (35, 50, 75, 100, 140)))
    for width in widths
}

#: The remedy where the weights belong to no architecture that bnpatch knows.
OWN_CODE = "for code of your own call bnpatch.tune_alpha(module, data) from Python"


@dataclass(frozen=True)
class Architecture:
    """A constructor of timm or torchvision, and the arguments with which given weights fit.

    Attributes:
        library: timm or torchvision.
        name: the name of the architecture in the library.
        num_classes: number of outputs; 0 if the weights have no classifier.
        in_chans: number of input channels.
        also: further architectures that the weights would fit, as ``library:name``.
    """

    library: str
    name: str
    num_classes: int = 1000
    in_chans: int = 3
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self) -> nn.Module:
        """Build the model, with random weights."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _build(self.library, self.name, num_classes=self.num_classes, in_chans=self.in_chans)

    @lru_cache(maxsize=8)  # noqa: B019  a key holds its architecture, which is small
    def sketch(self) -> nn.Module:
        """Build the model on the device "meta", which has names and shapes but no weights, if it can be.

        Callers share the module: read it, don't change it.
        """
        try:
            with torch.device("meta"):
                return self.build()
        except NotImplementedError:  # the constructor computes with tensors, as that of torchvision's RegNet
            return self.build().to("meta")


def is_known(library: str, name: str) -> bool:
    """Return whether a library has a classifier of this name, without a tag."""
    if library == "timm":
        from timm.models import get_deprecated_models, is_model

        is_current = "." not in name and is_model(name) and name not in get_deprecated_models()
        return is_current or name in _TENSORFLOW_MOBILENETS
    return name in known_names(library)


def known_names(library: str) -> list[str]:
    """Return the names of all classifiers of a library."""
    if library == "timm":
        import timm

        return [*timm.list_models(), *_TENSORFLOW_MOBILENETS]
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def current_name(name: str) -> str:
    """Return the name that timm has today for what the hub or an earlier timm called otherwise.

    >>> current_name("tf_efficientnet_b0_ns")
    'timm:tf_efficientnet_b0.ns_jft_in1k'
    """
    from timm.models import get_deprecated_models

    rest = re.sub(r"^(timm:)?((hf[-_]hub:)?timm/)?", "", name)
    renamed: str = get_deprecated_models().get(rest, rest)
    return renamed if renamed == name else f"timm:{renamed}"


def recognized(name: str) -> str | None:
    """Return an architecture that a text names, as ``name`` or ``library:name``; None if it names none."""
    library, colon, rest = current_name(name).rpartition(":")
    rest = rest.split(".")[0]
    is_one = any(is_known(lib, rest) for lib in LIBRARIES if library in ("", lib))
    return f"{library}{colon}{rest}" if is_one else None


def parse_name(name: str) -> tuple[str | None, str]:
    """Split ``library:name``. The library is None if the name has none; a tag of timm is dropped.

    Raises:
        BnpatchError: there is no such architecture; the message suggests the closest names.
    """
    library, colon, rest = (name := current_name(name)).partition(":")
    if not colon:
        library, rest = "", name
    elif library not in LIBRARIES:
        raise BnpatchError(
            f"{name!r} names no library", f"write one of {', '.join(f'{n}:NAME' for n in LIBRARIES)}"
        )
    rest = rest.split(".")[0]
    libraries = [library] if library else list(LIBRARIES)
    if not any(is_known(lib, rest) for lib in libraries):
        known = [known_name for lib in libraries for known_name in known_names(lib)]
        close = get_close_matches(rest, known, n=3)
        remedy = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "see timm.list_models()"
        raise BnpatchError(f"there is no architecture {rest!r} in {' or '.join(libraries)}", remedy)
    return library or None, rest


def identify(
    state_dict: Mapping[str, Tensor], hint: str | None = None, file_name: str = "", library: str | None = None
) -> Architecture:
    """Find the architecture that a state dict belongs to.

    The function first tries the name that the checkpoint or the file name gives, then all architectures with
    the same tensor names. A candidate must agree in every name and shape, except for the numbers of classes
    and of input channels, which the tensors give. If several agree, such as variants that differ only in
    strides, the first is returned and its :attr:`Architecture.also` names the others.

    Args:
        state_dict: the weights.
        hint: name of the architecture, if the checkpoint has one.
        file_name: name of the checkpoint file.
        library: the library that is meant if an architecture is in both under one name.

    Raises:
        BnpatchError: no architecture fits.
    """
    if not state_dict:
        raise BnpatchError(f"{file_name or 'the checkpoint'} has no weights", "save a state dict")
    by_names = [*_by_tensor_names(state_dict), *names_without_head(state_dict)]
    groups = (_named(hint), _named_by_file(file_name), by_names)
    preferred = (sorted(group, key=lambda candidate: candidate[0] != library) for group in groups)
    candidates = dict.fromkeys(candidate for group in preferred for candidate in group)
    fits = [arch for lib, name in candidates if (arch := _fit(lib, name, state_dict))]
    if not fits:
        raise BnpatchError(
            f"the weights of {file_name or 'the checkpoint'} fit no architecture of timm or torchvision",
            OWN_CODE,
        )
    best = fits[0]
    also = tuple(str(arch) for arch in fits[1:] if arch.name != best.name)
    return Architecture(best.library, best.name, best.num_classes, best.in_chans, also)


def fit(name: str, state_dict: Mapping[str, Tensor]) -> Architecture:
    """Fit the weights to the architecture that the user named.

    Raises:
        BnpatchError: there is no such architecture, or the weights don't fit it; the message names the first
            difference.
    """
    library, rest = parse_name(name)
    libraries = [library] if library else [lib for lib in LIBRARIES if is_known(lib, rest)]
    for lib in libraries:
        if arch := _fit(lib, rest, state_dict):
            return arch
    raise BnpatchError(
        f"the weights do not fit {libraries[0]}:{rest}: {_first_difference(libraries[0], rest, state_dict)}",
        _remedy_for(state_dict),
    )


def _remedy_for(state_dict: Mapping[str, Tensor]) -> str:
    try:
        return f"they fit {identify(state_dict)}: name that, or leave out --arch"
    except BnpatchError:  # no architecture fits
        return f"they fit no other architecture either: {OWN_CODE}"


def names_hash(state_dict: Mapping[str, Any]) -> str:
    """Hash the names of tensors; the index of architectures has these hashes as keys."""
    names = sorted(name for name in state_dict if not name.endswith(_OPTIONAL))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


@cache
def _index() -> dict[str, list[str]]:
    """Read the index of architectures, which ``tests/models/make_architecture_index.py`` writes."""
    text = resources.files("bnpatch.models").joinpath("architectures.json").read_text(encoding="utf-8")
    index: dict[str, list[str]] = json.loads(text)
    return index


def is_optional(name: str) -> bool:
    """Return whether a tensor is one that old checkpoints lack: a counter of batches."""
    return name.endswith(_OPTIONAL)


def by_tensor_names(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the architectures with the same names of tensors, as ``library:name``."""
    return [f"{library}:{name}" for library, name in _by_tensor_names(state_dict)]


def _by_tensor_names(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in _index().get(names_hash(state_dict), []):
        library, _, name = entry.partition(":")
        if is_known(library, name):
            yield library, name


def names_without_head(state_dict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the architectures of timm, (library, name), of which only the classifier is missing."""
    found = []
    for head in HEADS:
        completed = dict.fromkeys([*state_dict, f"{head}weight", f"{head}bias"])
        found += [(lib, name) for lib, name in _by_tensor_names(completed) if lib == "timm"]
    return found


def _named(hint: str | None) -> list[tuple[str, str]]:
    try:
        library, name = parse_name(hint) if hint else (None, "")
    except BnpatchError:
        return []  # neither library has the name, so the tensors decide
    return [(lib, name) for lib in LIBRARIES if library in (None, lib) and is_known(lib, name)]


def _named_by_file(file_name: str) -> list[tuple[str, str]]:
    """Return the architectures with the longest name that the file name begins with (resnet18-f37.pth)."""
    stem = file_name.lower()
    for end in range(len(stem), 0, -1):
        if named := [(library, stem[:end]) for library in LIBRARIES if is_known(library, stem[:end])]:
            return named
    return []


def _fit(library: str, name: str, state_dict: Mapping[str, Tensor]) -> Architecture | None:
    """Return the architecture with the classes and channels of the tensors; None if anything else differs."""
    try:
        default = Architecture(library, name).sketch()
        arch = Architecture(library, name, *_classes_and_channels(library, default, state_dict))
        return None if _difference(arch.sketch(), state_dict) else arch
    except BnpatchError:
        raise
    except Exception:  # constructors raise errors of any type for arguments that they don't support
        return None


def _first_difference(library: str, name: str, state_dict: Mapping[str, Tensor]) -> str:
    """Describe the first tensor in which an architecture and weights differ."""
    default = Architecture(library, name)
    model = default.sketch()
    try:
        arch = Architecture(library, name, *_classes_and_channels(library, model, state_dict))
        return _difference(arch.sketch(), state_dict)
    except Exception:  # no sketch has these classes and channels; the default one shows a difference, too
        return _difference(model, state_dict)


def _difference(model: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Describe the first tensor in which model and weights differ; return "" if they agree."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith(_OPTIONAL)}
    given = {k: tuple(v.shape) for k, v in state_dict.items() if not k.endswith(_OPTIONAL)}
    for key in own:
        if key not in given:
            return f"they have no {key}"
        if own[key] != given[key]:
            return f"{key} has shape {given[key]} where {own[key]} is wanted"
    return next((f"they have {key}, which it has not" for key in given if key not in own), "")


def _classes_and_channels(
    library: str, default: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Return the numbers of classes and of input channels that weights have; ``default`` is the architecture.

    timm tells the names of the classifier and of the first convolution. In torchvision's models they are the
    tensors that differ from the default's in these numbers alone.
    """
    if library == "timm":
        cfg: Mapping[str, Any] = getattr(default, "pretrained_cfg", {})
        classifier, first_conv = (_first(cfg.get(key)) for key in ("classifier", "first_conv"))
        head, stem = (state_dict.get(f"{name}.weight") for name in (classifier, first_conv))
        own_stem = default.state_dict().get(f"{first_conv}.weight")
        in_chans = 3
        if own_stem is not None and stem is not None and stem.ndim > 1 and stem.shape[1] != own_stem.shape[1]:
            in_chans = int(stem.shape[1])
        if head is None and classifier and f"{classifier}.weight" in default.state_dict():
            return 0, in_chans
        return int(getattr(default, "num_classes", 1000) if head is None else head.shape[0]), in_chans
    num_classes, in_chans = 1000, 3
    for key, own in default.state_dict().items():
        given = state_dict.get(key)
        if given is None or given.shape == own.shape or given.ndim != own.ndim:
            continue
        if own.shape[0] == 1000 and given.shape[1:] == own.shape[1:]:
            num_classes = int(given.shape[0])
        elif own.ndim == 4 and own.shape[1] == 3 and given.shape[0] == own.shape[0]:
            in_chans = int(given.shape[1])
    return num_classes, in_chans


def _first(value: Any) -> str:
    """Return a name, or the first of several; "" for none."""
    return str((value[0] if isinstance(value, (tuple, list)) and value else value) or "")


def _build(library: str, name: str, num_classes: int, in_chans: int) -> nn.Module:
    if library == "timm":
        import timm

        if name in _TENSORFLOW_MOBILENETS:
            return _tensorflow_mobilenet(name, num_classes=num_classes, in_chans=in_chans)
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
        return model
    import torchvision

    # These two would spend half a minute on random weights, which are replaced at once.
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, num_classes=num_classes, **quick)
    if in_chans != 3:
        _widen_stem(model, in_chans)
    return model


def _tensorflow_mobilenet(name: str, **sizes: int) -> nn.Module:
    from timm.models import efficientnet

    version, width = _TENSORFLOW_MOBILENETS[name]
    make = getattr(efficientnet, f"_gen_mobilenet_v{version}")
    model: nn.Module = make(f"mobilenetv{version}_100", width, pad_type="same", bn_eps=1e-3, **sizes)
    return model


def _widen_stem(model: nn.Module, in_chans: int) -> None:
    """Give the first convolution another number of input channels; torchvision has no argument for it."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels == 3:
                like = (
                    "out_channels",
                    "kernel_size",
                    "stride",
                    "padding",
                    "dilation",
                    "groups",
                    "padding_mode",
                )
                kwargs = {key: getattr(child, key) for key in like}
                setattr(module, name, nn.Conv2d(in_chans, bias=child.bias is not None, **kwargs))
                return
