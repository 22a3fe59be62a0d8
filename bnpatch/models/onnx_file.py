"""An ONNX file, or a program of torch.export -> OnnxModel."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.metadata import read_metadata
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_export import program_to_graph
from bnpatch.onnx import io
from bnpatch.onnx.runtime import read_signature


def load_onnx(
    path: str | os.PathLike[str],
    *,
    output: str | None = None,
    device: torch.device | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    include_1x1: bool = False,
) -> OnnxModel:
    """Read an ONNX file, ready to predict.

    Args:
        path: an ONNX file, whose external data lie beside it; or a ``.pt2`` file of torch.export, which is
            exported to ONNX.
        output: which output to read; the first by default.
        device: cpu or cuda.
        preprocessing: what to use instead of what the file says, see :func:`bnpatch.load`.
        include_1x1: see :func:`bnpatch.load`.

    Raises:
        BnpatchError: the file can't be read, or takes something else than one batch of images.
    """
    is_program = Path(path).suffix == ".pt2"
    graph = io.inline_norms(program_to_graph(path)) if is_program else io.load(path)
    signature = read_signature(graph, output)
    base, class_names = read_metadata(graph)
    wanted = dict(preprocessing or {})
    notes = []
    channels, height, width = signature.size
    if base is None:
        source = "ImageNet's values, for want of better (--mean, --std, --crop-pct)"
        if height is None and wanted.get("img_size") is None:
            notes.append("the file leaves the image size open; 224 is taken, --img-size says otherwise")
        size = (channels or 3, height or 224, width or 224)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        base = Preprocessing(size, mean, std, "bilinear", source=source)
    model = OnnxModel(
        graph,
        Path(path).stem,
        signature,
        base.override(channels=channels, **wanted),
        class_names=class_names,
        device=device or torch.device("cpu"),
        include_1x1=include_1x1,
        notes=notes,
    )
    if len(model.fused_convs()) > len(model.inventory().norm_layers):
        notes.append(
            f"{len(model.fused_convs())} convolutions look as if a Batch Norm was fused into them: "
            "tune-alpha --recover-folded makes them norm layers"
        )
    return model
