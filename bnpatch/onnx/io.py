"""Read and write ONNX files.

Reading is strict. onnx-ir checks that external data files lie in the folder of the model file
(CVE-2022-25882, CVE-2024-27318 and later ones are about files outside it). It needs an absolute path for
that, because a bare file name has no folder. This module turns its errors into messages of one line.

Writing is atomic: the file is written into a temporary folder beside the target and then renamed.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, TopologicalSortPass

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import check_regular, temporary_folder
from bnpatch.core.leftovers import without_temporary
from bnpatch.core.limits import NODES
from bnpatch.onnx.inference import NORMS, check_sizes

#: A protobuf cannot be larger than 2 GiB; the tensors of a larger model go to a file beside it.
EXTERNAL_DATA_THRESHOLD = (2 << 30) - (64 << 20)  # leaves 64 MiB for everything that is no tensor

_OLDEST_OPSET = 7  # in older opsets, operators broadcast by other rules
_SMALL = 1024  # bytes; a tensor up to this size stays in the model file

# The remedy for external data that are links, as in a cache that keeps its files elsewhere.
_WITHOUT_LINKS = "copy the model and its data as plain files into one folder (cp -L)"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read a model and check it. Tensors in external files are mapped into memory, not copied.

    Nodes are sorted so that each comes after those that it reads. Some tools, such as converters to float16
    that keep the types of inputs and outputs, append nodes at the end instead.

    Calls of model-local functions that contain norms are inlined (:func:`inline_norms`).

    Raises:
        BnpatchError: the file does not exist, is not a valid ONNX model, asks for more than
            :mod:`bnpatch.core.limits` allows, needs an opset that is not supported, has sparse tensors, or
            its external data are missing, too short or outside its folder.
    """
    file = Path(os.path.abspath(path))
    proto = _read(file)
    _check_opset(file, proto)
    try:
        _check_fields(file, proto)
        count = _count_nodes(proto)
    except BnpatchError:
        raise
    except Exception as error:  # values of types that no field should have
        raise _not_valid(file, error) from error
    NODES.check(count, f"{file} has {count:,} nodes, with those of the functions that it calls")
    try:
        model = ir.from_proto(proto)
        was_sorted = not TopologicalSortPass()(model).modified
        external = [tensor for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)]
    except Exception as error:  # the library raises errors of many types for a damaged file
        raise _not_valid(file, error) from error
    _open_external_data(file, model, external)
    try:
        if was_sorted:  # the checker finds external data only if it gets the path
            onnx.checker.check_model(str(file) if external else proto)
        elif not external:
            onnx.checker.check_model(ir.to_proto(model))
        for tensor in _tensors(model):
            tensor.numpy()  # raises if there are fewer numbers than the shape says; the checker does not
        check_sizes(model)
    except BnpatchError as error:
        raise BnpatchError(f"{file}: {error.problem}", error.remedy) from error
    except Exception as error:  # ValidationError, and errors of other types in the checker itself
        raise _not_valid(file, error, external) from error
    return inline_norms(model)


def inline_norms(model: ir.Model) -> ir.Model:
    """Inline, in place, the calls of model-local functions that contain norms, at any depth.

    Raises:
        BnpatchError: a function cannot be inlined.
    """
    if not any(_contains_norm(function) for function in model.functions.values()):
        return model
    containing = {name for name, function in model.functions.items() if _contains_norm(function)}
    while True:  # add the functions that call one of these, until there are no more
        callers = {
            name
            for name, function in model.functions.items()
            if any(
                node.op_identifier() in containing for node in ir.traversal.RecursiveGraphIterator(function)
            )
        }
        if callers <= containing:
            break
        containing |= callers
    try:
        InlinePass(criteria=lambda function: function.identifier() in containing)(model)
    except Exception as error:  # the pass raises errors of many types for a function that is damaged
        raise BnpatchError(
            f"the model-local functions of the model cannot be inlined: {first_line(error)}",
            "export it again without functions, or with the model's opset in all of them",
        ) from error
    return model


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data_threshold: int = EXTERNAL_DATA_THRESHOLD,
) -> Path:
    """Write a model atomically.

    If the tensors take more bytes than the threshold, they go to the file ``<name>.data`` beside the model.

    Args:
        model: the model; it is not changed.
        path: the file to write; an existing file is replaced.
        external_data_threshold: number of bytes of tensors that the file itself may hold.

    Returns:
        The absolute path of the file.

    Raises:
        BnpatchError: the folder does not exist or cannot be written, or the model cannot be serialized.
    """
    file = Path(os.path.abspath(path))
    data_name = f"{file.name}.data"
    external = sum(tensor.nbytes for tensor in _tensors(model)) > external_data_threshold
    try:
        with temporary_folder(file.parent) as folder:
            whole = folder / file.name
            if external:
                ir.save(model, whole, format="protobuf", external_data=data_name, size_threshold_bytes=_SMALL)
            else:
                _save_in_one_file(model, whole)
            if external:
                os.replace(folder / data_name, file.parent / data_name)
            os.replace(whole, file)
    except OSError as error:
        raise BnpatchError(
            f"{without_temporary(file)} cannot be written: {error.strerror or error}", "choose another place"
        ) from error
    except Exception as error:  # a damaged model can have parts that can be read but not written
        raise BnpatchError(
            f"{without_temporary(file)} cannot be written: {first_line(error)}",
            "the original file is damaged: fetch it again",
        ) from error
    return file


