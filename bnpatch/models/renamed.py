"""Recognize the architectures of timm and torchvision in weights whose tensors have other names.

Projects write ResNets, EfficientNets and others anew, or wrap them, and name the tensors as they like. Their
state dicts still list the tensors in the order in which the model uses them. An architecture fits if every
tensor has the same role (weight, bias, running mean or variance) and the same shape at the same place.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.models.architecture import (
    LIBRARIES,
    OWN_CODE,
    Architecture,
    by_tensor_names,
    is_known,
    is_optional,
    parse_name,
)

StateDict = Mapping[str, Tensor]

# Architectures that people write anew, and how many tensors each has, so that few of them have to be built.
_TENSORFLOW = {  # efficientnet_pytorch and Hugging Face's library pad as these do
    "timm:tf_efficientnet_": (
        "b0 311 b1 439 b2 439 b3 496 b4 610 b5 738 b6 852 b7 1037 lite0 247 lite1 322 lite2 322 "
        "lite3 367 lite4 457"
    ),
    "timm:tf_mobilenetv1_": "025 137 050 137 075 137 100 137",
    "timm:tf_mobilenetv2_": "035 262 050 262 075 262 100 262 140 262",
}
_OTHERS = {
    "torchvision:": (
        "resnet18 102 resnet34 182 resnet50 267 resnet101 522 resnet152 777 wide_resnet50_2 267 "
        "resnext50_32x4d 267 mobilenet_v2 262 vgg11_bn 54 vgg13_bn 66 vgg16_bn 84 vgg19_bn 102 "
        "densenet121 606 googlenet 305 shufflenet_v2_x1_0 282 mnasnet1_0 262"
    ),
    "timm:": (
        "efficientnet_b0 311 mobilenetv3_large_100 266 mobilenetv2_100 262 regnety_040 445 regnetx_040 372"
    ),
}
_HEAD = 2  # tensors of a linear classifier: weight and bias

# Names of the classifiers of timm and torchvision.
_CLASSIFIERS = ("fc", "classifier", "head.fc", "head", "head.classifier", "classifier.1", "last_linear")

# Names of the branch of a residual block that is listed before the others in some projects, after in others.
_SHORTCUTS = re.compile(r"shortcut|downsample|identity|skip|projection")

# By prefix of the tensors of Hugging Face's library: patterns of the names of modules, and their names in
# timm or torchvision. The library sorts tensors by name, so that their order does not tell how they are used.
_STAGE = r"encoder\.stages\.(?P<s>\d+)\.layers\.(?P<l>\d+)"
_UNIT = r"(?P<kind>convolution|normalization)"
_HUGGING_FACE: dict[str, Sequence[tuple[str, str]]] = {
    "resnet.": (
        (rf"resnet\.embedder\.embedder\.{_UNIT}", "{conv_or_bn}1"),
        (rf"resnet\.{_STAGE}\.shortcut\.{_UNIT}", "layer{stage}.{l}.downsample.{zero_or_one}"),
        (rf"resnet\.{_STAGE}\.layer\.(?P<k>\d+)\.{_UNIT}", "layer{stage}.{l}.{conv_or_bn}{number}"),
        (r"classifier\.1", "fc"),
    ),
    "regnet.": (
        (rf"regnet\.embedder\.embedder\.{_UNIT}", "stem.{conv_or_bn}"),
        (rf"regnet\.{_STAGE}\.shortcut\.{_UNIT}", "s{stage}.b{layer}.downsample.{conv_or_bn}"),
        (rf"regnet\.{_STAGE}\.layer\.2\.attention\.(?P<k>\d+)", "s{stage}.b{layer}.se.fc{half}"),
        (rf"regnet\.{_STAGE}\.layer\.(?P<k>\d+)\.{_UNIT}", "s{stage}.b{layer}.conv{up_to_3}.{conv_or_bn}"),
        (r"classifier\.1", "head.fc"),
    ),
}

# Families of Hugging Face's library whose tensors are sorted into the order of use instead. Where two names
# differ first, the word that stands earlier in _USED_FIRST belongs to the tensor that is used earlier.
_IN_ORDER = ("efficientnet.", "mobilenet_v1.", "mobilenet_v2.")
_USED_FIRST = (
    "embeddings conv_stem first_conv layer encoder blocks expansion expand_1x1 depthwise_conv conv_3x3 "
    "squeeze_excite reduce expand projection reduce_1x1 conv_1x1 top_conv top_bn convolution expand_conv "
    "project_conv batchnorm normalization expand_bn depthwise_norm project_bn "
    "weight bias running_mean running_var"
).split()
# Values of Hugging Face's configuration, by family, with which a model computes what timm's or torchvision's
# does. A configuration with other values is refused.
_MOBILENET = {"hidden_act": "relu6", "tf_padding": True, "layer_norm_eps": 1e-3, "output_stride": 32}
_COMPUTES: Mapping[str, Mapping[str, Any]] = {
    "resnet": {"hidden_act": "relu", "downsample_in_bottleneck": False, "downsample_in_first_stage": False},
    "regnet": {"hidden_act": "relu", "downsample_in_first_stage": True},
    "efficientnet": {"hidden_act": "swish", "batch_norm_eps": 1e-3},
    "mobilenet_v1": _MOBILENET,
    "mobilenet_v2": _MOBILENET,
}


def check_hugging_face(config: Mapping[str, Any]) -> None:
    """Check that a configuration of Hugging Face's library is of an architecture that is known here.

    Raises:
        BnpatchError: it says that the model computes something else, which the tensors don't show.
    """
    family = str(config.get("model_type"))
    for key, value in _COMPUTES.get(family, {}).items():
        if config.get(key, value) != value:
            raise BnpatchError(
                f"config.json says {key} = {config[key]!r}: no {family} of timm or torchvision is like this",
                OWN_CODE,
            )


def of_hugging_face(state_dict: StateDict) -> dict[str, Tensor] | None:
    """Return weights of a ResNet or RegNet of Hugging Face's library under timm's names, or None."""
    for prefix, rules in _HUGGING_FACE.items():
        if any(key.startswith(prefix) for key in state_dict):
            renamed = {_by_rule(key, rules): tensor for key, tensor in state_dict.items()}
            return None if None in renamed else {key: t for key, t in renamed.items() if key is not None}
    return None


def _by_rule(key: str, rules: Sequence[tuple[str, str]]) -> str | None:
    """Return the name that timm or torchvision has for a tensor, by the first rule that fits; else None.

    >>> _by_rule("resnet.encoder.stages.0.layers.1.layer.0.convolution.weight", _HUGGING_FACE["resnet."])
    'layer1.1.conv1.weight'
    """
    module, _, role = key.rpartition(".")
    for pattern, name in rules:
        if match := re.fullmatch(pattern, module):
            found = match.groupdict()
            stage, layer, k = (int(found.get(group) or 0) for group in ("s", "l", "k"))
            is_norm = found.get("kind") == "normalization"
            return f"{name}.{role}".format(
                l=layer, stage=stage + 1, layer=layer + 1, number=k + 1,
                up_to_3=min(k + 1, 3), half=k // 2 + 1,
                conv_or_bn="bn" if is_norm else "conv", zero_or_one=int(is_norm),
            )  # fmt: skip
    return None


def with_own_classifier(state_dict: StateDict) -> dict[str, Tensor] | None:
    """Return the weights of a body and a linear classifier of a project's own under an architecture's names.

    Projects put a model without its classifier under one name, and a classifier of their own under another,
    such as ``backbone.*`` and ``head.weight``. The result is None if no architecture has these names.
    """
    heads = [key.removesuffix(".weight") for key, tensor in state_dict.items() if _is_linear(key, tensor)]
    if not heads or f"{heads[-1]}.bias" not in state_dict:
        return None
    head = heads[-1]
    roles = {role: state_dict[f"{head}.{role}"] for role in ("weight", "bias")}
    body = {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[0] != head}
    while body:
        for classifier in _CLASSIFIERS:
            named = {**body, **{f"{classifier}.{role}": tensor for role, tensor in roles.items()}}
            if f"{classifier}.weight" not in body and by_tensor_names(named):
                return named
        first = {key.partition(".")[0] for key in body}
        if len(first) > 1 or not all("." in key for key in body):
            return None
        body = {key.partition(".")[2]: tensor for key, tensor in body.items()}
    return None


def _is_linear(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2


def in_order_of_use(
    state_dict: StateDict, is_tensorflow: bool = False, wanted: str | None = None
) -> tuple[Architecture, dict[str, Tensor]] | None:
    """Find an architecture with the same tensors in the same order, and give the weights its names.

    Args:
        state_dict: the weights in the order of use.
        is_tensorflow: architectures that pad as TensorFlow does are tried first.
        wanted: name of the only architecture to try.

    Returns:
        The architecture, whose :attr:`~bnpatch.models.architecture.Architecture.also` names others that fit;
        and the weights by its names. None if no architecture fits.
    """
    given = _ordered(state_dict)
    fits: list[tuple[Architecture, dict[str, Tensor]]] = []
    has_head = [tensor.ndim for tensor in list(given.values())[-_HEAD:]] == [2, 1]
    is_tensorflow = is_tensorflow or "_conv_stem" in next(iter(given), "")
    for library, name, count in _named(wanted) if wanted else candidates(is_tensorflow):
        if not has_head and library == "torchvision":  # it builds no model without a classifier
            library = "timm"
        if count not in (None, len(given) + (0 if has_head else _HEAD)) or not is_known(library, name):
            continue
        arch = Architecture(library, name)
        if (found := _matched(arch, _ordered(arch.sketch().state_dict()), given)) is not None:
            fits.append(found)
    if not fits:
        return None
    arch, weights = fits[0]
    return replace(arch, also=tuple(str(other) for other, _ in fits[1:])), weights


def _named(arch: str) -> Iterator[tuple[str, str, int | None]]:
    library, name = parse_name(arch)
    return ((lib, name, None) for lib in ([library] if library else LIBRARIES))


def in_order_of_hugging_face(state_dict: StateDict) -> tuple[Architecture, dict[str, Tensor]] | None:
    """Do as :func:`in_order_of_use` for Hugging Face's EfficientNet or MobileNet (V1, V2), in any order."""
    if not any(key.startswith(_IN_ORDER) for key in state_dict):
        return None
    keys = sorted((key for key in state_dict if not is_optional(key)), key=_order_of_use)
    names = {key: f"{place}.{key.rpartition('.')[-1]}" for place, key in enumerate(keys)}
    match = in_order_of_use({names[key]: state_dict[key] for key in keys}, is_tensorflow=True)
    return None if match is None else (replace(match[0], also=()), match[1])  # others pad differently


