"""Weight decay on gamma and beta (the paper's 3.3), for any torch optimizer.

Optimizers decay toward 0, but a scale may better decay toward 1, where it does not change its input. So
scales and shifts have their own parameter groups, in which the optimizer's own decay is 0, and a hook decays
them before each step. The hook reads learning rates from the groups, so that any schedule works.

The decay has an effect only where no later norm cancels it: if another norm follows a scale on every path to
the output, the scale does not change what the network computes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.nn.surgery import inventory

# Keys of a parameter group. Optimizers keep what they don't know, and store it in their state.
_RATE, _TARGET, _COUPLED = "norm_decay", "norm_decay_toward", "norm_decay_coupled"


@dataclass(frozen=True)
class NormDecay:
    """Settings of the decay of scales and shifts.

    Attributes:
        rate: the coefficient, like ``weight_decay``.
        gamma_toward: target of the scales, 1 or 0; the paper finds no difference. Shifts decay to 0.
        coupled: True adds ``rate * (p - target)`` to the gradient, as the paper's L2 penalty does, so that
            momentum and Adam average it. False is decoupled, as in AdamW:
            ``p -= lr * rate * (p - target)``.
        norm_layers: names of the norms that decay, or "all".
    """

    rate: float
    gamma_toward: float = 1.0
    coupled: bool = True
    norm_layers: Collection[str] | Literal["all"] = "all"

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise BnpatchError(f"a weight decay of {self.rate} is none", "give 0 or more")
        if self.gamma_toward not in (0, 1):
            raise BnpatchError(f"scales don't decay toward {self.gamma_toward}", "choose 1 or 0")


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, norm_decay: NormDecay | None = None
) -> list[dict[str, Any]]:
    """Divide the parameters that require a gradient into groups for an optimizer.

    Vectors and scalars (biases, and scales and shifts that don't decay) have no weight decay, as in timm.

    Args:
        model: the model, patched or not.
        weight_decay: decay of matrices and kernels, by the optimizer itself.
        norm_decay: decay of scales and shifts, by :func:`decay_norms`.

    Raises:
        BnpatchError: ``norm_decay`` names a norm layer that the model doesn't have.
    """
    toward: dict[int, float] = {}
    if norm_decay is not None and norm_decay.rate:
        norm_layers = {norm_layer.name: norm_layer for norm_layer in inventory(model).norm_layers}
        names = list(norm_layers) if norm_decay.norm_layers == "all" else list(norm_decay.norm_layers)
        for name in names:
            if name not in norm_layers:
                raise BnpatchError(
                    f"the model has no norm layer {name!r} to decay", "see bnpatch inspect --sites"
                )
            gamma, beta, *_ = norm_layers[name].parameters()
            targets = ((gamma, norm_decay.gamma_toward), (beta, 0.0))
            toward |= {id(p): target for p, target in targets if p is not None}
    kinds: dict[tuple[float, float | None], list[Tensor]] = {}
    for p in model.parameters():
        if p.requires_grad:
            own_decay = weight_decay if p.ndim > 1 and id(p) not in toward else 0.0
            kinds.setdefault((own_decay, toward.get(id(p))), []).append(p)
    groups: list[dict[str, Any]] = []
    for (own_decay, target), params in kinds.items():
        group: dict[str, Any] = {"params": params, "weight_decay": own_decay}
        if target is not None and norm_decay is not None:
            group |= {_RATE: norm_decay.rate, _TARGET: target, _COUPLED: norm_decay.coupled}
        groups.append(group)
    return groups


def decay_norms(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer decay the scales and shifts in its groups before each step.

    Args:
        optimizer: an optimizer with the groups of :func:`parameter_groups`.
    """
    optimizer.register_step_pre_hook(_decay)


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if not (rate := group.get(_RATE)):
            continue
        for p in group["params"]:
            if p.grad is None:
                continue  # the optimizer does not change it either
            if group[_COUPLED]:
                p.grad.add_(p - group[_TARGET], alpha=rate)
            else:
                p.sub_(p - group[_TARGET], alpha=float(group["lr"]) * rate)
