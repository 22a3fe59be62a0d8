"""Export patched models as standard ONNX files, and check that the files compute the same.

A torch model is exported without its patch, with its Batch Norm as nodes; an ONNX model already is a graph.
Then the same code rewrites the graph, writes it to a temporary file, runs that file in onnxruntime and
compares the outputs with those of the model. The file gets its name only if they agree.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import temporary_folder, writing_to
from bnpatch.models.base import Model
from bnpatch.models.load import load
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.onnx import io
from bnpatch.onnx.rewrite import AlphaInputs
from bnpatch.onnx.runtime import read_signature

#: Largest deviation that is accepted, relative to the largest output. It allows for rounding in a deep
#: network whose operators are in another order; half precision rounds by 2^-11 at every layer.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

_PARITY_BATCHES = (1, 2, 5)


class ParityError(BnpatchError):
    """The exported file does not compute what the model computes."""

    exit_code = 1


@dataclass(frozen=True)
class Export:
    """The file that was written, and how much it deviates from the model.

    Attributes:
        path: the file.
        patched: names of the norm layers that were rewritten in the file.
        opset: opset version of the standard operators.
        max_deviation: largest absolute difference of outputs, divided by the largest output.
        mean_deviation: mean absolute difference of outputs, divided by the largest output.
        batches: number of images in each batch that was compared.
    """

    path: Path
    patched: tuple[str, ...]
    opset: int
    max_deviation: float
    mean_deviation: float
    batches: tuple[int, ...]


def export_onnx(
    model: nn.Module | Model[Any],
    path: str | os.PathLike[str],
    example_input: Tensor | None = None,
    *,
    alpha_inputs: AlphaInputs | None = None,
    images: Tensor | None = None,
    external_data_threshold: int = io.EXTERNAL_DATA_THRESHOLD,
) -> Export:
    """Write a patched model with its current weights as ONNX, and check that the file computes the same.

    Norm layers at their identity stay as they were, so that runtimes fuse them as before.

        model = bnpatch.patch(torchvision.models.resnet18(), alpha=0.02)
        export = bnpatch.export_onnx(model, "resnet18.onnx")

    Args:
        model: a patched module, or what :func:`bnpatch.load` returns.
        path: the file to write.
        example_input: inputs (N, ...) with which a module is exported; by default blank images of the size
            of its preprocessing. The file computes in float32, whatever the type of the module, or in
            float16 if this is of that type.
        alpha_inputs: None writes alphas as constants. ``"global"`` adds one graph input for all alphas,
            ``"per-site"`` one for each norm layer; the inputs have the current alphas as defaults. If any
            slope is not 0, the slopes become inputs, too, ``slope`` or ``slope.<name>``.
        images: a real batch (N, ...) to compare on, besides random ones.
        external_data_threshold: if the tensors take more bytes, they go to ``<name>.data`` beside the file.

    Returns:
        The path, the norm layers that were rewritten, and the deviation from the model.

    Raises:
        ParityError: the outputs differ by more than rounding; no file is written.
        BnpatchError: the model can't be exported, or the file can't be written.
    """
    source = load(model) if isinstance(model, nn.Module) else model
    graph, patched = source.rewritten(alpha_inputs, example_input)
    target, given = Path(path), [] if example_input is None else [example_input.dtype]
    with (
        writing_to(target),
        temporary_folder(_folder_of(target)) as folder,
    ):
        # The file is compared before it gets its name, so that a deviating file never exists under it.
        written = io.save(graph, folder / target.name, external_data_threshold=external_data_threshold)
        deviations, batches = _compare(source, written, example_input, images)
        worst = float(np.max([high for high, _ in deviations]))  # nan if any is, unlike Python's max
        if not worst <= max(TOLERANCE[dtype] for dtype in (source.dtype, *given)):
            raise ParityError(
                f"the exported graph deviates by {worst:.2g} of the largest output, more than rounding",
                "report it with the model's architecture; no file was written",
            )
        for part in folder.iterdir():  # move the data file, if there is one, before the model
            if part.name != written.name:
                part.replace(target.parent / part.name)
        written.replace(target)
    mean = sum(mean for _, mean in deviations) / len(deviations)
    return Export(target, patched, graph.opset_imports.get("", 0), worst, mean, batches)


def _compare(
    source: Model[Any],
    written: Path,
    example_input: Tensor | None,
    images: Tensor | None,
) -> tuple[list[tuple[float, float]], tuple[int, ...]]:
    """Return the deviations (largest, mean) of the file from the model, and the batch sizes.

    The deviations are relative to the largest output of the batch.
    """
    graph = io.load(written)
    signature = read_signature(graph)
    device = source.device if source.runs_onnx else torch.device("cpu")
    like = torch.zeros(1, *source.preprocessing.input_size) if example_input is None else example_input
    output = source.output_for(like)
    output = replace(output, name=list(signature.outputs)[output.position])
    exported = OnnxModel(graph, "exported", signature, source.preprocessing, device=device, output=output)
    generator = torch.Generator().manual_seed(0)
    shape = like.shape[1:]
    batches = [torch.randn(n, *shape, generator=generator).to(like.dtype) for n in _PARITY_BATCHES]
    if images is not None:
        batches.append(images)
    deviations = []
    with source.evaluating():
        for x in batches:
            expected, got = source.predict(x).cpu().double(), exported.predict(x).double()
            scale = expected.abs().nan_to_num(0, 0).max().clamp_min(1e-12)
            # A model may return nan or infinity for random images. The file must return the same.
            same = (got == expected) | (got.isnan() & expected.isnan())
            difference = ((got - expected).abs() / scale).where(~same, 0)
            deviations.append((difference.max().item(), difference.mean().item()))
    return deviations, tuple(len(x) for x in batches)


def _folder_of(path: Path) -> Path:
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
