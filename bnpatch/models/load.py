"""From what a user types to a model: names of timm, torchvision and the Hugging Face hub, and files."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import pick_device
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models import architecture
from bnpatch.models.architecture import Architecture
from bnpatch.models.checkpoint import SUFFIXES, Checkpoint, read_checkpoint
from bnpatch.models.onnx_file import load_onnx
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.surgery import inventory

_HUB_CONFIG = "config.json"


def load(
    model: str | os.PathLike[str] | nn.Module,
    *,
    arch: str | None = None,
    use_ema: bool = False,
    unsafe_load: bool = False,
    output: str | None = None,
    device: str | None = None,
    amp: bool = False,
    include_1x1: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
) -> TorchModel | OnnxModel:
    """Load a model, ready to predict.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:ORG/NAME``, a checkpoint file, a file of ONNX
            or of torch.export (``.pt2``), a folder as the hub keeps models in (``config.json`` and
            weights), or a torch module.
        arch: architecture of a checkpoint file, ``library:name`` or a name; without it, the file
            says it or its tensors tell.
        use_ema: take a checkpoint's averaged weights.
        unsafe_load: allow pickled modules, which can run any code that their author wants.
        output: which output of an ONNX file to read; the first by default.
        device: where to compute; None for the accelerator if there is one (a module stays where it is).
        amp: compute in half precision where autocast thinks it safe.
        include_1x1: weigh examples also at norm layers where one has a single value per channel (on 1 x 1
            maps, after flattening). It has no variance there, so that its weight mostly shrinks the signal.
        preprocessing: what to use instead of the model's own: img_size, mean, std, interpolation,
            crop_pct, crop_mode; None values are ignored.

    Raises:
        BnpatchError: there is no such model, or it can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix in (".onnx", ".pt2"):
        return load_onnx(
            model,
            output=output,
            device=_onnx_device(device),
            preprocessing=preprocessing,
            include_1x1=include_1x1,
        )
    if isinstance(model, nn.Module):
        loaded = _of_module(model)
        device = device or str(_device_of(model))
    else:
        loaded = _load(str(model), arch, use_ema, unsafe_load)
        loaded.module.eval()
    _check_finite(loaded)
    channels = loaded.arch.in_chans if loaded.arch else _input_channels(loaded.module)
    return replace(
        loaded,
        device=pick_device(device or "auto"),
        amp=amp,
        include_1x1=include_1x1 or loaded.include_1x1,
        preprocessing=loaded.preprocessing.override(channels=channels, **(preprocessing or {})),
    )


