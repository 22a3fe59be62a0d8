"""Find the normalization layers of a torch model, and swap them for layers that weight the example.

The exact class of a layer decides. A subclass may do anything in its forward, so a class that is not in the
tables below is skipped, with a reason, unless it is seen to compute a frozen Batch Norm
(:mod:`bnpatch.nn.frozen_norm`). The tables name classes instead of importing them, so that bnpatch loads timm
and torchvision only if the model uses them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnpatch.core.errors import BnpatchError, check_weight
from bnpatch.core.inventory import CALIBRATE, NEEDS_CALIBRATION, Inventory, NormLayer, SkippedNorm
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.text import counted
from bnpatch.nn.frozen_norm import epsilon_of_frozen_norm, why_not_frozen
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.places import modules_by_name, swap

_TORCH = "torch.nn.modules"

#: Classes that normalize by running statistics at inference. The value tells whether they do in training too.
CONVERTIBLE: Mapping[str, bool] = {
    f"{_TORCH}.batchnorm.BatchNorm1d": False,
    f"{_TORCH}.batchnorm.BatchNorm2d": False,
    f"{_TORCH}.batchnorm.BatchNorm3d": False,
    f"{_TORCH}.batchnorm.SyncBatchNorm": False,
    "timm.layers.norm_act.BatchNormAct2d": False,
    "timm.layers.norm_act.SyncBatchNormAct": False,
    "timm.layers.split_batchnorm.SplitBatchNorm2d": False,
    "timm.layers.norm_act.FrozenBatchNormAct2d": True,
    "torchvision.ops.misc.FrozenBatchNorm2d": True,
    "bnpatch.nn.fused_conv.RecoveredNorm": True,
}

_OTHER_KIND = "not this kind of norm: it has no running statistics that stand for a data set"

#: Classes that become norm layers once they have running statistics from data.
GROUP_NORMS = (
    f"{_TORCH}.normalization.GroupNorm",
    "timm.layers.norm.GroupNorm",
    "timm.layers.norm.GroupNorm1",
    "timm.layers.norm_act.GroupNormAct",
    "timm.layers.norm_act.GroupNorm1Act",
    "timm.models.metaformer.GroupNorm1NoBias",
)
_INSTANCE_NORMS = tuple(f"{_TORCH}.instancenorm.InstanceNorm{d}d" for d in (1, 2, 3))
_LAZY_NORMS = tuple(f"{_TORCH}.batchnorm.LazyBatchNorm{d}d" for d in (1, 2, 3))

#: Classes that are recognised and skipped, with the reason.
SKIPPED: Mapping[str, str] = {
    **dict.fromkeys(_INSTANCE_NORMS, "Instance Norm normalizes by the example alone, on purpose"),
    **dict.fromkeys(_LAZY_NORMS, "not initialised yet: run one batch through the model first"),
    "timm.layers.inplace_abn.InplaceAbn": "its fused kernel rewrites its own weights",
    "timm.layers.inplace_abn.InplaceAbnSync": "its fused kernel rewrites its own weights",
    "timm.layers.layer_scale.LayerScale": _OTHER_KIND,
    "timm.layers.layer_scale.LayerScale2d": _OTHER_KIND,
    "timm.layers.std_conv.ScaledStdConv2d": "standardizes its weights, not its input",
    "timm.layers.std_conv.ScaledStdConv2dSame": "standardizes its weights, not its input",
    "timm.layers.std_conv.StdConv2d": "standardizes its weights, not its input",
    "timm.layers.std_conv.StdConv2dSame": "standardizes its weights, not its input",
}


@dataclass(frozen=True)
class TorchNormLayer:
    """A module of a model that normalizes by running statistics.

    Attributes:
        name: dotted name of the module in the model; the empty string is the model itself.
        kind: class name that the module had before any patch.
        module: the module as it is now.
        aliases: further dotted names of the same module.
    """

    name: str
    kind: str
    module: nn.Module = field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def patched(self) -> ExampleWeightedNorm | None:
        """The module if it was swapped for a layer that weights the example, else None."""
        return self.module if isinstance(self.module, ExampleWeightedNorm) else None

    @property
    def num_channels(self) -> int:
        """C, the number of channels that the layer normalizes."""
        norm: Any = self.module
        return int(norm.running_mean.numel()) if self.patched is None else self.patched.num_channels

    @property
    def baseline_alpha(self) -> float:
        """The alpha at which the layer computes as before any patch: 0 for Batch Norm, 1 for Group Norm."""
        return 0.0 if self.patched is None else self.patched.baseline_alpha

    @property
    def channels_per_group(self) -> int:
        """Number of consecutive channels whose moments are pooled; 1 is Batch Norm."""
        return 1 if self.patched is None else self.patched.channels_per_group

    @property
    def alpha(self) -> float:
        """The weight of the example, in [0, 1]; 0 if the layer is not patched."""
        return float(self.example_weight.alpha)

    @property
    def example_weight(self) -> ExampleWeight:
        """Alpha, slope and offset as numbers; all are 0 if the layer is not patched."""
        used = ExampleWeight(0.0) if self.patched is None else self.patched.example_weight
        return ExampleWeight(*(w.item() if isinstance(w, Tensor) else w for w in used))

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Gamma, beta, running mean and running variance of the original, None for those that it lacks."""
        norm: Any = self.module
        if self.patched is not None:
            return self.patched.parameters_of_norm()
        return norm.weight, norm.bias, norm.running_mean, norm.running_var


