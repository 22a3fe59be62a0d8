"""Export a torch model, without its patch, to an ONNX graph that keeps its Batch Norm."""

import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnpatch.core.errors import BnpatchError, first_line, root_cause
from bnpatch.core.moments import Moments
from bnpatch.models.metadata import write_metadata
from bnpatch.nn.frozen_norm import as_batch_norm, is_frozen
from bnpatch.nn.hooks import in_evaluation_mode
from bnpatch.nn.places import swap

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel


def module_to_graph(
    module: nn.Module, example_input: Tensor, output_names: Sequence[str] = ("output",)
) -> ir.Model:
    """Export a module in evaluation mode, for batches of any size.

    Args:
        module: the module; its modes are not changed.
        example_input: inputs (N, ...), with N >= 2, because torch.export takes a size of 1 for a constant.
        output_names: names of the outputs, in the order of :func:`bnpatch.models.outputs.tensors_of`.

    Raises:
        BnpatchError: torch can't export the module.
    """
    with in_evaluation_mode(module):
        return _export(
            module,
            (example_input,),
            input_names=["input"],
            output_names=list(output_names),
            dynamic_shapes=({0: "batch"},),
        )


def program_to_graph(path: str | os.PathLike[str]) -> ir.Model:
    """Read a file of torch.export (``.pt2``) and export the program with its own shapes.

    Raises:
        BnpatchError: the file is no such program, or torch can't export the program.
    """
    try:
        with _quiet():  # the loader logs a traceback before it raises
            program = torch.export.load(path)
    except Exception as error:  # the loader raises errors of many types for a damaged archive
        raise BnpatchError(
            f"{path} is damaged or not a torch.export program ({first_line(error)})", "export it again"
        ) from error
    return _export(program, ())


def _export(model: Any, args: tuple[Tensor, ...], **options: Any) -> ir.Model:
    from onnxscript import optimizer

    try:
        with _quiet():
            # optimize=True would fold every Batch Norm into its convolution.
            program = torch.onnx.export(model, args, dynamo=True, optimize=False, verbose=False, **options)
    except Exception as error:  # torch.export raises errors of many types
        raise BnpatchError(
            f"torch can't export the model: {first_line(root_cause(error))}",
            "make its forward exportable with torch.export, or apply the recipe in Python",
        ) from error
    assert program is not None  # the dynamo exporter returns a program
    graph = program.model
    optimizer.fold_constants(graph)  # runtimes can't fuse parameters that go through casts and expansions
    optimizer.remove_unused_nodes(graph)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, log messages and printed graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def unpatched_graph(source: "TorchModel", example_input: Tensor) -> tuple[ir.Model, frozenset[str]]:
    """Export a torch model without its patch.

    The graph computes in float32, or in float16 if the example is of that type. onnxruntime has no
    convolutions in bfloat16 and in double precision on a CPU.

    Args:
        source: the model.
        example_input: inputs (N, ...) with which it is exported.

    Returns:
        The graph, and the names of the norm layers in it. It lacks those that only training uses, such as
        those of Inception's auxiliary classifier.
    """
    moments = source.statistics_in_use()
    dtype = example_input.dtype if example_input.dtype == torch.float16 else torch.float32
    output, names = source.output_for(example_input), source.output_names(example_input)
    with source.unpatched(), _frozen_as_batch_norm(source) as module, _norms_without_moments(module, moments):
        graph = module_to_graph(_in_dtype(module, dtype), example_input.to(source.device, dtype), names)
    write_metadata(graph, source.preprocessing, source.class_names, names[output.position])
    return graph, frozenset(source.norm_shapes(example_input))


@contextmanager
def _frozen_as_batch_norm(source: "TorchModel") -> Iterator[nn.Module]:
    """Yield the module with Batch Norm in the place of frozen ones, which export as Mul and Add otherwise."""
    norms = [norm.module for norm in source.inventory().norm_layers]
    frozen = {id(norm): as_batch_norm(norm) for norm in norms if is_frozen(norm)}
    before = {id(frozen[id(norm)]): norm for norm in norms if id(norm) in frozen}
    try:
        yield swap(source.module, frozen)
    finally:
        swap(source.module, before)


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module, or a copy in this type if it has parameters of another floating-point type."""
    tensors = (*module.parameters(), *module.buffers())
    if all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()):
        return module
    return copy.deepcopy(module).to(dtype)


@contextmanager
def _norms_without_moments(module: nn.Module, running: Mapping[str, Moments[Tensor]]) -> Iterator[None]:
    """Give Batch Norm without running statistics those from data, until the context ends.

    Without them torch would export the Batch Norm in training mode.
    """
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
