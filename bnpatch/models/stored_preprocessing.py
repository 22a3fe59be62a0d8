"""Find the preprocessing of a model in its checkpoint and in the files beside it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.foreign import read_json
from bnpatch.models.labels import as_mapping
from bnpatch.models.normalizers import inside

Values = dict[str, Any]  # arguments of Preprocessing, as far as a file gives them

# Where a checkpoint keeps timm's configuration of data, the likeliest first.
_CONFIGS = ("pretrained_cfg", "default_cfg", "data_config", "cfg")
HUB_CONFIG = "config.json"
_HUGGING_FACE = "preprocessor_config.json"

_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_LARGEST_SIDE = 1 << 16
_LARGEST = 1e9


def of_module(module: nn.Module, label: str) -> Preprocessing:
    """Return the preprocessing in a module's ``pretrained_cfg``; else ImageNet's.

    A module that normalizes images itself gets values in [0, 1], or bytes.

    Args:
        module: a module of the user's own.
        label: what to call the module.
    """
    cfg = getattr(module, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("input_size"):
        return Preprocessing.of_timm(module, f"the pretrained_cfg of {label}")
    source = "ImageNet's values, for want of better (--mean, --std, --img-size)"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if (own := inside(module)) is not None:
        mean, std = (0.0, 0.0, 0.0), (1 / own.scale,) * 3
        source = f"values up to {own.scale:g}, because the module normalizes images itself ({own.name})"
    return Preprocessing((3, 224, 224), mean, std, "bilinear", source=source)


def in_checkpoint(about: Mapping[str, Any], args: Mapping[str, Any], path: Path) -> tuple[Values, str]:
    """Return the values in a checkpoint, and their place. Training arguments override configurations.

    Ultralytics' ``train_args`` count only where there is nothing else.

    Raises:
        BnpatchError: a value is of another type, or out of range.
    """
    values: Values = {}
    sources: list[str] = []
    if found := _of_arguments(args, f"{path}: args"):
        values, sources = found, ["training arguments"]
    for holder, prefix in ((about, ""), (args, "args.")):
        for key in _CONFIGS:
            if found := of_timm(as_mapping(holder.get(key)), f"{path}: {prefix}{key}"):
                values = {**found, **values}
                sources.append(f"{prefix}{key}")
    if (size := as_mapping(about.get("train_args")).get("imgsz")) is not None and not values:
        values = _of_ultralytics(size, f"{path}: train_args.imgsz")
        sources = ["train_args, as of ultralytics"]
    return values, f"the checkpoint's {' and '.join(sources)}"


def beside(path: Path, architecture: str) -> tuple[Values, str]:
    """Return the values in the files beside a checkpoint: timm's hub configuration, or Hugging Face's.

    Args:
        path: the checkpoint.
        architecture: name of its architecture; a configuration of another architecture is ignored.

    Raises:
        BnpatchError: a file is damaged.
    """
    hub = hub_config(path)
    cfg = as_mapping(hub.get("pretrained_cfg"))
    named = str(hub.get("architecture") or architecture).split(".")[0]
    is_timm = named == architecture and (cfg or "architecture" in hub)
    if is_timm and (values := of_timm({**hub, **cfg}, str(path.with_name(HUB_CONFIG)))):
        return values, f"{HUB_CONFIG} beside the checkpoint"
    file = path.with_name(_HUGGING_FACE)
    values = of_hugging_face(as_mapping(read_json(file)), str(file))
    return values, f"{_HUGGING_FACE} beside the checkpoint"


def hub_config(path: Path) -> Mapping[str, Any]:
    """Return the ``config.json`` beside a checkpoint; it is empty if there is none."""
    return as_mapping(read_json(path.with_name(HUB_CONFIG)))


def applied(values: Values, default: Preprocessing, channels: int, source: str) -> Preprocessing:
    """Return ``default`` with the values that were found."""
    size = values.get("input_size", default.input_size)
    return replace(default, **{**values, "input_size": (channels, *size[1:])}, source=source)


def of_timm(cfg: Mapping[str, Any], where: str) -> Values:
    """Return the values in a ``pretrained_cfg`` of timm, or in timm's training arguments.

    Raises:
        BnpatchError: a value is of another type, or out of range; ``where`` names the place.
    """
    values: Values = {}
    size = cfg.get("input_size")
    if size is not None:
        values["input_size"] = _size(size, f"{where}.input_size")
    elif cfg.get("img_size") is not None:
        values["input_size"] = _size(cfg["img_size"], f"{where}.img_size")
    for key in ("mean", "std"):
        if cfg.get(key) is not None:
            values[key] = _numbers(cfg[key], f"{where}.{key}", positive=key == "std")
    if cfg.get("crop_pct") is not None:
        values["crop_pct"] = _numbers(cfg["crop_pct"], f"{where}.crop_pct", positive=True)[0]
    for key, known in (("interpolation", _PIL_FILTERS), ("crop_mode", ("center", "squash", "border"))):
        if cfg.get(key) in known:
            values[key] = cfg[key]
        elif cfg.get(key) not in (None, "", "random"):  # random is for training
            raise _unusable(f"{where}.{key}", cfg[key], f"one of {', '.join(known)}")
    return values


def of_hugging_face(config: Mapping[str, Any], where: str) -> Values:
    """Return the values in a ``preprocessor_config.json``, for convolutional networks and ViT.

    Raises:
        BnpatchError: a value is of another type, or out of range.
    """
    for key in ("pretrained_cfg", "data_config"):  # of timm's models in Hugging Face's library
        if values := of_timm(as_mapping(config.get(key)), f"{where}: {key}"):
            return values
    values = {}
    size, crop = config.get("size"), config.get("crop_size")
    squashed = isinstance(size, Mapping) and "shortest_edge" not in size
    resized = _size(size, f"{where}: size") if size is not None else None
    cut = _size(crop, f"{where}: crop_size") if crop is not None and config.get("do_center_crop") else None
    if cut is not None and resized is not None:
        share = cut[1] / (resized[1] + 0.5)  # as torchvision's: timm resizes to floor(crop / crop_pct)
        values = {"input_size": cut, "crop_pct": share, "crop_mode": "squash" if squashed else "center"}
    elif cut is not None:
        values = {"input_size": cut, "crop_pct": 1.0, "crop_mode": "center"}
    elif resized is not None:
        share = _numbers(config.get("crop_pct") or 1.0, f"{where}: crop_pct", positive=True)[0]
        squashed = squashed or "crop_pct" not in config or resized[1] >= 384  # ConvNeXt's rule
        mode = {"crop_pct": 1.0, "crop_mode": "squash"} if squashed else {"crop_pct": share}
        values = {"input_size": resized, "crop_mode": "center", **mode}
    values |= _normalization_of_hugging_face(config, where, bool(values))
    resample = config.get("resample")
    if isinstance(resample, int) and 0 <= resample < len(_PIL_FILTERS):
        values["interpolation"] = _PIL_FILTERS[resample]
    return values


def _normalization_of_hugging_face(config: Mapping[str, Any], where: str, has_size: bool) -> Values:
    """Return mean and standard deviation for values in [0, 1].

    The processor multiplies bytes by ``rescale_factor`` first, and that of EfficientNet may subtract 1
    (``rescale_offset``) and divide by the standard deviation twice (``include_top``).
    """
    if not config.get("do_normalize", True):
        return {"mean": (0.0,), "std": (1.0,)} if has_size else {}
    values: Values = {}
    factor = config.get("rescale_factor") if config.get("do_rescale", True) else 1.0
    scale = 1.0 if factor is None else 255 * _numbers(factor, f"{where}: rescale_factor", positive=True)[0]
    offset = 1.0 if config.get("rescale_offset") else 0.0
    if config.get("image_mean") is not None:
        mean = _numbers(config["image_mean"], f"{where}: image_mean", positive=False)
        values["mean"] = tuple((value + offset) / scale for value in mean)
    if config.get("image_std") is not None:
        power = 2 if config.get("include_top") else 1
        std = _numbers(config["image_std"], f"{where}: image_std", positive=True)
        values["std"] = tuple(value**power / scale for value in std)
    return values


def of_ultralytics(size: Any, channels: int) -> Preprocessing:
    """Return the preprocessing of a classifier that ultralytics exported.

    It resizes the short side, and values are in [0, 1].

    Args:
        size: value of ``imgsz`` in the metadata: a side, or height and width.
        channels: number of input channels.

    Raises:
        BnpatchError: the size is not valid.
    """
    values = _of_ultralytics(size, "imgsz in the file's metadata")
    values["input_size"] = (channels, *values["input_size"][1:])
    return Preprocessing(**values, source="the file's metadata, as ultralytics writes it")


def _of_ultralytics(size: Any, where: str) -> Values:
    """Return the values that ultralytics uses for all its classifiers, with the size of this one."""
    normalization = {"mean": (0.0,), "std": (1.0,), "interpolation": "bilinear", "crop_pct": 1.0}
    return {"input_size": _size(size, where), **normalization}


def _of_arguments(args: Mapping[str, Any], where: str) -> Values:
    """Return the values in the arguments of torchvision's reference training script, or of timm's."""
    if args.get("val_crop_size") is None:
        return of_timm(args, where)
    cut = _size(args["val_crop_size"], f"{where}.val_crop_size")
    resized = _size(args.get("val_resize_size") or cut[1], f"{where}.val_resize_size")
    values = of_timm({"interpolation": args.get("interpolation") or "bilinear"}, where)
    normalization = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # fixed in the script
    return {**values, **normalization, "input_size": cut, "crop_pct": cut[1] / (resized[1] + 0.5)}


def _size(value: Any, where: str) -> tuple[int, int, int]:
    """Return (channels, height, width) of a side, of two or three sizes, or of a mapping with their names."""
    if isinstance(value, Mapping):
        side = value.get("shortest_edge")
        value = side if side is not None else [value.get("height"), value.get("width")]
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(sides) <= 3 or not all(_is_number(v) and v == int(v) for v in sides):
        raise _unusable(where, value, "a size in pixels")
    *channels, height, width = map(int, sides if len(sides) > 1 else sides * 2)
    if not all(1 <= side <= _LARGEST_SIDE for side in (*channels, height, width)):
        raise _unusable(where, value, f"a size of 1 to {_LARGEST_SIDE} pixels")
    return (channels[0] if channels else 3, height, width)


def _numbers(value: Any, where: str, positive: bool) -> tuple[float, ...]:
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(_is_number(v) and (v > 0 or not positive) for v in numbers):
        raise _unusable(where, value, "a positive number" if positive else "a number")
    return tuple(map(float, numbers))


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and abs(value) < _LARGEST and math.isfinite(value)


def _unusable(where: str, value: Any, wanted: str) -> BnpatchError:
    text = repr(value) if isinstance(value, (str, float, bool)) else f"a {type(value).__name__}"
    return BnpatchError(f"{where} is {text[:80]}, not {wanted}", "correct it or leave it out, and save again")