def inventory(model: nn.Module) -> Inventory[TorchNormLayer]:
    """List the norm layers of a model, and the normalization layers that bnpatch skips, with reasons.

    The model is not changed; it may be patched already:

        >>> found = inventory(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(4)))
        >>> [layer.name for layer in found.norm_layers], [norm.kind for norm in found.skipped_norms]
        (['1'], ['LayerNorm'])
    """
    norm_layers: list[TorchNormLayer] = []
    skipped_norms: list[SkippedNorm] = []
    inside: list[str] = []  # prefixes of the names that modules inside norm layers have (auxiliary norms)
    for module, (name, *aliases) in modules_by_name(model):
        found = _classified(module, name, tuple(aliases))
        if isinstance(found, TorchNormLayer) and name.startswith(tuple(inside)):
            reason = "belongs to another norm, which does not use it at inference"
            found = SkippedNorm(name, found.kind, reason)
        if isinstance(found, TorchNormLayer):
            norm_layers.append(found)
            inside.append(f"{name}." if name else "")
        elif found is not None:
            skipped_norms.append(found)
    return Inventory(tuple(norm_layers), tuple(skipped_norms))


def patch(
    model: nn.Module,
    alpha: float | Mapping[str, float] = 0.0,
    *,
    where: Callable[[TorchNormLayer], bool] = lambda norm_layer: True,
    include_1x1: bool | None = None,
    slope: float | Mapping[str, float] | None = None,
    var_offset: float | Mapping[str, float] | None = None,
) -> nn.Module:
    """Swap the norm layers of a model, in place, for layers that weight the example at inference.

    Weights, hooks, submodules, state-dict keys, flags and training stay as they are. At the baseline
    (``alpha = 0``; for Group Norm ``alpha = 1``) a layer computes as before, bit for bit. Patching a
    patched model sets new weights. Group Norm can be patched once it has running statistics, see
    :func:`bnpatch.calibrate`. What looks for torch's Batch Norm by its class, such as
    ``torch.optim.swa_utils.update_bn``, doesn't find patched layers: unpatch the model before.

        >>> model = patch(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), alpha=0.02)
        >>> model = patch(model, alpha=0.1, slope=0.5)  # more weight for examples that are far away

    Args:
        model: any module; it may itself be a norm.
        alpha: the weight of the example, in [0, 1]: a number for all norm layers, or a mapping by name of
            norm layer. Layers that the mapping does not name keep their alpha, which is 0 at first.
        where: a function that tells which norm layers to patch.
        include_1x1: also weight examples with one value per channel (see
            :class:`~bnpatch.nn.norm.ExampleWeightedNorm`); None keeps the setting of patched layers.
        slope: how much the weight depends on the distance of the example, in [-4, 4], see
            :attr:`bnpatch.ExampleWeightedNorm.slope`: a number or a mapping, as for ``alpha``. Layers that it
            does not name keep their slope, which is 0 at first; None names none.
        var_offset: how much larger the weight of the example's variance is than that of its mean, in [-8, 8],
            see :attr:`bnpatch.ExampleWeightedNorm.var_offset`: a number or a mapping, as for ``slope``.

    Returns:
        The model; it is another object only if the model itself is a norm.

    Raises:
        BnpatchError: there is no norm layer to patch, or a mapping names one that doesn't exist.
        InvalidWeightError: a weight is out of its range.
    """
    found = inventory(model)
    norm_layers = [norm_layer for norm_layer in found.norm_layers if where(norm_layer)]
    if not norm_layers:
        raise BnpatchError(*_nothing_to_patch(model, found))
    weights: dict[str, dict[str, Any]] = {norm_layer.name: {} for norm_layer in norm_layers}
    for kind, given in {"alpha": alpha, "slope": slope, "var_offset": var_offset}.items():
        for name, value in _by_name(kind, {} if given is None else given, norm_layers, found).items():
            weights[name][kind] = value
    swaps: dict[int, nn.Module] = {}
    for norm_layer in norm_layers:
        if (layer := norm_layer.patched) is not None:
            layer.set_weights(**weights[norm_layer.name])
            if include_1x1 is not None:
                layer.include_1x1 = include_1x1
        else:
            swaps[id(norm_layer.module)] = ExampleWeightedNorm.take_over(
                norm_layer.module,
                ExampleWeight(**{"alpha": 0.0, **weights[norm_layer.name]}),
                always_inference=CONVERTIBLE.get(_qualified_name(type(norm_layer.module)), True),
                include_1x1=bool(include_1x1),
            )
    return swap(model, swaps)


