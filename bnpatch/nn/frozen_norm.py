"""Recognize Batch Norm with frozen statistics that projects wrote themselves, such as that of DETR.

Such a module has tensors ``weight``, ``bias``, ``running_mean`` and ``running_var`` of one size and a forward
of its own. Its name proves nothing, so it is compared with the formula on random inputs.
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnpatch.core.inventory import SCALE_AND_SHIFT
from bnpatch.nn.hooks import in_evaluation_mode

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-12, 0.0)  # tried for modules that have no attribute eps
_ROUNDING = 1e-9  # relative, in double precision

# Inventories ask often, so each module is compared once.
_found: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def epsilon_of_frozen_norm(module: nn.Module) -> float | None:
    """Return the eps with which a module computes a frozen Batch Norm in every mode; None if it does not."""
    tensors = {**module._parameters, **module._buffers}
    parts = [tensors.get(name) for name in _TENSORS]
    if any(part is None or part.ndim != 1 for part in parts) or any(True for _ in module.children()):
        return None
    if module not in _found:
        _found[module] = _matching_eps(module)
    return _found[module]


def _matching_eps(module: nn.Module) -> float | None:
    """Return the eps with which a module computes the formula on random inputs, or None."""
    try:
        copied: Any = copy.deepcopy(module).cpu().double()
        x = _random_inputs(len(copied.weight))
        with torch.no_grad(), in_evaluation_mode(copied):
            y: Tensor = copied(x)
            in_training: Tensor = copied.train()(x)
        if not torch.equal(y, in_training):
            return None
        w, b, mean, var = (getattr(copied, name).detach().view(1, -1, 1, 1) for name in _TENSORS)
    except Exception:  # the code of a user's module may raise anything
        return None
    own = getattr(module, "eps", None)
    for eps in [own] if isinstance(own, float) else _EPSILONS:
        expected = (x - mean) * w / (var + eps).sqrt() + b
        if y.shape == x.shape and torch.allclose(y, expected, rtol=_ROUNDING, atol=_ROUNDING):
            return eps
    return None


def why_not_frozen(module: nn.Module) -> str:
    """Return why a module that normalizes by hand is skipped; "" for a module that does not."""
    tensors = {**module._parameters, **module._buffers}
    present = {name for name, tensor in tensors.items() if tensor is not None and tensor.ndim == 1}
    if any(True for _ in module.children()) or _is_of_torch(module):
        return ""
    if {"running_mean", "running_var"} <= present:
        return "normalizes by code of its own: torch's BatchNorm2d takes the same tensors and can be patched"
    return SCALE_AND_SHIFT if present == {"weight", "bias"} and _scales_and_shifts(module) else ""


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _scales_and_shifts(module: nn.Module) -> bool:
    try:
        copied: Any = copy.deepcopy(module).cpu().double()
        x = _random_inputs(len(copied.weight))
        with torch.no_grad():
            expected = x * copied.weight.view(1, -1, 1, 1) + copied.bias.view(1, -1, 1, 1)
            return torch.allclose(copied(x), expected, rtol=_ROUNDING, atol=_ROUNDING)
    except Exception:  # the code of a user's module may raise anything
        return False


def _random_inputs(channels: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=random)


def is_frozen(module: nn.Module) -> bool:
    """Tell whether a module is a frozen Batch Norm: of torchvision, of timm or of a project."""
    return _is_timms(module) or (
        not isinstance(module, _BatchNorm) and epsilon_of_frozen_norm(module) is not None
    )


def as_batch_norm(module: nn.Module) -> nn.Module:
    """Return a Batch Norm with the tensors of a frozen one; exporters recognize it.

    timm's frozen Batch Norm keeps its dropout and its activation.
    """
    frozen: Any = module
    norm: Any = nn.BatchNorm2d(len(frozen.running_mean), eps=frozen.eps)
    if _is_timms(module):
        from timm.layers.norm_act import BatchNormAct2d

        norm = BatchNormAct2d(len(frozen.running_mean), eps=frozen.eps)
        norm.drop, norm.act = frozen.drop, frozen.act
    with torch.no_grad():
        norm.weight, norm.bias = (nn.Parameter(part.detach()) for part in (frozen.weight, frozen.bias))
    norm.running_mean, norm.running_var = frozen.running_mean, frozen.running_var
    result: nn.Module = norm.eval()
    return result


def _is_timms(module: nn.Module) -> bool:
    return type(module).__name__ == "FrozenBatchNormAct2d" and type(module).__module__.startswith("timm.")
