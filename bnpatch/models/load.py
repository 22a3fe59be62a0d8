"""Load a model by name (timm, torchvision, the Hugging Face hub), from a file, or from a torch module."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import pick_device
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models import architecture, renamed
from bnpatch.models.architecture import Architecture, is_optional
from bnpatch.models.checkpoint import SUFFIXES, Checkpoint, read_checkpoint
from bnpatch.models.foreign import reading
from bnpatch.models.labels import choose, labels_of, read_names
from bnpatch.models.onnx_file import load_onnx, onnx_device
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.own_module import device_of, wrap
from bnpatch.models.published import default_preprocessing, published_weights, tagged_weights
from bnpatch.models.stored_preprocessing import (
    HUB_CONFIG,
    applied,
    beside,
    hub_config,
    in_checkpoint,
)
from bnpatch.models.torch_model import TorchModel
from bnpatch.models.weights import StateDict, part_of, without_extras
from bnpatch.nn.surgery import inventory

_CHECK_ACCURACY = "check that the accuracy is what you know it to be"
# Names of the weights in folders of Hugging Face's library.
_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")


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
    """Load a model that can be patched and can predict.

        model = bnpatch.load("timm:resnet18")
        logits = model.predict(torch.zeros(1, *model.preprocessing.input_size))

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:ORG/NAME``, a checkpoint file, a file of ONNX
            or of torch.export (``.pt2``), a folder in the layout of the hub (``config.json`` and weights),
            or a torch module.
        arch: architecture of a checkpoint file, ``library:name`` or a name. By default the file says it, or
            it is found by the names and shapes of the tensors.
        use_ema: load the averaged weights of a checkpoint.
        unsafe_load: allow pickled modules, which can run any code that their author wants.
        output: name of the output that has the classes, or its number, from 0, if the model returns several.
            By default it is found by its shape and by the number of classes.
        device: the device that computes; None for the accelerator if there is one, or for that of a module.
        amp: compute in half precision where autocast allows it.
        include_1x1: also weight examples with one value per channel (1 x 1 maps, or after flattening). They
            have no variance, so that the weight mostly shrinks the signal.
        preprocessing: values that replace those of the model: img_size (a side, or height and width), mean,
            std, interpolation, crop_pct, crop_mode; None values are ignored.

    Raises:
        BnpatchError: there is no such model, or it can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix.lower() in (".onnx", ".pt2"):
        return load_onnx(
            model,
            output=output,
            device=onnx_device(device),
            preprocessing=preprocessing,
            include_1x1=include_1x1,
        )
    if isinstance(model, nn.Module):
        loaded = wrap(model)
        device = device or str(device_of(model))
    else:
        loaded = _load(str(model), arch, use_ema, unsafe_load)
        loaded.module.eval()
    _check_finite(loaded)
    channels = loaded.arch.in_chans if loaded.arch else _input_channels(loaded.module)
    return replace(
        loaded,
        device=pick_device(device or "auto"),
        amp=amp,
        wanted_output=output if output is not None else loaded.wanted_output,
        _state=replace(loaded.state, include_1x1=include_1x1 or loaded.state.include_1x1),
        preprocessing=loaded.preprocessing.override(channels=channels, **(preprocessing or {})),
    )