def _save_in_one_file(model: ir.Model, file: Path) -> None:
    """Save a model with every tensor in the file, also tensors that are in external files now."""
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    external = [(v, v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    try:
        for value, tensor in external:
            assert tensor is not None
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        ir.save(model, file, format="protobuf")
    finally:
        for value, tensor in external:
            value.const_value = tensor


def _read(file: Path) -> onnx.ModelProto:
    try:
        check_regular(file)
        proto = onnx.load(file, format="protobuf", load_external_data=False)
    except OSError as error:  # the file does not exist, is something else, or may not be read
        reason = (error.strerror or str(error)).lower()
        raise BnpatchError(f"cannot read {file}: {reason}", "check the path") from error
    except Exception as error:  # DecodeError of google.protobuf, whose class depends on the installation
        if _is_of_torch(file):
            raise BnpatchError(
                f"{file} is a file of torch.save under another name", "give it a name that ends in .pt"
            ) from error
        raise BnpatchError(
            f"{file} is not an ONNX model, or is truncated",
            "compare its size with the source and fetch it again",
        ) from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise BnpatchError(f"{file} is not an ONNX model", "export one, with torch.onnx.export for example")
    return proto


def _is_of_torch(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) in (b"PK", b"\x80\x02")  # a zip archive, or a pickle


def _check_opset(file: Path, proto: onnx.ModelProto) -> None:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise BnpatchError(
            f"{file} does not say which opset it uses", "it holds no standard operators: nothing to patch"
        )
    if not _OLDEST_OPSET <= versions[0] <= newest:
        raise BnpatchError(
            f"{file} uses opset {versions[0]}; supported are {_OLDEST_OPSET} to {newest}",
            "convert it with onnx.version_converter" if versions[0] <= newest else "install a newer onnx",
        )


def _check_fields(file: Path, message: Any) -> None:
    """Raise an error for what protobuf or onnx-ir reads, but can't write.

    Raises:
        ValueError: a name is not UTF-8.
        BnpatchError: a tensor is sparse.
    """
    if message.DESCRIPTOR.name == "SparseTensorProto":
        raise BnpatchError(f"{file} has sparse tensors, which bnpatch would lose", "write them as dense ones")
    for field, value in message.ListFields():
        values = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_MESSAGE:
            for part in values:
                _check_fields(file, part)
        elif field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
            raise ValueError(f"its field {field.name!r} is not UTF-8 text")


def _count_nodes(proto: onnx.ModelProto) -> int:
    """Count the nodes that a graph has when all calls of functions are inlined.

    They may be far more than the file has: if each function calls the next one twice, each doubles the count.
    """
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    counts: dict[tuple[str, str, str], int | None] = {}  # None while the function is being counted

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            subgraphs = [a.g for a in node.attribute if a.HasField("g")]
            subgraphs += [graph for a in node.attribute for graph in a.graphs]
            total += 1 + sum(count(graph.node) for graph in subgraphs)
            key = (node.domain, node.op_type, node.overload)
            if key in functions:
                if key not in counts:
                    counts[key] = None
                    counts[key] = count(functions[key].node)
                inside = counts[key]
                if inside is None:
                    raise ValueError(f"function {node.op_type} calls itself")
                total += inside
        return total

    return count(proto.graph.node)


def _not_valid(file: Path, error: Exception, external: Iterable[ir.ExternalTensor] = ()) -> BnpatchError:
    remedy = "fetch or export it again"
    if any(_is_link(tensor) for tensor in external):
        remedy = f"{_WITHOUT_LINKS}, or {remedy}"
    return BnpatchError(f"{file} is not a valid ONNX model: {first_line(error)}", remedy)


def _is_link(tensor: ir.ExternalTensor) -> bool:
    """Tell whether a tensor's file is a link, as in a cache; ONNX's libraries refuse most links."""
    path = tensor.path
    return os.path.islink(path) or (os.path.exists(path) and os.stat(path).st_nlink > 1)


def _open_external_data(file: Path, model: ir.Model, tensors: list[ir.ExternalTensor]) -> None:
    for tensor in tensors:
        tensor.base_dir = file.parent
        name = f"the external data {str(tensor.location)!r} of {file}"
        try:
            check_regular(Path(tensor.path))
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            is_short = end > os.stat(tensor.path).st_size
            if not is_short:
                tensor.numpy()
        except FileNotFoundError as error:
            raise BnpatchError(f"{name} does not exist", "put it beside the model") from error
        except Exception as error:  # onnx-ir raises errors of many types, for a link for example
            raise BnpatchError(
                f"{name} cannot be used: {first_line(error)}",
                _WITHOUT_LINKS if _is_link(tensor) else "fetch it again",
            ) from error
        if is_short:
            raise BnpatchError(f"{name} is too short", "fetch it again")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for key, attribute in node.attributes.items():  # saving would not copy these into the new file
            if isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[key] = ir.AttrTensor(key, ir.Tensor(attribute.value.numpy()))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every tensor: initializers and attributes of the graph, its subgraphs and functions."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def _contains_norm(function: ir.Function) -> bool:
    return any(
        node.domain in ("", "ai.onnx") and node.op_type in NORMS
        for node in ir.traversal.RecursiveGraphIterator(function)
    )
