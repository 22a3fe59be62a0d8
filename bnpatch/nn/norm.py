"""The general layer, at inference: normalization by a mixture of example and running moments.

Two forms of the same affine map, chosen by memory layout; both let gradients flow to the input, to
the learned scale and shift, and to alpha:

- contiguous (N, C, *): one ``batch_norm`` call on a (1, N * C, *) view, no copy;
- channels last: one ``addcmul``, since that view would copy.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnpatch.errors import BnpatchWarning, check_alpha
from bnpatch.moments import Moments, mix, pool

# What the layer adds to the state of the module that it takes over.
_OWN_STATE = (
    "origin_class",
    "_version",  # of the state-dict layout: the original's
    "always_inference",
    "channels_per_group",
    "weigh_single_values",
    "_alpha",
    "_is_identity",
)


class ExampleWeighedNorm(nn.Module):
    """A normalization layer whose inference gives the example itself a weight.

    At inference the layer normalizes each example by the moments of a mixture, ``alpha`` parts the
    example's own and ``1 - alpha`` parts the running ones (Summers & Dinneen 2020, Eq. 3). No
    example's output depends on the rest of the batch.

    The layer *is* the module that it replaces, under another class: both share one ``__dict__``, hence
    every parameter, buffer, submodule, hook and flag, and the state-dict keys. Whatever is not example
    weighing is done by the original class' own code: training steps, and inference at ``alpha = 0``,
    which is therefore the original's bit for bit.

    Make one with :meth:`take_over`; :func:`bnpatch.patch` does so for a whole model.

    Attributes:
        origin_class: the class of the module that was replaced.
        always_inference: the original normalizes by its running moments in training too (frozen).
        channels_per_group: consecutive channels whose moments are pooled; 1 is Batch Norm.
        weigh_single_values: weigh also where an example has one value per channel (``(N, C)`` or
            1 x 1 maps). Such an example has no variance, so the formula mostly shrinks the signal:
            by default these inputs get plain inference.
    """

    origin_class: type[nn.Module]
    always_inference: bool
    channels_per_group: int
    weigh_single_values: bool
    running_mean: Tensor
    eps: float
    _alpha: Tensor
    _is_identity: bool

    @classmethod
    def take_over(
        cls,
        origin: nn.Module,
        alpha: float | Tensor = 0.0,
        *,
        always_inference: bool = False,
        channels_per_group: int = 1,
        weigh_single_values: bool = False,
    ) -> "ExampleWeighedNorm":
        """Make the layer that does for ``origin`` what it did, and weighs examples besides.

        Args:
            origin: a module with ``running_mean``, ``running_var`` of shape (C,), ``eps``, and
                ``weight`` and ``bias`` of shape (C,) or None; ``drop`` and ``act``, where it has
                them, are applied after the normalization, in this order.
            alpha: see :attr:`alpha`.
            always_inference: see the class.
            channels_per_group: see the class; must divide C.
            weigh_single_values: see the class.
        """
        layer = cls.__new__(cls)
        layer.__dict__ = origin.__dict__
        layer.__dict__.update(
            origin_class=type(origin),
            _version=type(origin)._version,
            always_inference=always_inference,
            channels_per_group=channels_per_group,
            weigh_single_values=weigh_single_values,
        )
        layer.alpha = alpha
        return layer

    def as_origin(self) -> nn.Module:
        """This very layer, one shared state, under the class that it had before."""
        origin = self.origin_class.__new__(self.origin_class)
        origin.__dict__ = self.__dict__
        return origin

    def give_back(self) -> nn.Module:
        """Undo :meth:`take_over`: the module as it was. This layer must not be used afterwards."""
        origin = self.as_origin()
        for name in _OWN_STATE:
            del origin.__dict__[name]
        return origin

    @property
    def alpha(self) -> float | Tensor:
        """The weight of the example, in [0, 1]; 0 is plain inference.

        A number, or a 0-dim tensor that requires grad, to learn it. The number is held as a tensor
        on the host, not as a buffer: it mixes with tensors of any device without a copy or a
        synchronization, ``.half()`` can't round it, and a compiled model need not recompile for it.
        """
        return self._alpha if self._alpha.requires_grad else self._alpha.item()

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        learned = isinstance(value, Tensor) and value.requires_grad
        if not learned:
            with torch.inference_mode(False):  # it may be set within one, and take part in a gradient later
                value = torch.tensor(check_alpha(float(value)), dtype=torch.float64, device="cpu")
        self.__dict__["_alpha"] = value
        self.__dict__["_is_identity"] = not learned and float(value) == 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "alpha":  # nn.Module would register a Parameter, and never ask the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def running_var(self) -> Tensor:
        """The running variance; warns where an alpha would get lost.

        Code that fuses or re-parameterizes a layer reads it, and knows nothing of alpha.
        """
        if not self._is_identity:
            warnings.warn(
                "the running variance of a patched layer was read: if that was to fuse the layer, its alpha "
                "is lost; call bnpatch.unpatch first, or fuse before patching",
                BnpatchWarning,
                stacklevel=2,
            )
        var: Tensor = self.parameters_of_norm()[3]
        return var

    def parameters_of_norm(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Gamma, beta, running mean and running variance; the first two may be None, or buffers."""
        state = {**self._parameters, **self._buffers}
        mean, var = state["running_mean"], state["running_var"]
        assert mean is not None  # or it would not have been taken over
        assert var is not None
        return state.get("weight"), state.get("bias"), mean, var

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, *spatial), then apply ``drop`` and ``act`` if there are any."""
        if self._is_plain(x):
            y: Tensor = self.as_origin().forward(x)
            return y
        self.check_input(x)
        weight, bias, mean, var = self.parameters_of_norm()
        y = weighed_norm(x, Moments(mean, var), weight, bias, self.eps, self._alpha, self.channels_per_group)
        return self.finish(y)

    def check_input(self, x: Tensor) -> None:
        """Raise the original's error where ``x`` has the wrong rank."""
        if check := getattr(self.origin_class, "_check_input_dim", None):
            check(self, x)

    def finish(self, y: Tensor) -> Tensor:
        """What the original does after the normalization, if anything."""
        for tail in ("drop", "act"):
            if tail in self._modules:
                y = self._modules[tail](y)  # type: ignore[misc]
        return y

    def _is_plain(self, x: Tensor) -> bool:
        if self._is_identity or (self.training and not self.always_inference):
            return True
        if x.ndim < 2 or x.shape[1] != self.running_mean.numel() or not x.numel():
            return True  # the original class has the right error, or the right empty answer
        return _has_single_values(x) and self.channels_per_group == 1 and not self.weigh_single_values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.as_origin()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show size, eps, alpha and what the layer was."""
        alpha = self.alpha if isinstance(self.alpha, float) else "learned"
        return f"{self.running_mean.numel()}, eps={self.eps}, alpha={alpha}, was {self.origin_class.__name__}"


def weighed_norm(
    x: Tensor,
    running: Moments[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float | Tensor,
    channels_per_group: int = 1,
) -> Tensor:
    """Normalize each example by a mixture of its own and the running moments (Eq. 3 of the paper).

    Statistics are in float32 or wider, whatever the dtype of ``x``.

    Args:
        x: input of shape (N, C, *spatial), floating point.
        running: running mean and variance, each of shape (C,).
        weight: learned scale (gamma) of shape (C,), or None for 1.
        bias: learned shift (beta) of shape (C,), or None for 0.
        eps: added to the variance.
        alpha: weight of the example, in [0, 1].
        channels_per_group: consecutive channels whose moments are pooled into one.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.
    """
    example = example_moments(x)
    dtype = example.mean.dtype
    running = Moments(running.mean.to(dtype), running.var.to(dtype))
    if channels_per_group > 1:
        example, running = (_pool_channels(m, channels_per_group) for m in (example, running))
    moments = mix(alpha, example, running)
    scale = torch.rsqrt(moments.var + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -moments.mean * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    return affine(x, scale, shift)


def example_moments(x: Tensor) -> Moments[Tensor]:
    """Moments of each channel of each example: (N, C, *spatial) to (N, C).

    The variance is ``E[x^2] - mean^2`` in the dtype of the statistics (float32, or float64 for
    float64 input), clamped at 0: many times faster on a CPU than ``torch.var_mean``, at the price of
    digits where the mean is large against the standard deviation. The relative error of the variance
    is about 1e-7 * (mean / std)^2 in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if _has_single_values(x):
        mean = x.flatten(1).to(dtype)
        return Moments(mean, torch.zeros_like(mean))
    if _is_channels_last(x):
        # A sum over the middle axis of (N, S, C) reads memory in order.
        rows = x.movedim(1, -1).flatten(1, -2).to(dtype)
        mean = rows.sum(1) / rows.shape[1]
        mean_square = (rows * rows).sum(1) / rows.shape[1]
    else:
        values = x.flatten(2)
        mean = values.mean(2, dtype=dtype)
        mean_square = torch.linalg.vector_norm(values, dim=2, dtype=dtype).square() / values.shape[2]
    return Moments(mean, (mean_square - mean * mean).clamp_min(0))


