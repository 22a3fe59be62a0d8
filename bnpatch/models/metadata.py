"""Store the preprocessing and the class names of a model in the metadata of an ONNX file."""

import ast
import json
from typing import Any

import onnx_ir as ir

from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.labels import choose, labels_of
from bnpatch.models.stored_preprocessing import of_ultralytics

# Keys of the metadata; the values are JSON. Files that users have contain these keys, so don't change them.
_PREPROCESSING, _CLASS_NAMES = "bnpatch.preprocessing", "bnpatch.class_names"
_OUTPUT = "bnpatch.output"  # the name of the output as it is; an earlier bnpatch does not read it


def write_metadata(
    graph: ir.Model, preprocessing: Preprocessing, class_names: tuple[str, ...] | None, output: str | None
) -> None:
    """Write preprocessing, class names and the name of the output to read into the metadata of a graph."""
    graph.metadata_props[_PREPROCESSING] = json.dumps(preprocessing.to_json())
    if class_names:
        graph.metadata_props[_CLASS_NAMES] = json.dumps(class_names)
    if output is not None and len(graph.graph.outputs) > 1:
        graph.metadata_props[_OUTPUT] = output


def stored_output(graph: ir.Model) -> str | None:
    """Return the name of the output to read that :func:`write_metadata` wrote, or None."""
    return graph.metadata_props.get(_OUTPUT)


def read_metadata(graph: ir.Model) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """Read what :func:`write_metadata` wrote; None for what is missing.

    Raises:
        ValueError, TypeError, KeyError: another program wrote something else under these keys.
    """
    known, written = (graph.metadata_props.get(key) for key in (_PREPROCESSING, _CLASS_NAMES))
    names = json.loads(written) if written else None
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise TypeError(f"{_CLASS_NAMES} is no list of names")
    return (
        Preprocessing.from_json(json.loads(known), "the file's metadata") if known else None,
        tuple(names) if names else None,
    )


def read_foreign_metadata(
    graph: ir.Model, channels: int
) -> tuple[Preprocessing | None, tuple[str, ...] | None, list[str]]:
    """Read the preprocessing and the class names that other programs wrote, and notes on the names.

    Ultralytics writes Python literals: the classes as ``names``, the size as ``imgsz``, and a ``stride``.

    Args:
        graph: the graph.
        channels: number of input channels.

    Raises:
        BnpatchError: the size can't be read.
    """
    values = {key: _literal(text) for key, text in graph.metadata_props.items()}
    names, notes = choose(labels_of(values), num_outputs(graph), "the file's metadata")
    is_ultralytics = "imgsz" in values and "stride" in values
    return of_ultralytics(values["imgsz"], channels) if is_ultralytics else None, names, notes


def _literal(text: str) -> Any:
    """Read a value as JSON or as a Python literal, which runs no code; None for other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        # What the two readers raise for other text, and for brackets that are nested too deep.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def num_outputs(graph: ir.Model) -> int | None:
    """Return the last dimension of the only output, or None if the file leaves it open."""
    shape = graph.graph.outputs[0].shape if len(graph.graph.outputs) == 1 else None
    return shape[-1] if shape is not None and len(shape) == 2 and isinstance(shape[-1], int) else None
