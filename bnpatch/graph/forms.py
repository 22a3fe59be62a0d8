"""Arrangements of the formula as ONNX nodes; ``docs/onnx-latency.md`` has the measurement that chose.

Both arrangements are one and the same code, :func:`bnpatch.moments.mix` on the values of the graph,
seen from different coordinates:

- *direct*: on the input x, with the running moments (rm, rv) and eps.
- *normalized*: on u = (x - rm) / sqrt(rv + eps), which a BatchNormalization node of scale 1 and bias 0
  computes, with the running moments (0, rho), rho = rv / (rv + eps), and 1 - rho in the place of eps.

They agree because a mixture moves along with an affine map of everything in it: with k = 1/sqrt(rv + eps)
the mixture of u has the mean k * (mean - rm) and the variance k^2 * var, hence

    (u - mean_u) / sqrt(var_u + 1 - rho) = k * (x - mean) / sqrt(k^2 * var + k^2 * eps)
                                         = (x - mean) / sqrt(var + eps)

Where the input comes from a convolution, every runtime folds that BatchNormalization into the weights,
as it did with the original, so u is there at no cost, and its moments about the running mean lose no
digits where ``E[x^2] - mean^2`` would. Elsewhere u would cost a pass over memory, and direct is faster.

With half-precision input both moments and the map are computed in float32 (squares overflow float16
above 256), always directly: u could overflow where the running variance is tiny.
"""

from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from bnpatch.graph.constants import Array
from bnpatch.graph.expr import Tape, Value
from bnpatch.graph.match import Site
from bnpatch.moments import Moments, mix, pool

Form = Literal["direct", "normalized"]

#: Operators into which a runtime can fold a BatchNormalization that follows.
_FOLDING = ("Conv", "ConvTranspose", "Gemm")


def best_form(site: Site, running: Moments[Array]) -> Form:
    """The faster form of those that are accurate at this site."""
    wide = site.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    if not wide or not np.all(running.var + site.eps > 0):
        return "direct"
    producer = site.input.producer()
    folds = producer is not None and producer.op_type in _FOLDING and len(site.input.uses()) == 1
    return "normalized" if folds and not site.input.is_graph_output() else "direct"


def append_site(
    tape: Tape, site: Site, running: Moments[Array], alpha: float | ir.Value, form: Form | None = None
) -> ir.Value:
    """Append what replaces a site: normalization by the mixture of example and running moments.

    Args:
        tape: takes the nodes.
        site: where.
        running: running mean and variance of shape (C,).
        alpha: weight of the example, a number in [0, 1] or a scalar in the graph.
        form: see the module; :func:`best_form` by default.

    Returns:
        The result, of the shape and type of the input of the site.
    """
    compute = ir.DataType.DOUBLE if site.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    weight: Any = (
        Value(tape, alpha, ir.DataType.FLOAT).cast(compute) if isinstance(alpha, ir.Value) else alpha
    )
    running = _pooled_per_channel(running, site.channels_per_group)
    eps: float | Array = site.eps
    form = form or best_form(site, running)
    if form == "normalized":
        x = Value(tape, _batch_norm(tape, site, running), site.dtype)
        total = running.var + site.eps
        running, eps = Moments(np.zeros(site.channels), running.var / total), site.eps / total
    else:
        x = Value(tape, site.input, site.dtype).cast(compute)
    return _weighed_norm(x, site, running, eps, weight, form).cast(site.dtype).value


def _weighed_norm(
    x: Value, site: Site, running: Moments[Array], eps: float | Array, alpha: float | Value, form: Form
) -> Value:
    """Eq. 3 of the paper on graph values; running moments and eps per channel, alike within a group."""
    spatial = (1,) * (len(site.dims) - 2)
    blocked = form == "normalized" and site.dtype == ir.DataType.FLOAT and len(site.dims) == 4
    example = example_moments(x, len(site.dims), blocked)
    per_group = site.channels_per_group > 1
    columns = (-1, site.channels_per_group) if per_group else (-1, *spatial)
    if per_group:
        groups = (0, site.channels // site.channels_per_group, site.channels_per_group)
        parts = (m.reshape(groups) if isinstance(m, Value) else m for m in (example.mean, example.var))
        example = pool(Moments(*parts), axes=2)
    means, variances, weights, biases, epsilons = (
        np.broadcast_to(v, site.channels).reshape(columns)
        for v in (running.mean, running.var, site.weight, site.bias, eps)
    )
    if per_group:
        means, variances, epsilons = (v[:, :1] for v in (means, variances, epsilons))
    no_mean = not np.any(means)  # the plain number 0 costs no nodes
    moments = mix(alpha, example, Moments(0.0 if no_mean else means, variances))
    scale: Value = weights / (moments.var + epsilons).sqrt()
    shift: Value = biases - moments.mean * scale
    if per_group:
        scale, shift = (v.reshape((0, site.channels, *spatial)) for v in (scale, shift))
    return x * scale + shift


def example_moments(x: Value, rank: int, blocked: bool = False) -> Moments[Any]:
    """Moments of each channel of each example, (N, C, *spatial) to (N, C, 1, ..., 1).

    The variance is ``E[x^2] - mean^2``, clamped at 0: the relative error is about 1e-7 * (mean / std)^2
    in float32. A same-shape product and a mean are faster than ReduceSumSquare in onnxruntime.

    Args:
        x: the values, (N, C, *spatial).
        rank: number of dimensions.
        blocked: ``x`` comes from a 2d convolution in float32, which onnxruntime's CPU provider leaves in
            its blocked layout; GlobalAveragePool reads that, ReduceMean does not.
    """
    if rank == 2:
        return Moments(x, 0.0)
    axes = tuple(range(2, rank))
    mean, mean_square = (v.global_average_pool() if blocked else v.mean(axes) for v in (x, x * x))
    return Moments(mean, (mean_square - mean * mean).clamp_min_0())


def _pooled_per_channel(running: Moments[Array], channels_per_group: int) -> Moments[Array]:
    """Pool over groups of consecutive channels, and hand each channel its group's moments."""
    columns = Moments(*(v.reshape(-1, channels_per_group) for v in (running.mean, running.var)))
    pooled = pool(columns, axes=1)
    return Moments(*(np.repeat(v, channels_per_group) for v in (pooled.mean, pooled.var)))


def _batch_norm(tape: Tape, site: Site, running: Moments[Array]) -> ir.Value:
    """A BatchNormalization by the running moments alone: the site's own node, with scale 1 and bias 0."""
    ones, zeros = (tape.constant(np.full(site.channels, v), site.dtype) for v in (1.0, 0.0))
    moments: list[ir.Value] = []
    for own, mine, array in zip(
        site.node.inputs[3:5] or (None, None),
        (site.running_mean, site.running_var),
        (running.mean, running.var),
        strict=True,
    ):
        is_own = own is not None and mine is not None and np.array_equal(mine, array)
        moments.append(own if own is not None and is_own else tape.constant(array, site.dtype))
    attributes: dict[str, Any] = {"epsilon": site.eps}
    if site.kind == "BatchNormalization":
        attributes = {name: attribute.value for name, attribute in site.node.attributes.items()}
    return tape.op("BatchNormalization", site.input, ones, zeros, *moments, **attributes)
