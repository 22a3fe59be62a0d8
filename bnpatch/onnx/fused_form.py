"""The fused form of the formula as ONNX nodes, for weights that are numbers.

The *fused* form takes 8 operators on (N, C), the normalized one 13, which matters for small models. In the
normalized coordinates of :mod:`bnpatch.onnx.formulas`, with the mean m and the mean square q of the example,
``mix`` and eps give

    alpha (q - m^2) + (1 - alpha) rho + alpha (1 - alpha) m^2 + 1 - rho
        = alpha q - (alpha m)^2 + r,        r = ((1 - alpha) rv + eps) / (rv + eps)

If sqrt(alpha) is the scale of the BatchNormalization, alpha q is q_u, the mean square of u itself, and
(alpha m)^2 is alpha times m_u^2, its squared mean. With the norm layer's scale g and shift b:

    w = q_u - (alpha m_u) m_u + r,  s = (g / sqrt(alpha)) / sqrt(w),  y = u s + (b - (alpha m_u) s)

This has a difference of squares, but q_u - alpha m_u^2 >= (1 - alpha) q_u, which is far above rounding unless
alpha is near 1. For such an alpha, the normalized form is used. If the example's variance has a weight a of
its own, and alpha is that of its mean, then the scale of u is sqrt(a), and r and s have a in place of alpha.
In w the factor alpha of m_u^2 becomes 1 - alpha (1 - alpha) / a, which must not be near 1 either. y keeps
alpha.

With a slope, the weight a of an example depends on the moments of u, so the scale of u has to be 1. The fused
form then starts from the normalized coordinates and writes :class:`bnpatch.core.moments.ExampleWeight` for
them. With p = m^2, v = q - p and t = v + 1 - rho, the variance of u plus what replaces eps, with the smallest
and the largest distance d and L, and for C channels

    2 C D = sum over channels of m^2 + ln^2(t)
    h     = min(2 C D + 2 C d, 2 C (L + d)) / (2 C (L + d))
    o     = h^-slope (L + d)^-slope (1 - alpha) / alpha,  a = 1 / (1 + o)
    w     = a v + (1 - a) rho + a (1 - a) p + 1 - rho = (t + o + o (a m) m) / (1 + o)
    s     = g / sqrt(w),  y = u s + (b - (a m) s)

This adds 13 operators to the 8 on (N, C), 4 of them on (N, 1), and no pass over u: 2 C D is one sum of
squares, and h, a scaled and clipped sum, is one HardSigmoid. If the variance has a weight a' of its own, with
odds o' = o exp(-offset), then w = (t + o') / (1 + o') + o (a m) m / (1 + o). Where o, or a factor of it,
could leave the range of float32, the normalized form is used.

The operator Sigmoid would make a of its logit. onnxruntime's is exact to 1e-7 in absolute terms, and 0 where
it should be 1e-8. That is not enough: t and p are as large as the distance, which is 1e5 where the running
variance of a channel is 0, and w can be as small as 1e-6 where the example's variance is.
"""

import math

from bnpatch.core.moments import LARGEST_DISTANCE, SMALLEST_DISTANCE, ExampleWeight, Moments
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.inference import Array
from bnpatch.onnx.match import OnnxNormLayer
from bnpatch.onnx.statistics import is_blocked, means, normalized

#: The largest factor of m_u^2 in w (see above) for the fused form. Up to it, four digits are to spare.
_LARGEST_FUSED_FACTOR = 0.99

#: The largest logarithm of the odds against an example, and of their factors, for the fused form. The
#: exponential of 88.8 is infinite in float32, and an offset adds up to 8.
_LARGEST_LOG = 75.0


def is_accurate(weight: ExampleWeight) -> bool:
    """Tell whether the fused form has enough digits for this weight, whose alpha is not 0."""
    return _factor(weight) <= _LARGEST_FUSED_FACTOR and _odds_fit(weight)


def append_fused(
    tape: Tape, norm_layer: OnnxNormLayer, running: Moments[Array], example_weight: ExampleWeight
) -> Value:
    """Append the fused form, for a norm layer that pools no channels; running statistics are (C,)."""
    write = _with_slope if example_weight.slope else _without_slope
    return write(tape, norm_layer, running, example_weight)


def _odds_fit(weight: ExampleWeight) -> bool:
    """Tell whether the odds against an example, and their factors, are far from the ends of float32."""
    if not weight.slope:
        return True
    at_1 = math.log((1 - weight.alpha) / weight.alpha)
    logs = [at_1 - weight.slope * math.log(d) for d in (SMALLEST_DISTANCE, LARGEST_DISTANCE)]
    return all(abs(log) <= _LARGEST_LOG for log in (*logs, logs[0] - logs[1]))


def _factor(weight: ExampleWeight) -> float:
    """Return the factor of m_u^2 that the fused form subtracts in w; the slope does not matter."""
    mean, var = ExampleWeight(weight.alpha, var_offset=weight.var_offset).at(None)
    return float(mean.example if mean is var else 1 - mean.example * mean.rest / var.example)


def _without_slope(
    tape: Tape, norm_layer: OnnxNormLayer, running: Moments[Array], example_weight: ExampleWeight
) -> Value:
    of_mean, of_var = example_weight.at(None)
    root = of_var.example**0.5
    total = running.var + norm_layer.eps
    weight, bias, rest = (
        v.reshape(-1, *(1,) * (len(norm_layer.dims) - 2))
        for v in (
            norm_layer.weight / root,
            norm_layer.bias,
            (of_var.rest * running.var + norm_layer.eps) / total,
        )
    )
    u = Value(tape, normalized(tape, norm_layer, running, root), norm_layer.dtype)
    mean, mean_square = means(u, len(norm_layer.dims), blocked=is_blocked(norm_layer))
    scale: Value = weight / (mean_square - mean * _factor(example_weight) * mean + rest).sqrt()
    y: Value = u * scale + (bias - mean * of_mean.example * scale)
    return y


def _with_slope(
    tape: Tape, norm_layer: OnnxNormLayer, running: Moments[Array], example_weight: ExampleWeight
) -> Value:
    alpha, slope, var_offset = example_weight
    total = running.var + norm_layer.eps
    weight, bias, eps = (
        v.reshape(-1, *(1,) * (len(norm_layer.dims) - 2))
        for v in (norm_layer.weight, norm_layer.bias, norm_layer.eps / total)
    )
    u = Value(tape, normalized(tape, norm_layer, running), norm_layer.dtype)
    mean, mean_square = means(u, len(norm_layer.dims), blocked=is_blocked(norm_layer))
    square = mean * mean
    var = (mean_square - square).clamp_min_0() + eps
    largest = LARGEST_DISTANCE + SMALLEST_DISTANCE
    part = (
        mean.join(var.log(), axis=1)
        .sum_of_squares(axis=1)
        .hard_sigmoid(0.5 / (norm_layer.num_channels * largest), SMALLEST_DISTANCE / largest)
    )
    odds = part**-slope * ((1 - alpha) / alpha * largest**-slope)  # of the running statistics
    total_odds = odds + 1.0
    toward = mean / total_odds
    between = toward * mean * odds
    if var_offset:
        odds_of_var = odds * math.exp(-var_offset)
        total_var = (var + odds_of_var) / (odds_of_var + 1.0) + between / total_odds
    else:
        total_var = (var + odds + between) / total_odds
    scale: Value = weight / total_var.sqrt()
    y: Value = u * scale + (bias - toward * scale)
    return y
