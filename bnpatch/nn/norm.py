"""The patched layer at inference: it normalizes by a mixture of example and running statistics."""

import warnings
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bnpatch.core.errors import BnpatchError, BnpatchWarning, check_weight
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.patch import BESIDE_ALPHA
from bnpatch.nn.functional import has_single_values, weighted_norm

# The attributes that the layer adds to the state of the module that it takes over.
_OWN_STATE = (
    "origin_class",
    "_version",  # version of the state-dict layout; the original's
    "always_inference",
    "channels_per_group",
    "include_1x1",
    "baseline_alpha",
    "_alpha",
    "_slope",
    "_var_offset",
    "_is_baseline",
    "_is_constant",
    "_is_shared",
    "_running",
)

_WEIGHTS = ("alpha", *BESIDE_ALPHA)

# Earlier names of such attributes, which pickled models may have.
_FORMER_NAMES = {
    "weigh_single_values": "include_1x1",
    "identity": "baseline_alpha",
    "_is_identity": "_is_baseline",
}


class ExampleWeightedNorm(nn.Module):
    """Normalizes each example at inference by a mixture of its own and the running statistics.

    The example's own moments have the weight ``alpha``, the running ones ``1 - alpha`` (Summers & Dinneen
    2020, Eq. 3). With a :attr:`slope`, the weight grows or falls with the distance of the example's moments
    from the running ones. With a :attr:`var_offset`, the variance has another weight than the mean. The
    output of an example does not depend on the rest of the batch.

    ``alpha = 0`` is Batch Norm. ``alpha = 1`` is Group Norm, if the channels of a group are pooled. A layer
    that was Group Norm therefore computes the same as before at ``alpha = 1``; its running statistics come
    from data, see :attr:`running`.

    The layer *is* the module that it replaces, under another class: both share one ``__dict__``, and with it
    every parameter, buffer, submodule, hook, flag and state-dict key. The original class still does training
    steps and inference at the :attr:`baseline_alpha`, so these give the original's result bit for bit.

    Make one with :meth:`take_over`; :func:`bnpatch.patch` does so for a whole model:

        >>> layer = ExampleWeightedNorm.take_over(nn.BatchNorm2d(8).eval(), alpha=0.1)
        >>> layer(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])

    Attributes:
        origin_class: the class of the module that was replaced.
        always_inference: the original normalizes by its running statistics in training too (frozen).
        channels_per_group: number of consecutive channels whose moments are pooled; 1 is Batch Norm.
        baseline_alpha: the alpha at which the layer computes what the original did: 0 for Batch Norm, 1 for
            Group Norm.
        include_1x1: also weight the example where it has one value per channel (``(N, C)`` or 1 x 1 maps).
            Such an example has no variance, so the formula mostly shrinks the signal. By default these
            inputs get the original's inference, unless a Batch/Group Norm pools channels.
    """

    origin_class: type[nn.Module]
    always_inference: bool
    channels_per_group: int
    include_1x1: bool
    baseline_alpha: float
    eps: float
    _alpha: Tensor
    _slope: Tensor
    _var_offset: Tensor
    _is_baseline: bool
    _is_constant: bool  # every example gets the same weight
    _is_shared: bool  # mean and variance of an example get the same weight
    _running: Moments[Tensor] | None

    @classmethod
    def take_over(
        cls,
        origin: nn.Module,
        alpha: float | Tensor | ExampleWeight = 0.0,
        *,
        always_inference: bool = False,
        channels_per_group: int = 1,
        baseline_alpha: float = 0.0,
        running: Moments[Tensor] | None = None,
        include_1x1: bool = False,
    ) -> "ExampleWeightedNorm":
        """Make a layer that replaces ``origin`` and shares its state. Don't use ``origin`` afterwards.

        Args:
            origin: a module with ``eps``, and ``running_mean``, ``running_var``, ``weight`` and ``bias`` of
                shape (C,) or None. If it has ``drop`` and ``act``, the layer applies them after the
                normalization, in this order.
            alpha: see :attr:`alpha`; or alpha, slope and offset as an ``ExampleWeight``.
            always_inference: see the class.
            channels_per_group: see the class; must divide C.
            baseline_alpha: see the class.
            running: see :attr:`running`; required if ``origin`` has no running statistics.
            include_1x1: see the class.

        Raises:
            InvalidWeightError: alpha is not in [0, 1], slope not in [-4, 4] or var_offset not in [-8, 8].
        """
        layer = cls.__new__(cls)
        layer.__dict__ = origin.__dict__
        layer.__dict__.update(
            origin_class=type(origin),
            _version=type(origin)._version,
            always_inference=always_inference,
            channels_per_group=channels_per_group,
            baseline_alpha=baseline_alpha,
            include_1x1=include_1x1,
            _running=running,
        )
        layer.set_weights(**ExampleWeight.of(alpha)._asdict())
        return layer

    def as_origin(self) -> nn.Module:
        """Return a module of the original class that shares the state of this layer."""
        origin = self.origin_class.__new__(self.origin_class)
        origin.__dict__ = self.__dict__
        return origin

    def give_back(self) -> nn.Module:
        """Undo :meth:`take_over` and return the original module. Don't use this layer afterwards."""
        origin = self.as_origin()
        for name in _OWN_STATE:
            del origin.__dict__[name]
        return origin

    @property
    def alpha(self) -> float | Tensor:
        """The weight of the example, in [0, 1]; at :attr:`baseline_alpha` the layer computes as the original.

        Set a number, or a 0-dim tensor that requires grad in order to learn it. The layer keeps the number
        as a CPU tensor that is no buffer. Such a tensor combines with tensors of any device without a copy
        or a synchronization, ``.half()`` can't round it, and a compiled model need not recompile for it.
        """
        return _number_or_learned(self._alpha)

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        self.set_weights(alpha=value)

    @property
    def slope(self) -> float | Tensor:
        """How much the weight depends on the distance of the example, in [-4, 4]; 0 for not at all.

        :attr:`alpha` is the weight of an example at distance 1; see
        :class:`~bnpatch.core.moments.ExampleWeight`. Where alpha is 0 or 1, the slope changes nothing.
        Set a number or a tensor to learn it, as for :attr:`alpha`:

            >>> layer = ExampleWeightedNorm.take_over(nn.BatchNorm2d(8).eval(), alpha=0.1)
            >>> layer.slope = torch.tensor(0.0, requires_grad=True)
            >>> layer(torch.randn(2, 8, 4, 4)).square().sum().backward()
            >>> layer.slope.grad is not None
            True

        """
        return _number_or_learned(self._slope)

    @slope.setter
    def slope(self, value: float | Tensor) -> None:
        self.set_weights(slope=value)

    @property
    def var_offset(self) -> float | Tensor:
        """How much larger the weight of the example's variance is than that of its mean, in [-8, 8].

        It is added to the logit of the weight, for the variance alone; see
        :class:`~bnpatch.core.moments.ExampleWeight`. With 0, both have the same weight. Where alpha is 0 or
        1, it changes nothing. Set a number or a tensor to learn it, as for :attr:`alpha`.
        """
        return _number_or_learned(self._var_offset)

    @var_offset.setter
    def var_offset(self, value: float | Tensor) -> None:
        self.set_weights(var_offset=value)

    @property
    def example_weight(self) -> ExampleWeight:
        """Alpha, slope and offset as one value."""
        return ExampleWeight(self.alpha, self.slope, self.var_offset)

    def set_weights(self, **weights: float | Tensor) -> None:
        """Set some of ``alpha``, ``slope`` and ``var_offset``."""
        for name, value in weights.items():
            checked = value if _is_learned(value) else _on_host(check_weight(name, float(value)))
            self.__dict__[f"_{name}"] = checked
        number = None if _is_learned(self._alpha) else float(self._alpha)
        is_end = number in (0, 1)  # no slope and no offset changes these weights
        self.__dict__["_is_baseline"] = number == self.baseline_alpha
        self.__dict__["_is_constant"] = is_end or _is_zero(self._slope)
        self.__dict__["_is_shared"] = is_end or _is_zero(self._var_offset)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*_WEIGHTS, "running"):  # nn.Module would register a Parameter, past the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def running(self) -> Moments[Tensor] | None:
        """Running mean and variance, each of shape (C,), that replace those in the buffers; or None.

        They move with the layer to another device. They are not in its state dict, because values found on
        data belong in a recipe. Gradients flow to them if they require grad.
        """
        return self._running

    @running.setter
    def running(self, moments: Moments[Tensor] | None) -> None:
        self.__dict__["_running"] = moments

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {_FORMER_NAMES.get(name, name): value for name, value in state.items()}
        # A model that was pickled before there were slopes or offsets has none.
        former = {
            "_slope": _on_host(0.0),
            "_is_constant": True,
            "_var_offset": _on_host(0.0),
            "_is_shared": True,
        }
        super().__setstate__(former | state)  # type: ignore[no-untyped-call]

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
        """The running variance. Reading it warns if the layer computes otherwise than the original.

        Code that fuses or re-parameterizes a layer reads this attribute, and the fused layer has no alpha.
        """
        if not self._is_baseline or (self._running is not None and self.baseline_alpha == 0):
            warnings.warn(
                "the running variance of a patched layer was read: if that was to fuse the layer, its alpha "
                "is lost; call bnpatch.unpatch first, or fuse before patching",
                BnpatchWarning,
                stacklevel=2,
            )
        return self.parameters_of_norm()[3]

    def parameters_of_norm(self) -> tuple[Tensor | None, ...]:
        """Gamma, beta, running mean and running variance of the original, None for those that it lacks."""
        state = {**self._parameters, **self._buffers}
        return tuple(state.get(name) for name in ("weight", "bias", "running_mean", "running_var"))

    def _moments(self) -> Moments[Tensor]:
        """Return the running statistics that the layer uses: :attr:`running`, else the buffers."""
        if self._running is not None:
            return self._running
        _, _, mean, var = self.parameters_of_norm()
        assert mean is not None  # otherwise take_over was given running statistics
        assert var is not None
        return Moments(mean, var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, *spatial), then apply ``drop`` and ``act`` if there are any."""
        if _is_traced(x):
            raise BnpatchError(
                "torch.fx can't trace a patched layer, which looks at the shapes of its input",
                "trace the model (or extract its features) before patching, and patch the result",
            )
        if self._is_plain(x):
            y: Tensor = self.as_origin().forward(x)
            return y
        self.check_input(x)
        weight, bias, *_ = self.parameters_of_norm()
        running = self._moments()
        example = self._weight_in_effect() if self.weighs(x) else 0.0
        return self.finish(
            weighted_norm(x, running, weight, bias, self.eps, example, self.channels_per_group)
        )

    def _weight_in_effect(self) -> ExampleWeight:
        """Return the weight in tensors, with the number 0 for a slope or an offset that has no effect."""
        slope = 0.0 if self._is_constant else self._slope
        return ExampleWeight(self._alpha, slope, 0.0 if self._is_shared else self._var_offset)

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise an error; ``torch.jit.script`` calls this to get a module that it can compile."""
        raise BnpatchError(
            "torch.jit.script can't compile a patched layer", "use torch.jit.trace, or torch.export"
        )

    def check_input(self, x: Tensor) -> None:
        """Raise the original's error if ``x`` has the wrong rank."""
        if check := getattr(self.origin_class, "_check_input_dim", None):
            check(self, x)

    def finish(self, y: Tensor) -> Tensor:
        """Apply what the original applies after the normalization: ``drop`` and ``act``, if it has them."""
        for tail in ("drop", "act"):
            if tail in self._modules:
                y = self._modules[tail](y)  # type: ignore[misc]
        return y

    def _is_plain(self, x: Tensor) -> bool:
        """Tell whether the original class should compute this input."""
        if self.training and not self.always_inference:
            return True
        if x.ndim < 2 or x.shape[1] != self.num_channels or not x.numel():
            return True  # the original class raises the right error, or returns the right empty output
        if self._running is not None and self.baseline_alpha == 0:
            return False  # the original would use other running statistics
        return not self.weighs(x)

    def weighs(self, x: Tensor) -> bool:
        """Tell whether the layer weights the examples of ``x`` otherwise than the original does."""
        if self._is_baseline:
            return False
        if self.include_1x1 or not has_single_values(x):
            return True
        # A single value has a variance once it is pooled with other channels; Group Norm pools them anyway.
        return self.channels_per_group > 1 and self.baseline_alpha == 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.as_origin()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show size, eps, alpha, slope and offset if they are not 0, and the class that the layer had."""
        shown = [
            f"{name}={weight if isinstance(weight, float) else 'learned'}"
            for name, weight in self.example_weight._asdict().items()
            if name == "alpha" or isinstance(weight, Tensor) or weight
        ]
        return ", ".join(
            [f"{self.num_channels}", f"eps={self.eps}", *shown, f"was {self.origin_class.__name__}"]
        )


def _is_learned(weight: float | Tensor) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.requires_grad


def _is_zero(weight: Tensor) -> bool:
    return not weight.requires_grad and float(weight) == 0


def _number_or_learned(weight: Tensor) -> float | Tensor:
    return weight if weight.requires_grad else weight.item()


def _on_host(weight: float) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not take part in a gradient later
        return torch.tensor(weight, dtype=torch.float64, device="cpu")


def _is_traced(x: object) -> bool:
    return isinstance(x, Proxy)
