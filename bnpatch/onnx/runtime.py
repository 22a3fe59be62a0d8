"""Read the input and output of a graph, and open a session of onnxruntime that runs it."""

import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.limits import SECONDS
from bnpatch.onnx import io
from bnpatch.onnx.inference import NORMS, infer_types

_PASSED_THROUGH = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Slice", "Gather")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Signature:
    """The input and the outputs of a graph.

    Attributes:
        input: name of the image input.
        dtype: NumPy type of the input; bytes mean that the graph normalizes images itself.
        channels_last: whether the input is (N, H, W, C).
        size: (channels, *spatial) of the input, with None for what the graph leaves open; images have
            (channels, height, width).
        batch: number of images that the graph takes at a time, None for any.
        outputs: by name of output, the operator that computes it, past those that only rearrange it.
    """

    input: str
    dtype: npt.DTypeLike
    channels_last: bool
    size: tuple[int | None, ...]
    batch: int | None
    outputs: Mapping[str, str]


def read_signature(model: ir.Model) -> Signature:
    """Read the signature of a graph.

    Raises:
        BnpatchError: the graph doesn't take one batch of images.
    """
    graph = model.graph
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        names = ", ".join(value.name or "?" for value in inputs)
        raise BnpatchError(
            f"the graph takes {len(inputs)} inputs ({names})", "give one that takes images alone"
        )
    dims = [size if isinstance(size, int) and size > 0 else None for size in (inputs[0].shape or ())]
    dtype = inputs[0].dtype
    if dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING) or (
        inputs[0].shape is not None and len(dims) not in (3, 4, 5)
    ):
        raise BnpatchError(
            f"input {inputs[0].name!r} of the graph is of type {dtype} and rank {len(dims)}",
            "give a graph that takes images (N, C, H, W), or (N, C, L) or (N, C, D, H, W)",
        )
    batch, *size = dims or [None] * 4
    channels_last = len(size) == 3 and size[2] in (1, 3) and size[0] not in (1, 3)
    return Signature(
        input=inputs[0].name or "",
        dtype=dtype.numpy(),
        channels_last=channels_last,
        size=(size[2], *size[:2]) if channels_last else tuple(size),
        batch=batch,
        outputs={value.name or "": _last_operator(value) for value in graph.outputs},
    )


def open_session(model: ir.Model, device: torch.device, threads: int | None = None) -> Any:
    """Open a session of onnxruntime for a graph. The graph may be larger than 2 GB.

    Args:
        model: the graph.
        device: cpu or cuda.
        threads: number of threads that share an operator on the CPU; None for one per core.

    Raises:
        BnpatchError: onnxruntime refuses the graph, or has no provider for the device.
    """
    import onnxruntime

    provider = _PROVIDERS.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise BnpatchError(f"this onnxruntime has no provider for {device.type}", "use --device cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal ones only: onnxruntime raises errors as well as writing them
    options.intra_op_num_threads = threads or 0
    with tempfile.TemporaryDirectory() as folder:
        path = io.save(_with_open_dimensions(model), Path(folder) / "model.onnx")
        try:
            settings = {"device_id": str(device.index)} if device.index is not None else {}
            session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's exceptions have no common class that is public
            raise BnpatchError(
                f"onnxruntime refuses the graph: {first_line(error)}",
                "export the model again with operators of the standard, or try a newer onnxruntime",
            ) from error
    loops = any(node.op_type == "Loop" for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return _TimedSession(session) if loops or model.functions else session


class _TimedSession:
    """A session that ends a run after some seconds per example, for graphs with loops that may never end.

    Args:
        session: the session of onnxruntime, which serves all other attributes.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, outputs: list[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the graph.

        Raises:
            BnpatchError: the run took longer than :data:`~bnpatch.core.limits.SECONDS` for each example.
        """
        import onnxruntime

        options = onnxruntime.RunOptions()
        seconds = SECONDS.value * max(1, len(feeds[self._input]))
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            results: list[npt.NDArray[Any]] = self._session.run(outputs, feeds, options)
        except (
            Exception
        ):  # of any type, as above; all are raised again, but for the one that the timer caused
            if options.terminate:
                SECONDS.check(math.inf, f"a loop in the graph has not ended after {seconds:g} s")
            raise
        finally:
            timer.cancel()
        return results


def learn_ranks(model: ir.Model, signature: Signature, size: Sequence[int]) -> None:
    """Run a graph on a blank input, and write into it the ranks and types of norm inputs that it leaves open.

    Shape inference ends at operators that it does not know, and at shapes that are computed at run time. The
    graph stays as it is if nothing is missing, or if it does not run.

    Args:
        model: the graph.
        signature: its signature.
        size: (channels, *spatial) of the input.
    """
    types = infer_types(model)
    inputs = [node.inputs[0] for node in model.graph if node.op_type in NORMS and node.inputs]
    unknown = {v.name: v for v in inputs if v is not None and not types[id(v)].dims and v.name}
    if not unknown:
        return
    probe = model.clone()  # with the unknown values as outputs
    values = {value.name: value for node in probe.graph for value in node.outputs}
    probe.graph.outputs.extend(values[name] for name in unknown if not values[name].is_graph_output())
    x = np.zeros((signature.batch or 1, *size), signature.dtype)
    try:
        session = open_session(probe, torch.device("cpu"))
        feed = np.ascontiguousarray(np.moveaxis(x, 1, -1) if signature.channels_last else x)
        arrays = session.run(list(unknown), {signature.input: feed})
    except Exception:  # the norms are skipped then, with the reason that their rank is not known
        return
    for value, array in zip(unknown.values(), arrays, strict=True):
        value.shape = ir.Shape([None] * array.ndim)
        value.dtype = ir.DataType.from_numpy(array.dtype)


def _with_open_dimensions(model: ir.Model) -> ir.Model:
    """Return a copy of the model whose input sizes are open where they are 0 or negative.

    Some tools write 0 or -1 for "any", but onnxruntime takes these numbers literally.
    """
    model = model.clone()
    for value in model.graph.inputs:
        if value.shape is not None and any(isinstance(size, int) and size <= 0 for size in value.shape):
            sizes = [None if isinstance(size, int) and size <= 0 else size for size in value.shape]
            value.shape = ir.Shape(sizes)
    return model


def _last_operator(value: ir.Value) -> str:
    """Return the type of the operator that computes a value, past those that only rearrange it."""
    node = value.producer()
    while node is not None and node.op_type in _PASSED_THROUGH and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.op_type if node is not None else ""
