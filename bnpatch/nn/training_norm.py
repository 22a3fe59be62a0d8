"""The layer that trains as a NormSpec says, its formulas, and the function that converts a model to it.

:class:`GeneralNorm` trains as Batch, Ghost, Group, Instance or Batch/Group Norm, or as Batch Renorm, by
:func:`grouped_norm` and :func:`renorm`. :func:`convert_norms` puts it in the place of Batch Norm.

Whatever the layer pools, its running statistics are exponential averages of E[x] and E[x^2] of the whole
batch, stored as mean and variance like those of Batch Norm. If channels are pooled, the stored statistics are
pooled too, which is allowed because pooling and averaging commute. Any program with Batch Norm can then run a
Batch/Group Norm with alpha = 0.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments, mix, pool
from bnpatch.core.norm_spec import NormSpec, Renorm
from bnpatch.nn.functional import affine, example_moments, pool_channels
from bnpatch.nn.hooks import pooled_rows
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.places import swap
from bnpatch.nn.surgery import TorchNormLayer, inventory, patch


class GeneralNorm(ExampleWeightedNorm):
    """A layer that trains as its spec says, and weights the example in evaluation mode.

    If a group is the whole batch and no channels are pooled, the original class does the training step, so
    the result is the original's bit for bit.

    Attributes:
        spec: what the layer pools in training.
    """

    spec: NormSpec
    momentum: float | Tensor | None
    num_batches_tracked: Tensor

    @classmethod
    def of(cls, layer: ExampleWeightedNorm, spec: NormSpec) -> "GeneralNorm":
        """Make a GeneralNorm that shares the state of ``layer``; its statistics are pooled as ``spec`` says.

        Args:
            layer: a layer with buffers for running statistics. Don't use it afterwards.
            spec: what to pool; ``channels_per_group`` must divide the number of channels.
        """
        general = cls.__new__(cls)
        general.__dict__ = layer.__dict__
        general.__dict__.update(spec=spec, channels_per_group=spec.channels_per_group)
        general.alpha = spec.alpha
        running = general._moments()
        if spec.channels_per_group > 1:
            running = pool_channels(running, spec.channels_per_group)
        _store(running, general._averages())
        general.running = None  # training updates the buffers
        return general

    def give_back(self) -> nn.Module:
        """See :meth:`ExampleWeightedNorm.give_back`."""
        origin = super().give_back()
        del origin.__dict__["spec"]
        return origin

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, *spatial), then apply ``drop`` and ``act`` if there are any."""
        if not self.training or self.always_inference or self._trains_as_origin(x):
            return super().forward(x)
        self.check_input(x)
        weight, bias, *_ = self.parameters_of_norm()
        if self.spec.renorm:
            bounds = self._renorm_bounds(self.spec.renorm)
            y, batch = renorm(x, self._averages(), weight, bias, self.eps, *bounds)
        else:
            examples = self.spec.examples_per_group or len(x)
            y, batch = grouped_norm(x, weight, bias, self.eps, self.channels_per_group, examples)
        self._update_running(batch)
        return self.finish(y)

    def _trains_as_origin(self, x: Tensor) -> bool:
        if x.ndim < 2 or x.shape[1] != self.num_channels or not x.numel():
            return True  # the original class raises the right error
        if self.spec.renorm or self.channels_per_group > 1:
            return False
        return _group_sizes(len(x), self.spec.examples_per_group or len(x), joined=True) == [(len(x), 1)]

    @torch.no_grad()
    def _renorm_bounds(self, renorm: Renorm) -> tuple[Tensor | float, Tensor | float]:
        if not renorm.warmup:
            return renorm.r_max, renorm.d_max
        grown = (self.num_batches_tracked / renorm.warmup).clamp(max=1)  # stays on the device
        return 1 + grown * (renorm.r_max - 1), grown * renorm.d_max

    @torch.no_grad()
    def _update_running(self, batch: Moments[Tensor]) -> None:
        self.num_batches_tracked.add_(1)
        # Without a momentum, Batch Norm averages over all steps, each with the same weight.
        momentum = self.momentum
        if momentum is None:
            momentum = self.num_batches_tracked.to(batch.mean.dtype).reciprocal()
        averages = self._averages()
        before = Moments(averages.mean.to(batch.mean), averages.var.to(batch.var))
        _store(mix(momentum, batch, before), averages)

    def _averages(self) -> Moments[Tensor]:
        """Return the buffers that hold the running statistics."""
        mean, var = self.parameters_of_norm()[2:]
        assert mean is not None  # of() requires the buffers
        assert var is not None
        return Moments(mean, var)

    def extra_repr(self) -> str:
        """Add the spec."""
        return f"{super().extra_repr()}, trains as {self.spec}"


