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

from bnpatch.core.errors import BnpatchWarning, check_alpha
from bnpatch.core.moments import Moments, mix, pool

# What the layer adds to the state of the module that it takes over.
_OWN_STATE = (
    "origin_class",
    "_version",  # of the state-dict layout: the original's
    "always_inference",
    "channels_per_group",
    "include_1x1",
    "identity",
    "_alpha",
    "_is_identity",
    "_running",
)


class ExampleWeightedNorm(nn.Module):
    """A normalization layer whose inference gives the example itself a weight.

    At inference the layer normalizes each example by the moments of a mixture, ``alpha`` parts the
    example's own and ``1 - alpha`` parts the running ones (Summers & Dinneen 2020, Eq. 3). No
    example's output depends on the rest of the batch.

    Batch Norm and Group Norm are the two ends of one scale: ``alpha = 0`` is the first, and with the
    channels of a group pooled ``alpha = 1`` is the second. A layer that was Group Norm has its identity
    there, and its running moments come from data, see :attr:`running`.

    The layer *is* the module that it replaces, under another class: both share one ``__dict__``, hence
    every parameter, buffer, submodule, hook and flag, and the state-dict keys. Whatever is not example
    weighing is done by the original class' own code: training steps, and inference at the identity,
    which is therefore the original's bit for bit.

    Make one with :meth:`take_over`; :func:`bnpatch.patch` does so for a whole model.

    Attributes:
        origin_class: the class of the module that was replaced.
        always_inference: the original normalizes by its running moments in training too (frozen).
        channels_per_group: consecutive channels whose moments are pooled; 1 is Batch Norm.
        identity: the alpha at which the layer computes what the original did: 0 for Batch Norm, 1 for
            Group Norm.
        include_1x1: weigh also where an example has one value per channel (``(N, C)`` or
            1 x 1 maps). Such an example has no variance, so the formula mostly shrinks the signal:
            by default these inputs get plain inference, unless a Batch/Group Norm pools channels.
    """

    origin_class: type[nn.Module]
    always_inference: bool
    channels_per_group: int
    include_1x1: bool
    identity: float
    eps: float
    _alpha: Tensor
    _is_identity: bool
    _running: Moments[Tensor] | None

    @classmethod
    def take_over(
        cls,
        origin: nn.Module,
        alpha: float | Tensor = 0.0,
        *,
        always_inference: bool = False,
        channels_per_group: int = 1,
        identity: float = 0.0,
        running: Moments[Tensor] | None = None,
        include_1x1: bool = False,
    ) -> "ExampleWeightedNorm":
        """Make the layer that does for ``origin`` what it did, and weighs examples besides.

        Args:
            origin: a module with ``eps``, and ``running_mean``, ``running_var``, ``weight`` and ``bias``
                of shape (C,) or None; ``drop`` and ``act``, where it has them, are applied after the
                normalization, in this order.
            alpha: see :attr:`alpha`.
            always_inference: see the class.
            channels_per_group: see the class; must divide C.
            identity: see the class.
            running: see :attr:`running`; must be given where ``origin`` has no running moments.
            include_1x1: see the class.
        """
        layer = cls.__new__(cls)
        layer.__dict__ = origin.__dict__
        layer.__dict__.update(
            origin_class=type(origin),
            _version=type(origin)._version,
            always_inference=always_inference,
            channels_per_group=channels_per_group,
            identity=identity,
            include_1x1=include_1x1,
            _running=running,
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
        """The weight of the example, in [0, 1]; at :attr:`identity` the layer is what it was.

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
        self.__dict__["_is_identity"] = not learned and float(value) == self.identity

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("alpha", "running"):  # nn.Module would register a Parameter, and never ask the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def running(self) -> Moments[Tensor] | None:
        """Running mean and variance, each of shape (C,), in the place of those in the buffers.

        None for the buffers. They move along with the layer, and are no part of its state dict: what was
        found on some data belongs in a recipe. Tensors that require grad take part in its gradients.
        """
        return self._running

    @running.setter
    def running(self, moments: Moments[Tensor] | None) -> None:
        self.__dict__["_running"] = moments

    def _apply(self, fn: Any, recurse: bool = True) -> "ExampleWeightedNorm":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._running is not None:
            self.running = Moments(fn(self._running.mean), fn(self._running.var))
        return self

    @property
    def num_channels(self) -> int:
        """C, the number of channels."""
        return self._moments().mean.numel()

    @property
    def running_var(self) -> Tensor | None:
        """The running variance; warns where an alpha would get lost.

        Code that fuses or re-parameterizes a layer reads it, and knows nothing of alpha.
        """
        if not self._is_identity or (self._running is not None and self.identity == 0):
            warnings.warn(
                "the running variance of a patched layer was read: if that was to fuse the layer, its alpha "
                "is lost; call bnpatch.unpatch first, or fuse before patching",
                BnpatchWarning,
                stacklevel=2,
            )
        return self.parameters_of_norm()[3]

    def parameters_of_norm(self) -> tuple[Tensor | None, ...]:
        """Gamma, beta, running mean and running variance of the original, None for what it does not have."""
        state = {**self._parameters, **self._buffers}
        return tuple(state.get(name) for name in ("weight", "bias", "running_mean", "running_var"))

    def _moments(self) -> Moments[Tensor]:
        """The running moments that count."""
        if self._running is not None:
            return self._running
        _, _, mean, var = self.parameters_of_norm()
        assert mean is not None  # or running moments would have been given
        assert var is not None
        return Moments(mean, var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, *spatial), then apply ``drop`` and ``act`` if there are any."""
        if self._is_plain(x):
            y: Tensor = self.as_origin().forward(x)
            return y
        self.check_input(x)
        weight, bias, *_ = self.parameters_of_norm()
        running = self._moments()
        alpha: float | Tensor = self._alpha if self.weighs(x) else 0.0
        if isinstance(alpha, float) and self.channels_per_group == 1 and _fits_batch_norm(running, weight):
            y = F.batch_norm(x, running.mean, running.var, weight, bias, training=False, eps=self.eps)
        else:
            y = weighted_norm(x, running, weight, bias, self.eps, alpha, self.channels_per_group)
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
        """Is this left to the original class?"""
        if self.training and not self.always_inference:
            return True
        if x.ndim < 2 or x.shape[1] != self.num_channels or not x.numel():
            return True  # the original class has the right error, or the right empty answer
        if self._running is not None and self.identity == 0:
            return False  # the original has other running moments
        return not self.weighs(x)

    def weighs(self, x: Tensor) -> bool:
        """Has the example a say that it did not have in the original?"""
        if self._is_identity:
            return False
        if self.include_1x1 or not _has_single_values(x):
            return True
        # Pooled with other channels a single value has a variance. Group Norm has its own already.
        return self.channels_per_group > 1 and self.identity == 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.as_origin()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show size, eps, alpha and what the layer was."""
        alpha = self.alpha if isinstance(self.alpha, float) else "learned"
        return f"{self.num_channels}, eps={self.eps}, alpha={alpha}, was {self.origin_class.__name__}"


def weighted_norm(
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


def _fits_batch_norm(running: Moments[Tensor], weight: Tensor | None) -> bool:
    """``batch_norm`` has no gradient for running moments, and takes all parameters in one dtype."""
    is_learned = running.mean.requires_grad or running.var.requires_grad
    return not is_learned and (weight is None or weight.dtype == running.mean.dtype)


def _has_single_values(x: Tensor) -> bool:
    return math.prod(x.shape[2:]) == 1


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and not x.is_contiguous()
