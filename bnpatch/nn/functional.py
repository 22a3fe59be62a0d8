"""Normalize each example by a mixture of its own and the running statistics: the formula on tensors.

Where the example has the weight 0 and no channels are pooled, that is Batch Norm, and torch computes it.
Otherwise the final affine map has two implementations, and the memory layout decides. Both let gradients flow
to the input, to the learned scale and shift, and to what weights the example:

- contiguous (N, C, *): one ``batch_norm`` call on a (1, N * C, *) view, which needs no copy;
- channels last: one ``addcmul``, because that view would need a copy.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from bnpatch.core.moments import ExampleWeight, Mixture, Moments, is_zero, mix_example, pool

# For batch_norm, which refuses an eps of 0 in some versions of torch; 1 - _EPS + _EPS is exactly 1.
_EPS = 2.0**-20


def weighted_norm(
    x: Tensor,
    running: Moments[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float | Tensor | ExampleWeight,
    channels_per_group: int = 1,
) -> Tensor:
    """Normalize each example by a mixture of its own and the running statistics (Eq. 3 of the paper).

    The function computes moments in float32 or wider, whatever the dtype of ``x``:

        >>> x, running = torch.randn(2, 8, 4, 4), Moments(torch.zeros(8), torch.ones(8))
        >>> weighted_norm(x, running, None, None, eps=1e-5, alpha=0.1).shape
        torch.Size([2, 8, 4, 4])

    Args:
        x: input of shape (N, C, *spatial), floating point.
        running: running mean and variance, each of shape (C,).
        weight: learned scale (gamma) of shape (C,), or None for 1.
        bias: learned shift (beta) of shape (C,), or None for 0.
        eps: added to the variance.
        alpha: weight of the example, in [0, 1]; or an :class:`~bnpatch.core.moments.ExampleWeight`, which
            depends on the distance of the example. Tensors may require grad.
        channels_per_group: number of consecutive channels whose moments are pooled; must divide C.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.
    """
    example = ExampleWeight.of(alpha)
    is_batch_norm = is_zero(example.alpha) and channels_per_group == 1
    if is_batch_norm and _fits_batch_norm(x, running, weight):
        return F.batch_norm(x, running.mean, running.var, weight, bias, training=False, eps=eps)
    mixed = mixture(x, running, eps, example, channels_per_group)
    scale = torch.rsqrt(mixed.total)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mixed.mean * scale
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    return affine(x, scale, shift)


def _fits_batch_norm(x: Tensor, running: Moments[Tensor], weight: Tensor | None) -> bool:
    """Tell whether ``batch_norm`` can take these running statistics.

    It has no gradient for running statistics. It needs all parameters in one dtype: that of the input, or
    float32 for an input of half precision.
    """
    dtype, is_half = running.mean.dtype, x.dtype.itemsize == 2
    is_learned = running.mean.requires_grad or running.var.requires_grad
    is_one_dtype = weight is None or weight.dtype == dtype
    return not is_learned and is_one_dtype and (dtype == x.dtype or (is_half and dtype == torch.float32))


def mixture(
    x: Tensor,
    running: Moments[Tensor],
    eps: float,
    weight: ExampleWeight,
    channels_per_group: int = 1,
) -> Mixture:
    """Compute what :func:`weighted_norm` normalizes by, in float32 or wider: moments of shape (N, C)."""
    example = example_moments(x)
    dtype = example.mean.dtype
    if running.mean.dtype != dtype or running.var.dtype != dtype:
        running = Moments(running.mean.to(dtype), running.var.to(dtype))
    if channels_per_group > 1:
        example, running = (pool_channels(m, channels_per_group) for m in (example, running))
    arrays = _as_arrays(example.mean, example.var, running.mean, running.var)
    if arrays is None:
        return mix_example(weight, example, running, eps)
    mean, var, running_mean, running_var = arrays
    numbers = ExampleWeight(*(float(value) for value in weight))
    with np.errstate(all="ignore"):  # an input may be infinite
        mixed = mix_example(numbers, Moments(mean, var), Moments(running_mean, running_var), eps)
    return mixed._replace(mean=torch.from_numpy(mixed.mean), total=torch.from_numpy(mixed.total))


def _as_arrays(*tensors: Tensor) -> list[NDArray[Any]] | None:
    """Return plain tensors on a CPU as arrays that share their memory, in inference mode; otherwise None.

    For some hundred numbers an operation of NumPy takes half the time of one of torch. In inference mode
    torch keeps no record of operations, neither for gradients nor for forward derivatives.
    """
    # The compiler must not reach the second question, which it could not trace.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return None
    if torch.jit.is_tracing() or is_in_torch_dispatch_mode():  # type: ignore[attr-defined, no-untyped-call]
        return None
    if not all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors):
        return None
    try:
        return [tensor.numpy() for tensor in tensors]
    except RuntimeError:  # within torch.func.vmap they have no memory
        return None


def example_moments(x: Tensor) -> Moments[Tensor]:
    """Compute the moments of each channel of each example: (N, C, *spatial) to (N, C).

    The variance is ``E[x^2] - mean^2`` in float32 (float64 for float64 input), clamped at 0. On a CPU this is
    many times faster than ``torch.var_mean``, but loses digits if the mean is much larger than the standard
    deviation: the relative error of the variance is about 1e-7 * (mean / std)^2 in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if has_single_values(x):
        mean = x.flatten(1).to(dtype)
        return Moments(mean, torch.zeros_like(mean))
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    needs_gradient = torch.is_grad_enabled() and x.requires_grad and not is_traced
    mean, mean_square = _MeanAndSquare.apply(x) if needs_gradient else _mean_and_square(x)
    return Moments(mean, (mean_square - mean * mean).clamp_min(0))


