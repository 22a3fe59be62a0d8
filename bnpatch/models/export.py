"""Export patched models as standard ONNX files, and check that the files compute the same.

A torch model is exported without its patch, with its Batch Norm as nodes; an ONNX model already is a graph.
Then the same code (:func:`patched_graph`) rewrites the graph. A temporary file is written and runs in
onnxruntime, and the outputs are compared with those of the model; where the model is a graph, what each norm
layer computes is compared with the formula, too (:mod:`bnpatch.models.norm_check`). The file gets its name
only if they agree.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import FUSED
from bnpatch.core.io import temporary_folder, writing_to
from bnpatch.core.moments import Moments
from bnpatch.core.patch import as_arrays
from bnpatch.models.base import Model
from bnpatch.models.distances import on_host
from bnpatch.models.load import load
from bnpatch.models.norm_check import compared_by_norm_layer
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.onnx import io
from bnpatch.onnx.fused_conv import insert_norms
from bnpatch.onnx.rewrite import AlphaInputs, rewrite
from bnpatch.onnx.runtime import Signature, read_signature

#: Largest deviation that is accepted, relative to the largest output. It allows for rounding in a deep
#: network whose operators are in another order; half precision rounds by 2^-11 at every layer.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

#: The same for what one norm layer returns. It is larger, because a layer that divides by a small standard
#: deviation increases rounding errors.
NORM_TOLERANCE = 1e-2

_PARITY_BATCHES = (1, 2, 5)
_LARGER_BY = 32  # pixels; the largest stride of most networks


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
        sizes: sizes (C, *spatial) of the inputs that were compared; two if the graph leaves them open.
    """

    path: Path
    patched: tuple[str, ...]
    opset: int
    max_deviation: float
    mean_deviation: float
    batches: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...] = ()


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

    Norm layers whose alpha is that of the baseline stay as they were, so that runtimes fuse them as before.

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
            slope is not 0, the slopes become inputs, too, ``slope`` or ``slope.<name>``, and if any offset is
            not 0, the offsets, ``var_offset`` or ``var_offset.<name>``.
        images: a real batch (N, ...) to compare on, besides random ones.
        external_data_threshold: if the tensors take more bytes, they go to ``<name>.data`` beside the file.

    Returns:
        The path, the norm layers that were rewritten, and the deviation from the model.

    Raises:
        ParityError: the outputs, or those of a norm layer, differ by more than rounding; no file is written.
        BnpatchError: the model can't be exported, or the file can't be written.
    """
    source = load(model) if isinstance(model, nn.Module) else model
    graph, patched = patched_graph(source, alpha_inputs, example_input)
    target, given = Path(path), [] if example_input is None else [example_input.dtype]
    with writing_to(target), temporary_folder(_folder_of(target)) as folder:
        # The file is compared before it gets its name, so that a deviating file never exists under it.
        written = io.save(graph, folder / target.name, external_data_threshold=external_data_threshold)
        deviations, shapes = _compare(source, written, example_input, images)
        worst = float(np.max([high for high, _ in deviations]))  # nan if any is, unlike Python's max
        _refuse(worst, "the exported graph", max(TOLERANCE[dtype] for dtype in (source.dtype, *given)))
        for part in folder.iterdir():  # move the data file, if there is one, before the model
            if part.name != written.name:
                part.replace(target.parent / part.name)
        written.replace(target)
    mean = sum(mean for _, mean in deviations) / len(deviations)
    batches, sizes = tuple(shape[0] for shape in shapes), tuple(dict.fromkeys(shape[1:] for shape in shapes))
    return Export(target, patched, graph.opset_imports.get("", 0), worst, mean, batches, sizes)


def patched_graph(
    model: Model[Any], alpha_inputs: AlphaInputs | None = None, example_input: Tensor | None = None
) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the patched model as a new ONNX graph, and the names of the norm layers that were rewritten.

    Args:
        model: the model, with the state to write.
        alpha_inputs: see :func:`bnpatch.onnx.rewrite.rewrite`.
        example_input: inputs (N, ...) with which a torch model is exported; by default blank images.
    """
    graph, exported = model.unpatched_graph(example_input)
    state, weights, baseline = model.state, model.weights, model.baseline_alphas()
    in_use = {name: _unrounded(part) for name, part in model.statistics_in_use().items() if name in exported}
    chosen = {
        name
        for name, alpha in weights.alphas.items()
        if name in exported and (alpha_inputs or alpha != baseline[name] or name in in_use)
    }
    # A recovered norm layer that is not chosen is left out of the graph, because it would do nothing.
    recovered = {name: m for name, m in state.running.items() if name.endswith(FUSED) and name in chosen}
    insert_norms(graph, {name.removesuffix(FUSED): as_arrays(part) for name, part in recovered.items()})
    done = rewrite(
        graph,
        weights.to_write(chosen, alpha_inputs),
        running={name: part for name, part in in_use.items() if name in chosen},
        channels_per_group=state.channels_per_group,
        alpha_inputs=alpha_inputs,
        include_1x1=state.include_1x1,
    )
    return graph, done.patched