def apply(model: nn.Module, recipe: str | os.PathLike[str] | Recipe) -> nn.Module:
    """Patch a module with a recipe, in place; returns the root.

    Raises:
        BnpatchError: the recipe can't be read, or was made for another model.
    """
    target = _of_module(model)
    target.apply(recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    return target.module


def _load(model: str, arch: str | None, use_ema: bool, unsafe: bool) -> TorchModel:
    source, colon, name = model.partition(":")
    path = Path(model)
    if colon and source in ("timm", "torchvision", "hf-hub", "hf_hub") and not path.exists():
        return _load_torchvision(name) if source == "torchvision" else _load_timm(source, name)
    if (path / _HUB_CONFIG).is_file():
        return _load_timm("local-dir", model)
    if path.suffix not in SUFFIXES and not path.exists():
        raise BnpatchError(f"there is no file {model}", f"give a file or {_suggestion(model)}")
    return _load_file(read_checkpoint(path, use_ema=use_ema, unsafe=unsafe), arch)


def _suggestion(name: str) -> str:
    known = [lib for lib in architecture.LIBRARIES if name.split(".")[0] in architecture.known_names(lib)]
    return " or ".join(f"{lib}:{name}" for lib in known) or "a name as timm:NAME or torchvision:NAME"


def _load_timm(source: str, name: str) -> TorchModel:
    import timm

    full = name if source == "timm" else f"{source.replace('_', '-')}:{name}"
    if source == "timm":
        architecture.parse_name(f"timm:{name}")
    try:
        module: Any = timm.create_model(full, pretrained=True)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise BnpatchError(
            f"cannot load {full}: {first_line(error)}",
            "check the name and the connection, or download the weights and give the file",
        ) from error
    cfg = module.pretrained_cfg
    label = f"{cfg.get('architecture', name)}.{cfg['tag']}" if cfg.get("tag") else name
    names = cfg.get("label_names")
    return TorchModel(
        module,
        name=Path(name).name,
        preprocessing=Preprocessing.of_timm(module, f"timm's pretrained_cfg of {label}"),
        class_names=tuple(names) if names else None,
        arch=_architecture_of(module, f"timm:{cfg.get('architecture', '')}"),
    )


def _load_torchvision(name: str) -> TorchModel:
    import torchvision

    name, _, tag = name.partition(".")
    _, name = architecture.parse_name(f"torchvision:{name}")
    published = torchvision.models.get_model_weights(name)
    if tag and tag not in published.__members__:
        raise BnpatchError(
            f"torchvision has no weights {tag!r} of {name}", f"choose {' or '.join(published.__members__)}"
        )
    weights = published[tag or "DEFAULT"]
    try:
        module = torchvision.models.get_model(name, weights=weights)
    except Exception as error:
        raise BnpatchError(
            f"cannot download {weights}: {first_line(error)}",
            "check the connection, or download the weights and give the file",
        ) from error
    return TorchModel(
        module,
        name=name,
        preprocessing=Preprocessing.of_torchvision(weights),
        class_order="plain",
        arch=_architecture_of(module, f"torchvision:{name}"),
    )


def _architecture_of(module: nn.Module, name: str) -> Architecture | None:
    """The architecture with which the module can be built again, if it is exactly that."""
    try:
        return architecture.fit(name, module.state_dict())
    except BnpatchError:
        return None


def _load_file(checkpoint: Checkpoint, arch: str | None) -> TorchModel:
    if checkpoint.module is not None:
        if arch:
            raise BnpatchError(f"{checkpoint.path} holds a whole model", "leave out --arch")
        model = _of_module(checkpoint.module, checkpoint.path.stem)
        model.notes.append("a pickled model, run by its own code")
    else:
        model = _build(checkpoint, arch)
    model.class_names = checkpoint.class_names or model.class_names
    batch_size = checkpoint.args.get("batch_size")  # timm's and torchvision's scripts mean that of one device
    model.train_batch_size = batch_size if isinstance(batch_size, int) and batch_size > 0 else None
    if checkpoint.bnpatch:
        stored = checkpoint.bnpatch
        try:
            values = Preprocessing.from_json(stored["preprocessing"], "the checkpoint")
            recipe = Recipe.from_json(stored["recipe"], f"the recipe in {checkpoint.path}")
        except (KeyError, TypeError) as error:
            raise BnpatchError(
                f"{checkpoint.path} is a damaged bnpatch checkpoint", "make it again"
            ) from error
        model.preprocessing = values
        if recipe.norm_layers:
            model.apply(recipe)
            if any(recipe.alphas.values()):
                model.notes.append("patched by bnpatch")
    return model


def _build(checkpoint: Checkpoint, arch: str | None) -> TorchModel:
    state, file_name = checkpoint.state_dict, checkpoint.path.name
    found = (
        architecture.fit(arch, state)
        if arch
        else architecture.identify(state, checkpoint.arch, file_name, checkpoint.library)
    )
    published = _tagged(arch) or _published_weights(found.name, file_name)
    if published is not None and arch is None:
        library = "timm" if isinstance(published, Mapping) else "torchvision"
        found = replace(found, library=library)
    module: Any = found.build()
    # strict=False only for the counters that old checkpoints lack: fit() compared all other names
    module.load_state_dict(state, strict=False)
    model = TorchModel(
        module,
        name=checkpoint.path.stem,
        preprocessing=_preprocessing(found, module, published, checkpoint),
        class_order="plain" if found.library == "torchvision" else "natural",
        arch=replace(found, also=()),
    )
    if arch is None and checkpoint.arch not in (found.name, str(found)):
        others = f"; they would fit {', '.join(found.also)} too, --arch chooses" if found.also else ""
        model.notes.append(f"architecture {found}, identified by its tensors{others}")
    if published is not None and hasattr(module, "transform_input"):
        module.transform_input = True  # torchvision's published inception weights expect it
    return model


def _preprocessing(
    found: Architecture, module: nn.Module, published: Any, checkpoint: Checkpoint
) -> Preprocessing:
    if isinstance(published, Mapping):
        return Preprocessing.of_timm(module, f"timm's published {published['name']}", stored=published)
    if published is not None:
        return Preprocessing.of_torchvision(published, found.in_chans)
    if found.library == "timm":
        keys = ("in_chans", "input_size", "img_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        stored = {key: checkpoint.args.get(key) for key in keys}
        said = any(value is not None for key, value in stored.items() if key != "in_chans")
        source = "the checkpoint's training arguments" if said else f"timm's default for {found.name}"
        return Preprocessing.of_timm(module, source, stored=stored)
    if checkpoint.args.get("val_crop_size"):
        return Preprocessing.of_torchvision_args(checkpoint.args, found.in_chans)
    weights = torchvision_weights(found.name)
    default = Preprocessing.of_torchvision(weights[0], found.in_chans)
    return replace(default, source=f"torchvision's default for {found.name}")


@cache
def torchvision_weights(name: str) -> list[Any]:
    """The published weights of a torchvision architecture, the first published first."""
    import torchvision

    return list(torchvision.models.get_model_weights(name))


def _published_weights(name: str, file_name: str) -> Any:
    """Whose published weights have this file name? A torchvision enum member, a timm cfg, or None."""
    import timm

    if name in architecture.known_names("torchvision"):
        for weights in torchvision_weights(name):
            if weights.url.rsplit("/", 1)[-1] == file_name:
                return weights
    for full_name in timm.list_pretrained(f"{name}.*"):
        cfg = timm.get_pretrained_cfg(full_name)
        if cfg is not None and str(cfg.url or "").rsplit("/", 1)[-1] == file_name:
            return _timm_values(full_name)
    return None


def _tagged(arch: str | None) -> dict[str, Any] | None:
    """What timm knows of weights with a tag, as in ``timm:resnet50.tv_in1k``."""
    import timm

    name = (arch or "").removeprefix("timm:")
    return _timm_values(name) if name in timm.list_pretrained() else None


def _timm_values(full_name: str) -> dict[str, Any]:
    import timm

    cfg = timm.get_pretrained_cfg(full_name)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {"name": full_name, **{key: getattr(cfg, key) for key in keys}}


def _of_module(module: nn.Module, name: str = "") -> TorchModel:
    """A module of the user's own, with what it says of itself."""
    cfg = getattr(module, "pretrained_cfg", None)
    label = name or type(module).__name__
    if isinstance(cfg, Mapping) and cfg.get("input_size"):
        preprocessing = Preprocessing.of_timm(module, f"the pretrained_cfg of {label}")
    else:
        source = "ImageNet's values, for want of better (--mean, --std, --img-size)"
        preprocessing = Preprocessing(
            (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", source=source
        )
    return TorchModel(module, name=label, preprocessing=preprocessing, device=_device_of(module))


def _onnx_device(name: str | None) -> torch.device:
    """Onnxruntime's own devices; the GPU is taken where its provider is there."""
    import onnxruntime

    if name is not None:
        return torch.device(name) if name.split(":")[0] in ("cpu", "cuda") else pick_device(name)
    has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _input_channels(module: nn.Module) -> int | None:
    """Channels of the first convolution, where the model begins with one."""
    first = next((m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    return first.in_channels if first is not None else None


def _check_finite(model: TorchModel) -> None:
    for norm_layer in inventory(model.module).norm_layers:
        for name, tensor in zip(
            ("weight", "bias", "running_mean", "running_var"), norm_layer.parameters(), strict=True
        ):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise BnpatchError(
                    f"{model.name}: {name} of norm layer {norm_layer.name!r} is not finite",
                    "take a checkpoint from before training diverged",
                )