def _pool_channels(moments: Moments[Tensor], channels_per_group: int) -> Moments[Tensor]:
    """Pool (..., C) over groups of consecutive channels, and hand each channel its group's moments."""
    shape = moments.mean.shape
    per_group = (*shape[:-1], -1, channels_per_group)
    groups = Moments(moments.mean.reshape(per_group), moments.var.reshape(per_group))
    pooled = pool(groups, axes=-1)
    return Moments(*(m.expand_as(groups.mean).reshape(shape) for m in (pooled.mean, pooled.var)))


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` with (N, C) coefficients, computed in their dtype, returned in that of x."""
    if _is_channels_last(x):
        shape = (*scale.shape, *(1,) * (x.ndim - 2))
        scale, shift = scale.reshape(shape), shift.reshape(shape)
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
    n_times_c = scale.numel()
    rows = x.reshape(1, n_times_c, *x.shape[2:])
    mean, var = scale.new_zeros(n_times_c), scale.new_ones(n_times_c)
    # eps = 0 and var = 1: batch_norm is left with the multiplication and the addition.
    y = F.batch_norm(rows, mean, var, scale.reshape(-1), shift.reshape(-1), training=False, eps=0.0)
    return y.reshape(x.shape)


def _has_single_values(x: Tensor) -> bool:
    return math.prod(x.shape[2:]) == 1


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and not x.is_contiguous()