def _unrounded(moments: Moments[Any]) -> Moments[Any]:
    """Convert moments to arrays of the same type; ``as_arrays`` would round them to float32."""
    return Moments(*(on_host(part) for part in (moments.mean, moments.var)))


def _compare(
    source: Model[Any],
    written: Path,
    example_input: Tensor | None,
    images: Tensor | None,
) -> tuple[list[tuple[float, float]], list[tuple[int, ...]]]:
    """Return the deviations (largest, mean) of the file from the model, and the shapes of the inputs.

    The file is read again, so that the comparison is with what users will run. The deviations are relative to
    the largest output of the batch.
    """
    graph = io.load(written)
    signature = read_signature(graph)
    device = source.device if source.runs_onnx else torch.device("cpu")
    like = torch.zeros(1, *source.preprocessing.input_size) if example_input is None else example_input
    output = source.output_for(like)
    output = replace(output, name=list(signature.outputs)[output.position])
    exported = OnnxModel(
        graph, signature, name="exported", preprocessing=source.preprocessing, device=device, output=output
    )
    generator = torch.Generator().manual_seed(0)

    def random(count: int, size: Sequence[int]) -> Tensor:
        return torch.randn(count, *size, generator=generator).to(like.dtype)

    batches = [random(count, like.shape[1:]) for count in _PARITY_BATCHES]
    batches += [] if images is None else [images]
    with source.evaluating():
        expected = [source.predict(x) for x in batches]
        if (other := _another_size(signature, like.shape[1:])) is not None:
            with suppress(BnpatchError):  # the model itself may be for one size
                x = random(_PARITY_BATCHES[1], other)
                expected.append(source.predict(x))
                batches.append(x)
        pairs = zip(expected, map(exported.predict, batches), strict=True)
        deviations = [_deviation(y.cpu().double(), got.double()) for y, got in pairs]
    if source.runs_onnx and not source.weights.is_baseline(source.baseline_alphas()):
        # The source's predictions come from the same rewrite, so they can't show an error in it. The baseline
        # needs no such check, because it is the file as it was read.
        x = batches[1] if images is None else images
        for part, wanted, found in compared_by_norm_layer(source, exported, x):
            _refuse(_deviation(wanted, found)[0], part, max(NORM_TOLERANCE, TOLERANCE[source.dtype]))
    return deviations, [tuple(x.shape) for x in batches]


def _refuse(deviation: float, part: str, tolerance: float) -> None:
    """Raise ParityError if a deviation is more than rounding."""
    if not deviation <= tolerance:  # nan is not
        raise ParityError(
            f"{part} deviates by {deviation:.2g} of the largest value, more than rounding",
            "report it with the model's architecture; no file was written",
        )


def _another_size(signature: Signature, size: Sequence[int]) -> tuple[int, ...] | None:
    """Return a size (C, *spatial) that is larger where the graph leaves it open, or None."""
    channels, *sides = size
    steps = [_LARGER_BY if known is None else 0 for known in signature.size[1:]]
    if len(steps) != len(sides) or not any(steps):
        return None
    return (channels, *(side + step for side, step in zip(sides, steps, strict=True)))


def _deviation(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the largest and the mean deviation, relative to the largest finite output.

    A model may return nan or infinity for random images. The file must return the same.
    """
    scale = expected.abs().nan_to_num(0, 0).max().clamp_min(1e-12)
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = ((found - expected).abs() / scale).where(~same, 0)
    return difference.max().item(), difference.mean().item()


def _folder_of(path: Path) -> Path:
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
