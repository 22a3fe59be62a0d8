"""Read the state of a patch off the layers of a torch module."""

from collections.abc import Iterable

from torch import Tensor

from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.nn.fused_conv import VirtualNorm
from bnpatch.nn.surgery import TorchNormLayer


def state_of(norm_layers: Iterable[TorchNormLayer], given: PatchState) -> PatchState:
    """Return the state of the norm layers; ``given`` has the parts of the statistics that they mixed."""
    alphas: dict[str, float] = {}
    lambdas: dict[str, float] = {}
    slopes: dict[str, float] = {}
    target, running = dict(given.target), dict(given.running)
    groups: dict[str, int] = {}
    include_1x1 = given.include_1x1
    for norm in norm_layers:
        alphas[norm.name], slopes[norm.name] = norm.alpha, norm.slope
        lambdas[norm.name] = given.weights.lambdas.get(norm.name, 0.0)
        if norm.kind == VirtualNorm.__name__:
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
        else:  # what they were mixed from is not known
            target[norm.name], lambdas[norm.name] = layer.running, 1.0
    return PatchState(PatchWeights(alphas, lambdas, slopes), target, running, groups, include_1x1)


def buffers_of(norm: TorchNormLayer) -> Moments[Tensor]:
    """Return the running statistics in the buffers of a norm layer."""
    _, _, mean, var = norm.parameters()
    assert mean is not None  # callers use the running statistics of the state for norms without buffers
    assert var is not None
    return Moments(mean.detach(), var.detach())
