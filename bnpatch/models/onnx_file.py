"""Load an ONNX file, or a program of torch.export, as an OnnxModel."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import pick_device
from bnpatch.core.patch import PatchState
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.foreign import check_kind, reading
from bnpatch.models.labels import choose, labels_of
from bnpatch.models.metadata import num_outputs, read_foreign_metadata, read_metadata, stored_output
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.stored_preprocessing import HUB_CONFIG, Values, applied, beside, hub_config
from bnpatch.models.torch_export import program_to_graph
from bnpatch.onnx import io
from bnpatch.onnx.own_normalization import largest_value
from bnpatch.onnx.runtime import Signature, learn_ranks, read_signature


def load_onnx(
    path: str | os.PathLike[str],
    *,
    output: str | None = None,
    device: torch.device | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    include_1x1: bool = False,
) -> OnnxModel:
    """Load an ONNX file as a model that can predict.

    Args:
        path: an ONNX file, with its external data in the same folder; or a ``.pt2`` file of torch.export,
            which is exported to ONNX.
        output: see :func:`bnpatch.load`.
        device: cpu or cuda; the CPU by default.
        preprocessing: values that replace those of the file, see :func:`bnpatch.load`.
        include_1x1: see :func:`bnpatch.load`.

    Raises:
        BnpatchError: the file can't be read, or its input is not one batch of images.
    """
    path = Path(path)
    check_kind(path)
    graph = io.inline_norms(program_to_graph(path)) if path.suffix.lower() == ".pt2" else io.load(path)
    signature = read_signature(graph)
    base, class_names, notes = _known(path, graph, signature, preprocessing or {})
    learn_ranks(graph, signature, base.input_size)
    model = OnnxModel(
        graph,
        signature,
        name=path.stem,
        preprocessing=base,
        class_names=class_names,
        device=device or torch.device("cpu"),
        notes=notes,
        wanted_output=output if output is not None else stored_output(graph),
        _state=PatchState(include_1x1=include_1x1),
    )
    if output is not None and output not in signature.outputs and not output.isdecimal():
        raise BnpatchError(
            f"the graph has no output {output!r}",
            f"choose --output-name among {', '.join(signature.outputs)}",
        )
    if len(model.fused_convs()) > len(model.inventory().norm_layers):
        notes.append(
            f"{len(model.fused_convs())} convolutions look as if a Batch Norm was fused into them: "
            "tune-alpha --recover-fused makes them norm layers"
        )
    return model


def _known(
    path: Path, graph: ir.Model, signature: Signature, wanted: Mapping[str, Any]
) -> tuple[Preprocessing, tuple[str, ...] | None, list[str]]:
    """Return the preprocessing, the names of the classes or None, and notes.

    They come from the file's metadata, else from files beside it, else from what the graph computes first,
    else they are ImageNet's. What the user wants replaces values of the preprocessing.
    """
    channels, height, width = signature.size if len(signature.size) == 3 else (signature.size[0], None, None)
    with reading(path, "a file whose metadata can be read", "export it again"):
        base, class_names = read_metadata(graph)
        foreign, foreign_names, notes = read_foreign_metadata(graph, channels or 3)
    values, source, names_beside, notes_beside = _beside(path, num_outputs(graph))
    if class_names is not None:
        notes.clear()
    elif foreign_names is None:
        notes += notes_beside
    if base is None:
        default = _of_imagenet(channels or 3, height or 224, width or 224)
        if foreign is None and values:
            foreign = applied(values, default, channels or 3, source)
        if foreign is not None:
            size = foreign.input_size
            base = replace(foreign, input_size=(size[0], height or size[1], width or size[2]))
    if base is None:
        base = default
        if signature.dtype != np.uint8 and (largest := largest_value(graph, signature.input)) is not None:
            source = f"values up to {largest:g}, because the graph normalizes images itself"
            base = replace(base, mean=(0.0,), std=(1 / largest,), source=source)
        if len(signature.size) != 3:
            notes.append(f"takes inputs of {1 + len(signature.size)} axes: give arrays of floats, not images")
        elif height is None and wanted.get("img_size") is None:
            notes.append("the file leaves the image size open; 224 is taken, --img-size says otherwise")
    return base.override(channels=channels, **wanted), class_names or foreign_names or names_beside, notes


def _beside(path: Path, outputs: int | None) -> tuple[Values, str, tuple[str, ...] | None, list[str]]:
    """Return what the files beside a graph say, as those of Hugging Face's hub.

    Where the graph lies in a folder "onnx", they may be in the folder above.

    Returns:
        Values of the preprocessing, and their place; the names of the classes or None, and notes on them.
    """
    folders = (path.parent, path.parent.parent) if path.absolute().parent.name == "onnx" else (path.parent,)
    for folder in folders:
        checkpoint = folder / path.name
        config = hub_config(checkpoint)
        values, source = beside(checkpoint, str(config.get("architecture") or ""))
        names, notes = choose(labels_of(config), outputs, HUB_CONFIG)
        if values or names:
            return values, source.replace("the checkpoint", "the file"), names, notes
    return {}, "", None, []


def onnx_device(name: str | None) -> torch.device:
    """Resolve a device for onnxruntime; the default is the GPU if onnxruntime has its provider."""
    import onnxruntime

    if name is not None:
        return torch.device(name) if name.split(":")[0] in ("cpu", "cuda") else pick_device(name)
    has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


def _of_imagenet(channels: int, height: int, width: int) -> Preprocessing:
    source = "ImageNet's values, for want of better (--mean, --std, --crop-pct)"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing((channels, height, width), mean, std, "bilinear", source=source)
