"""Nodes for the statistics of an example, and for its normalization by the running ones."""

from typing import Any

import numpy as np
import onnx_ir as ir

from bnpatch.core.moments import Moments
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import OnnxNormLayer


def example_moments(x: Value, rank: int, blocked: bool = False) -> Moments[Any]:
    """Append the moments of each channel of each example, (N, C, *spatial) to (N, C, 1, ..., 1).

    The variance is ``E[x^2] - mean^2``, clamped at 0. Its relative error is about 1e-7 * (mean / std)^2 in
    float32. In onnxruntime a product and a mean are faster than ReduceSumSquare.

    Args:
        x: the values, (N, C, *spatial).
        rank: number of dimensions of ``x``.
        blocked: whether ``x`` comes from a 2d convolution in float32. onnxruntime's CPU provider leaves that
            output in its blocked layout, which GlobalAveragePool can read and ReduceMean can't.
    """
    if rank == 2:
        return Moments(x, 0.0)
    mean, mean_square = means(x, rank, blocked)
    return Moments(mean, (mean_square - mean * mean).clamp_min_0())


def means(x: Value, rank: int, blocked: bool) -> tuple[Value, Value]:
    """Append mean and mean square over the spatial axes, which stay with size 1."""
    if blocked:
        return x.global_average_pool(), (x * x).global_average_pool()
    axes = tuple(range(2, rank))
    return (x.mean(axes), (x * x).mean(axes)) if axes else (x, x * x)


def is_blocked(norm_layer: OnnxNormLayer) -> bool:
    """Tell whether the input can be in onnxruntime's blocked layout, which 2d float32 convolutions have."""
    return norm_layer.dtype == ir.DataType.FLOAT and len(norm_layer.dims) == 4


def centred_moments(x: Value, axes: tuple[int, ...]) -> Moments[Value]:
    """Append the moments over some axes, which stay with size 1, in two passes.

    Two passes lose no digits if the mean is much larger than the standard deviation. They are slower than
    :func:`example_moments`, so they serve for statistics, not in an exported model.
    """
    mean = x.mean(axes)
    centred = x - mean
    return Moments(mean, (centred * centred).mean(axes))


def normalized(
    tape: Tape, norm_layer: OnnxNormLayer, running: Moments[Array], scale: float = 1.0
) -> ir.Value:
    """Append a BatchNormalization by the running statistics, like the norm layer's node, but with bias 0."""
    scales, zeros = (
        tape.constant(np.full(norm_layer.num_channels, v), norm_layer.dtype) for v in (scale, 0.0)
    )
    moments: list[ir.Value] = []
    for own, mine, array in zip(
        norm_layer.node.inputs[3:5] or (None, None),
        (norm_layer.running_mean, norm_layer.running_var),
        (running.mean, running.var),
        strict=True,
    ):
        is_own = own is not None and mine is not None and np.array_equal(mine, array)
        moments.append(own if own is not None and is_own else tape.constant(array, norm_layer.dtype))
    attributes: dict[str, Any] = {"epsilon": norm_layer.eps}
    if norm_layer.kind == "BatchNormalization":
        attributes = {name: attribute.value for name, attribute in norm_layer.node.attributes.items()}
    return tape.op("BatchNormalization", norm_layer.input, scales, zeros, *moments, **attributes)