def _mean_and_square(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute E[x] and E[x^2] of each channel of each example: (N, C, *spatial) to (N, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if _is_channels_last(x):
        # A sum over the middle axis of (N, S, C) reads memory in order.
        rows = x.movedim(1, -1).flatten(1, -2).to(dtype)
        return rows.sum(1) / rows.shape[1], (rows * rows).sum(1) / rows.shape[1]
    values = x.flatten(2)
    norm = torch.linalg.vector_norm(values, dim=2, dtype=dtype)
    return values.mean(2, dtype=dtype), norm.square() / values.shape[2]


class _MeanAndSquare(torch.autograd.Function):
    """:func:`_mean_and_square` with a gradient that takes one pass over the input.

    The gradient that autograd derives takes five, each with a new tensor of the size of the input.
    """

    generate_vmap_rule = True  # for torch.func.vmap of gradients

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _mean_and_square(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, mean: Tensor, mean_square: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        count = math.prod(x.shape[2:])
        return affine(x, 2 * mean_square / count, mean / count)


def pool_channels(moments: Moments[Tensor], channels_per_group: int) -> Moments[Tensor]:
    """Pool moments (..., C) over groups of consecutive channels; each channel gets those of its group."""
    shape = moments.mean.shape
    per_group = (*shape[:-1], -1, channels_per_group)
    groups = Moments(moments.mean.reshape(per_group), moments.var.reshape(per_group))
    pooled = pool(groups, axes=-1)
    return Moments(*(m.expand_as(groups.mean).reshape(shape) for m in (pooled.mean, pooled.var)))


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute ``x * scale + shift`` with coefficients (N, C), in their dtype; return it in that of ``x``."""
    if _is_channels_last(x):
        shape = (*scale.shape, *(1,) * (x.ndim - 2))
        scale, shift = scale.reshape(shape), shift.reshape(shape)
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
    n_times_c = scale.numel()
    rows = x.reshape(1, n_times_c, *x.shape[2:])
    mean, var = scale.new_zeros(n_times_c), scale.new_full((n_times_c,), 1 - _EPS)
    # With mean = 0 and var + eps = 1, batch_norm does only the multiplication and the addition.
    y = F.batch_norm(rows, mean, var, scale.reshape(-1), shift.reshape(-1), training=False, eps=_EPS)
    return y.reshape(x.shape)


def has_single_values(x: Tensor) -> bool:
    """Tell whether an example has one value per channel: (N, C), or 1 x 1 maps."""
    return math.prod(x.shape[2:]) == 1


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and not x.is_contiguous()