def _order_of_use(key: str) -> list[int]:
    """Return a key to sort the names of tensors by: numbers by value, words by their place in _USED_FIRST."""
    first, *words = key.split(".")
    known = (_USED_FIRST.index(word) if word in _USED_FIRST else -1 for word in words)
    return [
        first == "classifier",
        *(int(w) if w.isdecimal() else k for w, k in zip(words, known, strict=True)),
    ]


def candidates(is_tensorflow: bool = False) -> Iterator[tuple[str, str, int]]:
    """Yield the architectures to try: library, name, number of tensors."""
    for group in (_TENSORFLOW, _OTHERS) if is_tensorflow else (_OTHERS, _TENSORFLOW):
        for prefix, members in group.items():
            words = members.split()
            for name, count in zip(words[::2], words[1::2], strict=True):
                library, _, start = prefix.partition(":")
                yield library, start + name, int(count)


def _ordered(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors in order, with the shortcut of each residual block after its other branch."""
    keys = [key for key in state_dict if not is_optional(key)]
    blocks = {}
    for key in keys:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if _SHORTCUTS.search(part)), None)
        if at is not None:
            blocks[".".join(parts[:at]) + "."] = at
    first: dict[str, int] = {}

    def place(index: int) -> tuple[int, bool, int]:
        key = keys[index]
        block = next((block for block in blocks if key.startswith(block)), key)
        is_shortcut = block != key and bool(_SHORTCUTS.search(key.removeprefix(block).split(".")[0]))
        return first.setdefault(block, index), is_shortcut, index

    return {keys[index]: state_dict[keys[index]] for _, _, index in sorted(map(place, range(len(keys))))}


def _matched(
    arch: Architecture, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[Architecture, dict[str, Tensor]] | None:
    """Return the architecture with its numbers of classes and channels, and the renamed weights, or None."""
    if len(given) not in (len(own), len(own) - _HEAD):
        return None
    pairs = list(zip(own, given, strict=False))
    for place, (mine, theirs) in enumerate(pairs):
        same = own[mine].shape == given[theirs].shape
        is_stem = place == 0 and own[mine][:, 0].shape == given[theirs][:, 0].shape
        is_head = place >= len(own) - _HEAD and own[mine].shape[1:] == given[theirs].shape[1:]
        if mine.rsplit(".")[-1] != theirs.rsplit(".")[-1] or not (same or is_stem or is_head):
            return None
    num_classes = given[pairs[-1][1]].shape[0] if len(given) == len(own) else 0
    found = replace(arch, num_classes=num_classes, in_chans=given[pairs[0][1]].shape[1])
    return found, {mine: given[theirs] for mine, theirs in pairs}
