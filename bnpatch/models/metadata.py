"""What bnpatch knows of a model, in the metadata of an ONNX file."""

import json

import onnx_ir as ir

from bnpatch.data.preprocessing import Preprocessing

# Keys, under which there is JSON. Files out there have them.
_PREPROCESSING, _CLASS_NAMES = "bnpatch.preprocessing", "bnpatch.class_names"


def write_metadata(
    graph: ir.Model, preprocessing: Preprocessing, class_names: tuple[str, ...] | None
) -> None:
    """Keep how images become inputs and what the outputs are called with a graph."""
    graph.metadata_props[_PREPROCESSING] = json.dumps(preprocessing.to_json())
    if class_names:
        graph.metadata_props[_CLASS_NAMES] = json.dumps(class_names)


def read_metadata(graph: ir.Model) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """What :func:`write_metadata` kept; None for what it didn't."""
    known, names = (graph.metadata_props.get(key) for key in (_PREPROCESSING, _CLASS_NAMES))
    return (
        Preprocessing.from_json(json.loads(known), "the file's metadata") if known else None,
        tuple(json.loads(names)) if names else None,
    )
