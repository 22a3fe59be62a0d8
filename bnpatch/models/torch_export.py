"""A torch model as an ONNX graph that still has its Batch Norm."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError, first_line, root_cause
from bnpatch.nn.hooks import in_evaluation_mode


def module_to_graph(module: nn.Module, example_input: Tensor) -> ir.Model:
    """Export a module in evaluation mode, for batches of any size.

    Args:
        module: left in the modes that it has.
        example_input: an input (N, ...), with N of at least 2 so that it isn't taken for a constant.

    Raises:
        BnpatchError: torch can't export it.
    """
    with in_evaluation_mode(module):
        return _export(
            module,
            (example_input,),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )


def program_to_graph(path: str | os.PathLike[str]) -> ir.Model:
    """Read a file of torch.export (``.pt2``) and export the program, with the shapes that it has.

    Raises:
        BnpatchError: the file can't be read, or torch can't export the program.
    """
    path = Path(path)
    if not path.is_file():
        raise BnpatchError(f"cannot read {path}: no such file", "check the path")
    try:
        with _quiet():  # it logs a traceback before it raises
            program = torch.export.load(path)
    except Exception as error:  # whatever a damaged archive makes the loader trip over
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
    except Exception as error:  # torch.export raises errors of many kinds
        raise BnpatchError(
            f"torch can't export the model: {first_line(root_cause(error))}",
            "make its forward exportable with torch.export, or apply the recipe in Python",
        ) from error
    assert program is not None  # of the dynamo exporter
    graph = program.model
    optimizer.fold_constants(graph)  # parameters hidden behind casts and expansions stop runtimes from fusing
    optimizer.remove_unused_nodes(graph)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, on operators that nobody uses for one, and the graphs it prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
