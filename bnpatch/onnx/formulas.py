"""Three arrangements of the formula as ONNX nodes; ``docs/onnx-latency.md`` has their measured latencies.

The first two are the same code, :func:`bnpatch.core.moments.mix_example` on values of the graph, applied to
different inputs. The third simplifies the second for weights that are numbers:

- *direct* works on the input x, with the running statistics (rm, rv) and eps.
- *normalized* works on u = (x - rm) / sqrt(rv + eps), which a BatchNormalization node of scale 1 and bias 0
  computes. Its running statistics are (0, rho) with rho = rv / (rv + eps), and 1 - rho replaces eps.
- *fused* works on u = sqrt(alpha) * (x - rm) / sqrt(rv + eps); see :mod:`bnpatch.onnx.fused_form`.

The first two agree because an affine map of both distributions maps the mixture likewise: with
k = 1 / sqrt(rv + eps) the mixture of u has the mean k * (mean - rm) and the variance k^2 * var, hence

    (u - mean_u) / sqrt(var_u + 1 - rho) = k * (x - mean) / sqrt(k^2 * var + k^2 * eps)
                                         = (x - mean) / sqrt(var + eps)

If the input comes from a convolution, every runtime fuses that BatchNormalization into the weights, as it did
with the original. Then u costs nothing, and its moments are taken about the running mean, so they lose no
digits where ``E[x^2] - mean^2`` of x would. Elsewhere u would cost a pass over memory, and direct is faster.

For half-precision input, moments and affine map are computed in float32 (squares of values above 256 overflow
float16), and always by the direct form, because u could overflow where the running variance is tiny.
"""

from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from bnpatch.core.moments import ExampleWeight, Moments, mix_example, pool
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.fused_form import append_fused, is_accurate
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import OnnxNormLayer
from bnpatch.onnx.statistics import centred_moments, example_moments, is_blocked, normalized

Form = Literal["direct", "normalized", "fused"]

#: Operators into which a runtime can fuse a BatchNormalization that follows.
_FUSING = ("Conv", "ConvTranspose", "Gemm")


def best_form(norm_layer: OnnxNormLayer, running: Moments[Array], constant: ExampleWeight | None) -> Form:
    """Return the fastest of the forms that are accurate at this norm layer.

    Args:
        norm_layer: the norm layer.
        running: running mean and variance, each of shape (C,).
        constant: how much the example counts; None if that or the moments are values of the graph.
    """
    wide = norm_layer.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    if not wide or not np.all(running.var + norm_layer.eps > 0):
        return "direct"
    producer = norm_layer.input.producer()
    fuses = producer is not None and producer.op_type in _FUSING and len(norm_layer.input.uses()) == 1
    if not fuses or norm_layer.input.is_graph_output():
        return "direct"
    if constant is None or constant.alpha == 0 or norm_layer.channels_per_group > 1:
        return "normalized"
    return "fused" if is_accurate(constant) else "normalized"


def append_norm(
    tape: Tape,
    norm_layer: OnnxNormLayer,
    running: Moments[Array],
    weight: ExampleWeight,
    form: Form | None = None,
    *,
    given: Moments[ir.Value] | None = None,
) -> ir.Value:
    """Append the nodes that normalize by the mixture of example and running statistics (Eq. 3 of the paper).

    Args:
        tape: gets the nodes.
        norm_layer: the norm layer that the nodes replace.
        running: running mean and variance, each of shape (C,).
        weight: how much the example counts, in numbers or in scalars of the graph. A slope or an offset that
            is the number 0 appends nothing.
        form: see the module; :func:`best_form` by default.
        given: running mean and variance as float32 values of the graph, each of shape (C,), that replace
            ``running`` in the formula. The normalized form still uses ``running`` to compute u.

    Returns:
        The result, of the shape and type of the input of the norm layer.
    """
    compute = ir.DataType.DOUBLE if norm_layer.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    parts = weight
    constant = None if given or any(isinstance(part, ir.Value) for part in parts) else weight
    weight = ExampleWeight(
        *(Value(tape, w, ir.DataType.FLOAT).cast(compute) if isinstance(w, ir.Value) else w for w in parts)
    )
    running = _pooled_per_channel(running, norm_layer.channels_per_group)
    form = form or best_form(norm_layer, running, constant)
    if form == "fused":
        if constant is None or norm_layer.channels_per_group > 1:
            raise ValueError("the fused form is for constant weights and moments, and for single channels")
        return append_fused(tape, norm_layer, running, constant).value
    eps: float | Array = norm_layer.eps
    used: Moments[Any] = running
    if given is not None:
        used = Moments(*(Value(tape, v, ir.DataType.FLOAT).cast(compute) for v in (given.mean, given.var)))
    if form == "normalized":
        x = Value(tape, normalized(tape, norm_layer, running), norm_layer.dtype)
        total = running.var + norm_layer.eps
        used, eps = (
            Moments((used.mean - running.mean) * total**-0.5, used.var * (1 / total)),
            norm_layer.eps / total,
        )
    else:
        x = Value(tape, norm_layer.input, norm_layer.dtype).cast(compute)
    return _weighted_norm(x, norm_layer, used, eps, weight, form).cast(norm_layer.dtype).value


