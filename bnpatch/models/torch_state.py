"""Read the state of a patch from the layers of a torch module, and make the layers compute with a state."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import BESIDE_ALPHA, PatchState, PatchWeights, Statistics
from bnpatch.models.fingerprints import is_fused
from bnpatch.nn.fused_conv import RecoveredNorm, forget, recover
from bnpatch.nn.surgery import TorchNormLayer, calibrated, inventory, patch, unpatch

#: Returns statistics as tensors on the device of a module.
OnDevice = Callable[[Moments[Any]], Moments[Tensor]]


def make_learnable(module: nn.Module) -> None:
    """Copy, in place, tensors made in ``torch.inference_mode``, of which torch computes no gradients."""
    copies: dict[Tensor, Tensor] = {}  # tensors are equal as keys if they are the same object
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, tensor in kept.items():
                    if tensor is None or is_lazy(tensor) or not tensor.is_inference():
                        continue
                    if tensor not in copies:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        copy = tensor.clone()
                        copies[tensor] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                    kept[name] = copies[tensor]  # type: ignore[assignment]


def state_of(norm_layers: Iterable[TorchNormLayer], given: PatchState) -> PatchState:
    """Return the state of the norm layers.

    A layer has only the mixture of its own and the re-estimated statistics; ``given`` has the parts of it.
    """
    weights: dict[str, dict[str, float]] = {kind: {} for kind, _ in given.weights.kinds()}
    lambdas = weights["lambda"]
    re_estimated, running = dict(given.re_estimated), dict(given.running)
    groups: dict[str, int] = {}
    include_1x1 = given.include_1x1
    for norm in norm_layers:
        for kind in ("alpha", *BESIDE_ALPHA):
            weights[kind][norm.name] = getattr(norm.example_weight, kind)
        lambdas[norm.name] = given.weights.lambdas.get(norm.name, 0.0)
        if norm.kind == RecoveredNorm.__name__:
            running.setdefault(norm.name, buffers_of(norm))
        if (layer := norm.patched) is None:
            continue
        include_1x1 = include_1x1 or layer.include_1x1
        if norm.baseline_alpha == 0 and layer.channels_per_group > 1:
            groups[norm.name] = layer.channels_per_group
        if layer.running is None or lambdas[norm.name] or norm.name in running:
            continue
        if norm.parameters()[2] is None:
            running[norm.name] = layer.running
        else:  # the parts are not known, so the mixture counts as re-estimated, with lambda 1
            re_estimated[norm.name], lambdas[norm.name] = layer.running, 1.0
    return PatchState(PatchWeights(*weights.values()), re_estimated, running, groups, include_1x1)


def with_norm_layers(
    module: nn.Module, before: Statistics, running: Statistics, on_device: OnDevice
) -> nn.Module:
    """Make norm layers, in place, of the norms that have running statistics (own or given), and of no others.

    Args:
        module: the module.
        before: the statistics of the norms that are norm layers already and have none of their own.
        running: those of the norms that are to be norm layers.
        on_device: returns them on the device of the module.

    Returns:
        The module; it is another object only if the module itself is a norm.
    """
    if running is before:
        return module
    gone, new = before.keys() - running.keys(), running.keys() - before.keys()
    waiting = {name for name in new if not is_fused(module, name)}
    module = calibrated(module, {name: on_device(running[name]) for name in waiting})
    for name, moments in running.items():
        if is_fused(module, name) and moments is not before.get(name):
            recover(module, {name.removesuffix(FUSED): on_device(moments)})
    module = unpatch(module, where=lambda norm: norm.name in gone)
    for name in gone:
        if is_fused(module, name):
            forget(module, name.removesuffix(FUSED))
    return module


def with_state(module: nn.Module, state: PatchState, on_device: OnDevice) -> nn.Module:
    """Patch a module, in place, with a state that names every norm layer.

    Returns:
        The module; it is another object only if the module itself is a norm.
    """
    weights = state.weights
    module = patch(
        module,
        weights.alphas,
        include_1x1=state.include_1x1,
        slope=weights.slopes,
        var_offset=weights.var_offsets,
    )
    for norm in inventory(module).norm_layers:
        layer = norm.patched
        assert layer is not None  # patch() has just made it one
        if norm.baseline_alpha == 0:
            layer.channels_per_group = state.channels_per_group.get(norm.name, 1)
        source = None  # stands for the buffers, which a recovered norm layer has, too
        if norm.parameters()[2] is None:
            source = on_device(state.running[norm.name])
        if weight := weights.lambdas[norm.name]:
            source = mix(weight, on_device(state.re_estimated[norm.name]), source or buffers_of(norm))
        layer.running = source
    return module


def buffers_of(norm: TorchNormLayer) -> Moments[Tensor]:
    """Return the running statistics in the buffers of a norm layer."""
    _, _, mean, var = norm.parameters()
    assert mean is not None  # callers use the running statistics of the state for norms without buffers
    assert var is not None
    return Moments(mean.detach(), var.detach())
