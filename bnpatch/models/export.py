"""Patched models as standard ONNX files: one rewrite, whichever side the model comes from.

A torch model is exported as it was before any patch, with its Batch Norm kept as nodes; an ONNX model
is taken as it was read. Then the graph is rewritten, written, run by onnxruntime, and compared with the
model that it came from. A file that fails the comparison does not stay.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import FUSED
from bnpatch.core.io import writing_to
from bnpatch.core.moments import Moments
from bnpatch.models.load import load
from bnpatch.models.metadata import write_metadata
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_export import module_to_graph
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.onnx import io
from bnpatch.onnx.fused_conv import insert_norms
from bnpatch.onnx.rewrite import AlphaInputs, rewrite
from bnpatch.onnx.runtime import read_signature

#: Largest deviation that passes, relative to the largest output: float32 rounding through a deep network
#: whose operators are arranged in another order. Half precision has 2^-11 at every layer.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

_PARITY_BATCHES = (1, 2, 5)


class ParityError(BnpatchError):
    """The exported file does not compute what the model computes."""

    exit_code = 1


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the model.

    Attributes:
        path: the file.
        patched: names of the norm layers that the file weighs examples at.
        opset: version of the standard operators.
        max_deviation: largest absolute difference of outputs, relative to the largest output.
        mean_deviation: mean absolute difference, likewise.
        batches: numbers of images in the batches that were compared.
    """

    path: Path
    patched: tuple[str, ...]
    opset: int
    max_deviation: float
    mean_deviation: float
    batches: tuple[int, ...]


def export_onnx(
    model: nn.Module | TorchModel | OnnxModel,
    path: str | os.PathLike[str],
    example_input: Tensor | None = None,
    *,
    alpha_inputs: AlphaInputs | None = None,
    images: Tensor | None = None,
    external_data_threshold: int = io.EXTERNAL_DATA_THRESHOLD,
) -> Export:
    """Write a patched model as ONNX, with the alphas that it has now, and check that it computes the same.

    Norm layers at alpha = 0 stay as they were, so that runtimes fuse them as before.

    Args:
        model: a patched module, or what :func:`bnpatch.load` returns.
        path: where to write.
        example_input: inputs (N, ...) for a module; by default a blank image of its preprocessing.
        alpha_inputs: None writes alphas as constants; ``"global"`` or ``"per-site"`` makes them inputs
            with defaults.
        images: a real batch to compare on, besides random ones.
        external_data_threshold: bytes of tensors above which they go to ``<name>.data`` beside the file.

    Raises:
        ParityError: the file deviates more than rounding; it is removed.
        BnpatchError: the model can't be exported, or the file can't be written.
    """
    source = load(model) if isinstance(model, nn.Module) else model
    if isinstance(source, OnnxModel):
        graph, patched = source.rewritten(alpha_inputs)
        device, dtype = source.device, torch.float32
    else:
        if example_input is None:
            example_input = torch.zeros(2, *source.preprocessing.input_size)
        graph, patched = _export_torch(source, example_input, alpha_inputs)
        device, dtype = torch.device("cpu"), example_input.dtype
    target = Path(path)
    with (
        writing_to(target),
        tempfile.TemporaryDirectory(dir=_folder_of(target), prefix=".bnpatch-") as folder,
    ):
        # Compared before it has its name: what deviates is never there.
        written = io.save(graph, Path(folder) / target.name, external_data_threshold=external_data_threshold)
        deviations, batches = _compare(source, written, device, example_input, images)
        worst = max(high for high, _ in deviations)
        if not worst <= TOLERANCE[dtype]:
            raise ParityError(
                f"the exported graph deviates by {worst:.2g} of the largest output, more than rounding",
                "report it with the model's architecture; no file was written",
            )
        for part in Path(folder).iterdir():  # the data file, if there is one, before the model
            if part.name != written.name:
                part.replace(target.parent / part.name)
        written.replace(target)
    mean = sum(mean for _, mean in deviations) / len(deviations)
    return Export(target, patched, graph.opset_imports.get("", 0), worst, mean, batches)


def _export_torch(
    source: TorchModel, example_input: Tensor, alpha_inputs: AlphaInputs | None
) -> tuple[ir.Model, tuple[str, ...]]:
    alphas, identities = source.alphas(), source.identities()
    moments = source.running()
    running = {n: Moments(*(part.cpu().numpy() for part in (m.mean, m.var))) for n, m in moments.items()}
    with source.unpatched() as module, _norms_without_moments(module, moments):
        graph = module_to_graph(module, example_input.to(source.device))
    write_metadata(graph, source.preprocessing, source.class_names)
    # What only training reaches, such as Inception's auxiliary classifier, is not in the graph.
    reached = source.norm_shapes(example_input)
    alphas = {name: alpha for name, alpha in alphas.items() if name in reached}
    used = {
        n: m
        for n, m in source.recovered().items()
        if n in reached and (alpha_inputs or alphas[n] or n in running)
    }
    insert_norms(graph, {name.removesuffix(FUSED): moments for name, moments in used.items()})
    alphas = {n: a for n, a in alphas.items() if n in used or not n.endswith(FUSED)}
    chosen = {n: a for n, a in alphas.items() if alpha_inputs or a != identities[n] or n in running}
    running = {name: m for name, m in running.items() if name in chosen}
    include_1x1 = any(
        norm_layer.module.include_1x1
        for norm_layer in source.inventory().norm_layers
        if isinstance(norm_layer.module, ExampleWeightedNorm)
    )
    done = rewrite(
        graph,
        chosen,
        running=running,
        channels_per_group={s.name: s.channels_per_group for s in source.inventory().norm_layers},
        alpha_inputs=alpha_inputs,
        include_1x1=include_1x1,
    )
    return graph, done.patched


@contextmanager
def _norms_without_moments(module: nn.Module, running: Mapping[str, Moments[Tensor]]) -> Iterator[None]:
    """Batch Norm that never kept running moments has those of data: else it would be exported in training."""
    modules = dict(module.named_modules())
    norms = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm) and m.running_mean is None}
    for name, moments in running.items():
        if name in norms:
            norms[name].running_mean, norms[name].running_var = moments.mean, moments.var
    try:
        yield
    finally:
        for norm in norms.values():
            norm.running_mean = norm.running_var = None


def _compare(
    source: TorchModel | OnnxModel,
    written: Path,
    device: torch.device,
    example_input: Tensor | None,
    images: Tensor | None,
) -> tuple[list[tuple[float, float]], tuple[int, ...]]:
    """Deviations (largest, mean) of the file from the model, relative to the largest output."""
    graph = io.load(written)
    signature = read_signature(graph, source.signature.output if isinstance(source, OnnxModel) else None)
    exported = OnnxModel(graph, "exported", signature, source.preprocessing, device=device)
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(1, *source.preprocessing.input_size) if example_input is None else example_input
    shape = like.shape[1:]
    batches = [torch.randn(n, *shape, generator=generator).to(like.dtype) for n in _PARITY_BATCHES]
    if images is not None:
        batches.append(images)
    deviations = []
    with source.evaluating():
        for x in batches:
            expected, got = source.predict(x).cpu().double(), exported.predict(x).double()
            scale = expected.abs().max().clamp_min(1e-12)
            difference = (got - expected).abs() / scale
            deviations.append((difference.max().item(), difference.mean().item()))
    return deviations, tuple(len(x) for x in batches)


def _folder_of(path: Path) -> Path:
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