def apply(model: nn.Module, recipe: str | os.PathLike[str] | Recipe) -> nn.Module:
    """Patch a module with a recipe, in place.

        model = bnpatch.apply(model, "recipe.json")

    Args:
        model: the module that the recipe was made for.
        recipe: a recipe, the path of a recipe file, or ``hf-hub:org/name``.

    Returns:
        The module; it is another object only if the module itself is a norm.

    Raises:
        BnpatchError: the recipe can't be read, or was made for another model.
    """
    target = wrap(model)
    target.apply(recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    return target.module


def _load(model: str, arch: str | None, use_ema: bool, unsafe: bool) -> TorchModel:
    """Load a model by its name in a library or on the hub, from a folder of the hub, or from a file."""
    source, colon, name = model.partition(":")
    path = Path(model)
    if colon and source in ("timm", "torchvision", "hf-hub", "hf_hub") and not path.exists():
        return _load_torchvision(name) if source == "torchvision" else _load_timm(source, name)
    if (path / HUB_CONFIG).is_file():
        if shards := sorted(path.glob("*.index.json")):
            raise BnpatchError(
                f"the weights in {path} are in several files, says {shards[0].name}",
                "save them in one: model.save_pretrained(folder, max_shard_size='100GB')",
            )
        weights = [path / name for name in _TRANSFORMERS if (path / name).is_file()]
        if "model_type" not in hub_config(path / HUB_CONFIG) or not weights:
            return _load_timm("local-dir", model)
        path = weights[0]  # Hugging Face's library saved the model, not timm
    if path.suffix not in SUFFIXES and not path.exists():
        raise BnpatchError(f"there is no file {model}", f"give a file or {_suggestion(model)}")
    return _load_file(read_checkpoint(path, use_ema=use_ema, unsafe=unsafe), arch)


def _suggestion(name: str) -> str:
    known = [lib for lib in architecture.LIBRARIES if architecture.is_known(lib, name.split(".")[0])]
    return " or ".join(f"{lib}:{name}" for lib in known) or "a name as timm:NAME or torchvision:NAME"


def _load_timm(source: str, name: str) -> TorchModel:
    import timm

    full = name if source == "timm" else f"{source.replace('_', '-')}:{name}"
    if source == "timm":
        architecture.parse_name(f"timm:{name}")
    try:
        module: Any = timm.create_model(full, pretrained=True)
    except Exception as error:  # the hub's client raises errors of many types
        raise BnpatchError(
            f"cannot load {full}: {first_line(error)}",
            "check the name and the connection, or download the weights and give the file"
            if source != "local-dir"
            else "give the file of the weights in it",
        ) from error
    cfg = module.pretrained_cfg
    label = f"{cfg.get('architecture', name)}.{cfg['tag']}" if cfg.get("tag") else name
    with reading(Path(full), "a model with a configuration of timm's", "correct its config.json"):
        return TorchModel(
            module,
            name=Path(name).name,
            preprocessing=Preprocessing.of_timm(module, f"timm's pretrained_cfg of {label}"),
            class_names=read_names(cfg.get("label_names")),
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
    except Exception as error:  # torch.hub raises those of urllib, of the file system, and of its own checks
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
    """Return the architecture of this name if the module's weights fit it exactly, else None."""
    try:
        return architecture.fit(name, module.state_dict())
    except BnpatchError:  # the weights don't fit, so an export can't rebuild the module by its name
        return None


def _load_file(checkpoint: Checkpoint, arch: str | None) -> TorchModel:
    if checkpoint.module is not None:
        if arch:
            raise BnpatchError(f"{checkpoint.path} holds a whole model", "leave out --arch")
        model = wrap(checkpoint.module, checkpoint.path.stem)
        model.notes.append("a pickled model, run by its own code")
        known, source = _stored(checkpoint)
        if known:
            channels = model.preprocessing.input_size[0]
            model.preprocessing = applied(known, model.preprocessing, channels, source)
    else:
        model = _build(checkpoint, arch)
    _name_classes(model, checkpoint)
    batch_size = checkpoint.args.get("batch_size")  # per device, in timm's and torchvision's scripts
    is_size = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0
    model.train_batch_size = batch_size if is_size else None
    if stored := checkpoint.bnpatch:
        with reading(checkpoint.path, "a checkpoint of bnpatch", "make it again"):
            values = Preprocessing.from_json(stored["preprocessing"], "the checkpoint")
            recipe = Recipe.from_json(stored["recipe"], f"the recipe in {checkpoint.path}")
            output = stored.get("output")
            if not isinstance(output, str | None):
                raise TypeError(f"its output is a {type(output).__name__}")
        model.preprocessing = values
        model.wanted_output = output or None
        if recipe.norm_layers:
            model.apply(recipe)
            if any(recipe.alphas.values()):
                model.notes.append("patched by bnpatch")
    return model


def _name_classes(model: TorchModel, checkpoint: Checkpoint) -> None:
    """Take the names of the classes from the checkpoint or the file beside it, and note which."""
    own = getattr(model.module, "num_classes", None)
    outputs = model.arch.num_classes if model.arch else own if isinstance(own, int) else None
    hub = HUB_CONFIG, tuple(labels_of(hub_config(checkpoint.path)))
    for where, labels in ((checkpoint.path.name, checkpoint.labels), hub):
        names, notes = choose(labels, outputs, where)
        model.class_names = names or model.class_names
        if not checkpoint.bnpatch:
            model.notes += notes
        if names:
            return


def _build(checkpoint: Checkpoint, arch: str | None) -> TorchModel:
    """Build the architecture of a checkpoint, and load its weights."""
    file_name = checkpoint.path.name
    named = hub_config(checkpoint.path).get("architecture")
    hint = checkpoint.arch or (named if isinstance(named, str) else None)
    library = checkpoint.library or ("timm" if named and hint == named else None)
    state, found, left_out = _identified(checkpoint, arch, hint, library)
    published = tagged_weights(arch) or published_weights(found.name, file_name)
    if published is not None and arch is None:
        library = "timm" if isinstance(published, Mapping) else "torchvision"
        found = replace(found, library=library)
    module: Any = found.build()
    # strict=False is for counters of batches, which old checkpoints lack; fit() compared all other tensors.
    usable = {name: value for name, value in state.items() if not is_optional(name) or value.shape == ()}
    module.load_state_dict(usable, strict=False)
    known = _preprocessing(found, module, arch, published, checkpoint)
    model = TorchModel(
        module,
        name=checkpoint.path.stem,
        preprocessing=checkpoint.normalizer.in_place_of(known) if checkpoint.normalizer else known,
        class_order="plain" if found.library == "torchvision" else "natural",
        arch=replace(found, also=()),
    )
    if arch is None and hint not in (found.name, str(found)):
        others = f"; they would fit {', '.join(found.also)} too, --arch chooses" if found.also else ""
        model.notes.append(f"architecture {found}, identified by its tensors{others}")
    if left_out:
        model.notes.append(left_out)
    if found.num_classes == 0:
        model.notes.append("the weights have no classifier: the outputs are features, not classes")
    if published is not None and hasattr(module, "transform_input"):
        module.transform_input = True  # torchvision's published Inception weights expect it
    return model


def _identified(
    checkpoint: Checkpoint, arch: str | None, hint: str | None, library: str | None
) -> tuple[StateDict, Architecture, str]:
    """Return the weights under the names of their architecture, the architecture, and a note or ""."""
    renamed.check_hugging_face(hub_config(checkpoint.path))
    state = renamed.of_hugging_face(checkpoint.state_dict) or checkpoint.state_dict
    own_names = without_extras(state)
    try:
        part, note = part_of(state, arch, checkpoint.path)
        if arch:
            return part, architecture.fit(arch, part), note
        return part, architecture.identify(part, hint, checkpoint.path.name, library), note
    except BnpatchError:  # no architecture has tensors of these names: they may have been renamed
        if arch is None and (match := renamed.in_order_of_hugging_face(own_names)) is not None:
            return match[1], match[0], ""
        if (named := renamed.with_own_classifier(own_names)) is not None:
            found = architecture.fit(arch, named) if arch else architecture.identify(named, hint)
            return named, found, f"the classifier has another name than that of {found}: {_CHECK_ACCURACY}"
        if (match := renamed.in_order_of_use(own_names, wanted=arch)) is None:
            raise
        found, part = match
        note = f"its tensors have other names than those of {found}, and are taken in their order"
        return part, found, f"{note}: {_CHECK_ACCURACY}"


def _preprocessing(
    found: Architecture, module: nn.Module, arch: str | None, published: Any, checkpoint: Checkpoint
) -> Preprocessing:
    """Return the preprocessing from the first of these that has it.

    The published weights that ``--arch`` names by a tag; the checkpoint; the published weights that have its
    file name; the files beside it; the default of the architecture.
    """
    default = default_preprocessing(found, module, published)
    if tagged_weights(arch):
        return default
    values, source = _stored(checkpoint)
    if not values and published is not None:
        return default
    if not values:
        values, source = beside(checkpoint.path, found.name)
    return applied(values, default, found.in_chans, source) if values else default


def _stored(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Return the values of the preprocessing in a checkpoint, and their place."""
    with reading(checkpoint.path, "a checkpoint whose preprocessing can be read", "save it without"):
        return in_checkpoint(checkpoint.about, checkpoint.args, checkpoint.path)


def _input_channels(module: nn.Module) -> int | None:
    """Return the input channels of the first convolution, or None if the model has none."""
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