def grouped_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels_per_group: int,
    examples_per_group: int,
) -> tuple[Tensor, Moments[Tensor]]:
    """Normalize disjoint groups of examples and channels, each by its own moments.

    If ``examples_per_group`` does not divide the batch, the last group is smaller. A single example that is
    left over joins the group before it if channels aren't pooled; alone it would get Instance Norm.

    Args:
        x: input of shape (N, C, *spatial), floating point.
        weight: learned scale (gamma) of shape (C,), or None for 1.
        bias: learned shift (beta) of shape (C,), or None for 0.
        eps: added to the variance.
        channels_per_group: number of consecutive channels whose moments are pooled; divides C.
        examples_per_group: number of examples whose moments are pooled.

    Returns:
        The output, of the shape and dtype of ``x``; and the moments of the whole batch, of shape (C,), where
        each channel has those of its group. No gradient flows through the moments.
    """
    sizes = _group_sizes(len(x), examples_per_group, joined=channels_per_group == 1)
    # The backward pass of torch.split copies, even for a single part.
    parts = [x] if len(sizes) == 1 else torch.split(x, [size * count for size, count in sizes])
    outputs, batch, done = [], None, 0
    for (size, _), part in zip(sizes, parts, strict=True):
        if channels_per_group == 1:
            y, moments = _ghost_norm(part, weight, bias, eps, size)
        else:
            y, moments = _pooled_norm(part, weight, bias, eps, channels_per_group, size)
        outputs.append(y)
        done += len(part)
        batch = moments if batch is None else mix(len(part) / done, moments, batch)
    assert batch is not None  # a batch has at least one group
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), batch


def renorm(
    x: Tensor,
    running: Moments[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Moments[Tensor]]:
    """Apply Batch Renormalization (Ioffe 2017, Algorithm 1): Batch Norm corrected by the running statistics.

    Args:
        x: input of shape (N, C, *spatial).
        running: running mean and variance, each of shape (C,).
        weight: gamma of shape (C,), or None for 1.
        bias: beta of shape (C,), or None for 0.
        eps: added to both variances.
        r_max: the factor r of the correction is clamped to [1 / r_max, r_max].
        d_max: the shift d of the correction is clamped to [-d_max, d_max].

    Returns:
        The output, and the moments of the batch, of shape (C,).
    """
    with torch.no_grad():  # the method treats the correction as a constant in the gradient
        batch: Moments[Any] = pooled_rows(example_moments(x))
        std = (running.var.to(batch.var) + eps).sqrt()
        r = ((batch.var + eps).sqrt() / std).clamp(1 / r_max, r_max)
        d = ((batch.mean - running.mean) / std).clamp(-d_max, d_max)
    if weight is not None:
        r, d = weight * r, weight * d
    shift = d if bias is None else bias + d
    return F.batch_norm(x, None, None, r, shift, training=True, eps=eps), batch


def _group_sizes(num_examples: int, size: int, joined: bool) -> list[tuple[int, int]]:
    """Return pairs (examples per group, number of such groups): one, or two if there is a remainder.

    ``joined`` adds a remainder of one example to the last group.
    """
    count, rest = divmod(num_examples, size)
    sizes = [(size, count), (rest, 1)]
    if joined and rest == 1:
        sizes = [(size, count - 1), (size + 1, 1)] if count else [(1, 1)]
    return [(size, count) for size, count in sizes if size and count]


def _ghost_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, size: int
) -> tuple[Tensor, Moments[Tensor]]:
    """Normalize groups of examples by one ``batch_norm`` call on a view.

    In the view each group has channels of its own. A group has the examples n, n + N / size,
    n + 2 N / size, ... Channels-last memory is copied.
    """
    count, (num_channels, *spatial) = len(x) // size, x.shape[1:]
    rows = x.reshape(size, count * num_channels, *spatial)
    stats = torch.promote_types(x.dtype, torch.float32)
    # With momentum 1, batch_norm writes the moments of each group into these, at no cost.
    mean, var = (x.new_zeros(count * num_channels, dtype=stats) for _ in range(2))
    # This does what repeat does, in half the time.
    scale, shift = (None if t is None else t.expand(count, -1).reshape(-1) for t in (weight, bias))
    y = F.batch_norm(rows, mean, var, scale, shift, training=True, momentum=1.0, eps=eps)
    values = rows.numel() // rows.shape[1]
    groups = Moments(mean.view(count, -1), var.view(count, -1) * ((values - 1) / values))  # biased
    return y.reshape(x.shape), pooled_rows(groups)


def _pooled_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, channels_per_group: int, size: int
) -> tuple[Tensor, Moments[Tensor]]:
    stats = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[1], dtype=stats) if weight is None else weight
    bias = x.new_zeros(x.shape[1], dtype=stats) if bias is None else bias
    y, mean, var = _PooledNorm.apply(x, weight, bias, eps, channels_per_group, size)
    return y, Moments(mean, var)