def append_batch_norm(
    tape: Tape, norm_layer: OnnxNormLayer, running: Moments[Array], given: Moments[ir.Value] | None = None
) -> ir.Value:
    """Append a BatchNormalization with other running statistics. If they are constants, runtimes can fuse it.

    Args:
        tape: gets the node.
        norm_layer: the norm layer that the node replaces.
        running: running mean and variance, each of shape (C,).
        given: float32 values of the graph that replace ``running``, for norm layers that pool no channels.
    """
    running = _pooled_per_channel(running, norm_layer.channels_per_group)
    weight, bias = (
        tape.constant(np.broadcast_to(a, norm_layer.num_channels), norm_layer.dtype)
        for a in (norm_layer.weight, norm_layer.bias)
    )
    if given is None:
        moments = [tape.constant(a, norm_layer.dtype) for a in (running.mean, running.var)]
    else:
        values = (Value(tape, v, ir.DataType.FLOAT).cast(norm_layer.dtype) for v in (given.mean, given.var))
        moments = [v.value for v in values]
    return tape.op("BatchNormalization", norm_layer.input, weight, bias, *moments, epsilon=norm_layer.eps)


def append_by_batch(tape: Tape, norm_layer: OnnxNormLayer) -> tuple[ir.Value, Moments[ir.Value]]:
    """Append the norm as it is in training: Batch Norm normalizes by the moments of the whole batch.

    Group Norm computes what it always does.

    Args:
        tape: gets the nodes.
        norm_layer: the norm layer that the nodes replace.

    Returns:
        The result; and mean and biased variance of the batch per channel, (1, C, 1, ..., 1), in float32 or
        wider.
    """
    compute = ir.DataType.DOUBLE if norm_layer.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    x = Value(tape, norm_layer.input, norm_layer.dtype).cast(compute)
    moments = centred_moments(x, (0, *range(2, len(norm_layer.dims))))
    found = Moments(moments.mean.value, moments.var.value)
    if norm_layer.baseline_alpha == 1:
        # Alpha = 1 gives the running statistics the weight 0.
        ignored = Moments(np.zeros(norm_layer.num_channels), np.ones(norm_layer.num_channels))
        return append_norm(tape, norm_layer, ignored, ExampleWeight(1.0), "direct"), found
    columns = (-1, *(1,) * (len(norm_layer.dims) - 2))
    weight, bias = (
        np.broadcast_to(v, norm_layer.num_channels).reshape(columns)
        for v in (norm_layer.weight, norm_layer.bias)
    )
    scale: Value = weight / (moments.var + norm_layer.eps).sqrt()
    return ((x - moments.mean) * scale + bias).cast(norm_layer.dtype).value, found


def _weighted_norm(
    x: Value,
    norm_layer: OnnxNormLayer,
    running: Moments[Any],
    eps: float | Array,
    weight: ExampleWeight,
    form: Form,
) -> Value:
    """Append Eq. 3 of the paper; running statistics and eps are per channel and equal within a group."""
    spatial = (1,) * (len(norm_layer.dims) - 2)
    example = example_moments(
        x, len(norm_layer.dims), blocked=form == "normalized" and is_blocked(norm_layer)
    )
    per_group = norm_layer.channels_per_group > 1
    columns = (-1, norm_layer.channels_per_group) if per_group else (-1, *spatial)
    if per_group:
        groups = (0, norm_layer.num_channels // norm_layer.channels_per_group, norm_layer.channels_per_group)
        parts = (m.reshape(groups) if isinstance(m, Value) else m for m in (example.mean, example.var))
        example = pool(Moments(*parts), axes=2)
    columned: list[Any] = [
        v.reshape(columns)
        if isinstance(v, Value)
        else np.broadcast_to(v, norm_layer.num_channels).reshape(columns)
        for v in (running.mean, running.var, norm_layer.weight, norm_layer.bias, eps)
    ]
    means, variances, weights, biases, epsilons = columned
    if per_group:  # groups of channels in rows
        epsilons = epsilons[:, :1]
        pooled = pool(Moments(means, variances), axes=1)
        means, variances = pooled.mean, pooled.var
    if isinstance(means, np.ndarray) and not means.any():
        means = 0.0  # a plain 0 needs no nodes
    mixed = mix_example(weight, example, Moments(means, variances), epsilons)
    scale: Value = weights / mixed.total.sqrt()
    shift: Value = biases - mixed.mean * scale
    if per_group:
        scale, shift = (v.reshape((0, norm_layer.num_channels, *spatial)) for v in (scale, shift))
    return x * scale + shift


def _pooled_per_channel(running: Moments[Array], channels_per_group: int) -> Moments[Array]:
    """Pool moments (C,) over groups of consecutive channels; each channel gets those of its group."""
    columns = Moments(*(v.reshape(-1, channels_per_group) for v in (running.mean, running.var)))
    pooled = pool(columns, axes=1)
    return Moments(*(np.repeat(v, channels_per_group) for v in (pooled.mean, pooled.var)))