def patched_layers(model: nn.Module) -> dict[str, ExampleWeightedNorm]:
    """Return, by name, the norm layers that were swapped for layers that weight the example."""
    layers = ((norm_layer.name, norm_layer.patched) for norm_layer in inventory(model).norm_layers)
    return {name: layer for name, layer in layers if layer is not None}


def uncalibrated(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the norms that become norm layers once they have running statistics.

    These are Group Norm, and Batch Norm that keeps no running statistics.
    """
    modules = dict(model.named_modules())
    return {norm.name: modules[norm.name] for norm in inventory(model).skipped_norms if norm.is_uncalibrated}


def calibrated(model: nn.Module, moments: Mapping[str, Moments[Tensor]]) -> nn.Module:
    """Give running statistics to norms that have none, in place, which makes them norm layers.

    Group Norm still computes the same. A Batch Norm without running statistics normalized by those of the
    batch, which no layer that treats examples separately can reproduce; it gets the running statistics that
    it never kept, and alpha = 0.

    Args:
        model: any module.
        moments: by name of module, running mean and variance, each of shape (C,); see :func:`uncalibrated`.

    Returns:
        The model; it is another object only if the model itself is a norm.

    Raises:
        BnpatchError: a name is not one of :func:`uncalibrated`.
    """
    norms = uncalibrated(model)
    if unknown := [name for name in moments if name not in norms]:
        raise BnpatchError(f"the model has no norm {unknown[0]!r} to calibrate", "calibrate it again")
    swaps: dict[int, nn.Module] = {}
    for name, running in moments.items():
        norm: Any = norms[name]
        of_group_norm: dict[str, Any] = {}
        if (groups := getattr(norm, "num_groups", None)) is not None:
            per_group = norm.num_channels // groups
            of_group_norm = {"alpha": 1.0, "baseline_alpha": 1.0, "channels_per_group": per_group}
        swaps[id(norm)] = ExampleWeightedNorm.take_over(norm, running=running, **of_group_norm)
    return swap(model, swaps)


def unpatch(
    model: nn.Module, *, where: Callable[[TorchNormLayer], bool] = lambda norm_layer: True
) -> nn.Module:
    """Undo :func:`patch`, in place: every layer gets its original class back.

    Args:
        model: any module.
        where: a function that tells which norm layers to unpatch.

    Returns:
        The model; it is another object only if the model itself is a norm.
    """
    layers = [norm_layer.patched for norm_layer in inventory(model).norm_layers if where(norm_layer)]
    return swap(model, {id(layer): layer.give_back() for layer in layers if layer is not None})


def _classified(module: Any, name: str, aliases: tuple[str, ...]) -> TorchNormLayer | SkippedNorm | None:
    """Return a norm layer, a skipped norm with the reason, or None for a module that is no norm."""
    if isinstance(module, ExampleWeightedNorm):
        return TorchNormLayer(name, module.origin_class.__name__, module, aliases)
    kind, qualified_name = type(module).__name__, _qualified_name(type(module))
    if qualified_name in SKIPPED:
        return SkippedNorm(name, kind, SKIPPED[qualified_name])
    is_group_norm = qualified_name in GROUP_NORMS
    if not is_group_norm and qualified_name not in CONVERTIBLE:
        eps = epsilon_of_frozen_norm(module)
        if eps is None:
            reason = _why_skipped(module)
            return None if reason is None else SkippedNorm(name, kind, reason)
        module.eps = eps  # some have it in their code alone
    if is_group_norm or module.running_mean is None or module.running_var is None:
        return SkippedNorm(name, kind, NEEDS_CALIBRATION, is_uncalibrated=True)
    if "forward" in vars(module):
        return SkippedNorm(name, kind, "its forward was replaced on the instance, by a hooks library perhaps")
    return TorchNormLayer(name, kind, module, aliases)


def _why_skipped(module: nn.Module) -> str | None:
    """Return why a module of an unknown class is skipped, or None if it is no norm."""
    if script_name := getattr(module, "original_name", None):  # TorchScript hides the Python class
        reason = "compiled by TorchScript: patch the Python model before scripting it"
        return reason if "norm" in str(script_name).lower() else None
    if isinstance(module, _BatchNorm):
        return "a subclass of Batch Norm that bnpatch does not know; its forward may differ"
    if reason := why_not_frozen(module):
        return reason
    is_norm = re.search(r"norm|affine", type(module).__name__, re.IGNORECASE)
    is_leaf = not any(True for child in module.children() for _ in child.parameters())
    return _OTHER_KIND if is_norm and is_leaf else None


def _by_name(
    kind: str,
    weight: float | Mapping[str, float],
    norm_layers: list[TorchNormLayer],
    found: Inventory[TorchNormLayer],
) -> dict[str, float]:
    if not isinstance(weight, Mapping):
        return {norm_layer.name: check_weight(kind, float(weight)) for norm_layer in norm_layers}
    names = {
        name: norm_layer.name for norm_layer in norm_layers for name in (norm_layer.name, *norm_layer.aliases)
    }
    if unknown := [name for name in weight if name not in names]:
        remedy = f"its norm layers are {_enumerate(norm_layers)}"
        if any(norm.name == unknown[0] and norm.is_uncalibrated for norm in found.skipped_norms):
            remedy = CALIBRATE
        raise BnpatchError(f"the model has no norm layer {unknown[0]!r}", remedy)
    return {names[name]: check_weight(kind, float(value), name) for name, value in weight.items()}


def _nothing_to_patch(model: nn.Module, found: Inventory[TorchNormLayer]) -> tuple[str, str]:
    # Returns the problem and the remedy.
    from bnpatch.nn.fused_conv import may_be_fused  # imported here because it imports this module

    if found.norm_layers:
        remedy = f"let where accept one of {_enumerate(found.norm_layers)}"
        return "no norm layer of the model was chosen", remedy
    if not found.skipped_norms:
        problem = "the model has no normalization layer that bnpatch could patch"
        if any(map(may_be_fused, model.modules())):
            return problem, (
                "if it had Batch Norm once, that was fused into the convolutions: patch the model from "
                "before, or add --recover-fused (bnpatch.recover_fused in Python)"
            )
        return problem, "it has neither norms nor convolutions with a bias other than 0: take another model"
    if waiting := [norm for norm in found.skipped_norms if norm.is_uncalibrated]:
        return f"the model's norms have no running statistics: {_enumerate(waiting)}", CALIBRATE
    kinds = {norm.kind: norm.reason for norm in found.skipped_norms}
    kind, reason = next(iter(kinds.items()))
    return (
        f"the model has {counted(len(found.skipped_norms), 'norm')}, and none can be patched",
        f"skipped: {kind} ({reason})" + (f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""),
    )


def _enumerate(norms: Sequence[NormLayer | SkippedNorm], most: int = 5) -> str:
    rest = f" and {len(norms) - most} more" if len(norms) > most else ""
    return ", ".join(norm.name for norm in norms[:most]) + rest


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