class _PooledNorm(torch.autograd.Function):
    """Normalizes groups of examples and channels, with as many passes over memory as Batch Norm needs.

    ``batch_norm`` can't combine a scale per channel with moments per group of channels, and a second affine
    map for the scale would cost up to 0.9 of the time of the first, forward and backward. This function pools
    the moments of single examples and channels, and applies one affine map with scale and shift. In the
    backward pass ``dx`` is affine in ``dy`` and in ``x``:

        dx = rstd * (w * dy - mean(w * dy) - x^ * mean(w * dy * x^)),  x^ = (x - mean) * rstd

    The means are over the group. Only the sums of ``dy`` and of ``dy * x`` read whole tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, channels_per_group: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.groups = (size, len(x) // size, x.shape[1] // channels_per_group, channels_per_group)
        example = example_moments(x)
        parts = Moments(example.mean.view(ctx.groups), example.var.view(ctx.groups))
        group = pool(parts, (0, 3))
        mean, rstd = (
            t.expand(ctx.groups).reshape(x.shape[:2]) for t in (group.mean, (group.var + eps).rsqrt())
        )
        scale = weight.to(rstd) * rstd
        ctx.save_for_backward(x, weight, mean, rstd)
        batch = pool(group, 1)
        moments = (t.expand(1, 1, *ctx.groups[2:]).reshape(-1) for t in (batch.mean, batch.var))
        y = affine(x, scale, bias.to(rstd) - mean * scale)
        # affine returns a view. Autograd forbids in-place writes, such as ReLU(inplace=True), into a view
        # that a Function made, so this makes y a tensor of its own. Nothing else uses its memory.
        outputs = torch.ops.aten._unsafe_view(y, y.shape), *moments
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        by_channel = (len(x) * x.shape[1], -1)
        rows, d_rows = (t.reshape(by_channel).to(rstd.dtype) for t in (x, dy))
        d_shift = d_rows.sum(1).view_as(mean)
        products = torch.bmm(d_rows[:, None], rows[:, :, None]).view_as(mean)
        d_scale = (products - mean * d_shift) * rstd  # sums of dy * x^

        def over_group(sums: Tensor) -> Tensor:  # the mean of w * v over a group, from sums of v per channel
            size, _, _, channels = ctx.groups
            total = (weight.to(rstd) * sums).view(ctx.groups).sum((0, 3), keepdim=True)
            spread: Tensor = (
                (total / (size * channels * rows.shape[1])).expand(ctx.groups).reshape(mean.shape)
            )
            return spread

        # dx = of_dy * dy + of_x * x + constant
        of_x = -rstd.square() * over_group(d_scale)
        constant = -rstd * over_group(d_shift) - mean * of_x
        of_dy = (weight.to(rstd) * rstd).view(*mean.shape, *(1,) * (x.ndim - 2))
        dx = affine(x.to(rstd.dtype), of_x, constant).addcmul_(dy.to(rstd.dtype), of_dy).to(x.dtype)
        return dx, d_scale.sum(0).to(weight.dtype), d_shift.sum(0).to(weight.dtype), None, None, None


@torch.no_grad()
def _store(moments: Moments[Tensor], buffers: Moments[Tensor]) -> None:
    buffers.mean.copy_(moments.mean)
    buffers.var.copy_(moments.var)


def convert_norms(
    model: nn.Module, spec: NormSpec, *, where: Callable[[TorchNormLayer], bool] = lambda norm_layer: True
) -> nn.Module:
    """Make the Batch Norm layers of a model train as ``spec`` says, in place; scale and shift are kept.

    Layers that are frozen, or that keep no running statistics (Group Norm), stay as they are. If ``spec``
    pools channels, the activations change, so re-estimate the running statistics afterwards
    (:func:`bnpatch.finetune.moments.recalibrate`).

        >>> model = convert_norms(nn.Sequential(nn.BatchNorm2d(8)), NormSpec.ghost(16))

    Args:
        model: any module; it may be patched already.
        spec: how every norm layer trains; :meth:`NormSpec.for_channels` fits it to the layer's channels.
        where: a function that tells which norm layers to convert.

    Returns:
        The model; it is another object only if the model itself is a norm.

    Raises:
        BnpatchError: there is no norm layer, or all of them stay as they are.
    """
    model = patch(model, where=where)
    swaps: dict[int, nn.Module] = {}
    for norm_layer in inventory(model).norm_layers:
        layer = norm_layer.patched
        if layer is None or not where(norm_layer) or layer.always_inference:
            continue
        if norm_layer.parameters()[2] is not None:
            swaps[id(layer)] = GeneralNorm.of(layer, spec.for_channels(norm_layer.num_channels))
    if not swaps:
        raise BnpatchError(
            "the model's norms are all frozen or keep no running statistics: training would not change them",
            "take a checkpoint with ordinary Batch Norm",
        )
    return swap(model, swaps)
