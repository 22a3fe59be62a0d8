"""Torch convolutions that a Batch Norm was fused into: find them, give it back.

What :mod:`bnpatch.onnx.fused_conv` does for graphs, for models that were fused or re-parameterized in torch
(timm's RepVGG, MobileOne, FastViT; ``torch.nn.utils.fusion``): the output of such a convolution is that of a
virtual Batch Norm whose running moments, scale and shift are the moments of that output.

The virtual norm is a child of its convolution, called after it by a hook. It has no state of its own in the
state dict, and as a norm layer it is like any other, by the name that it has in an export of the model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import Moments
from bnpatch.nn.hooks import at_inputs, at_outputs
from bnpatch.nn.surgery import inventory

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class VirtualNorm(nn.Module):
    """A Batch Norm that is the identity: its scale and shift undo what its running moments do.

    Args:
        moments: mean and variance of its input, each of shape (C,).
        eps: added to the variance; keeps channels that are constant from being divided by 0.
    """

    def __init__(self, moments: Moments[Tensor], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        parts = {"running_mean": moments.mean, "running_var": moments.var}
        parts |= {"weight": (moments.var + eps).sqrt(), "bias": moments.mean}
        for name, part in parts.items():  # not persistent: what was found on data belongs in a recipe
            self.register_buffer(name, part.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input as it is."""
        return x


def find_fused_convs(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Names of convolutions that a Batch Norm may have been fused into; looks only.

    Those have a bias, which convolutions of most architectures with Batch Norm do not have of their own, no
    norm after them, and more than one value per channel (unlike squeeze and excite). A convolution that is
    recovered already is none; nor is one that embeds patches in a model with Layer Norm (a transformer).

    Args:
        model: in evaluation mode.
        run: runs it on one input.
    """
    found = inventory(model)
    names = [norm_layer.name for norm_layer in found.norm_layers] + [
        left.name for left in found.skipped_norms
    ]
    norms = {name: model.get_submodule(name) for name in names}
    convolutions = {name: m for name, m in model.named_modules() if _may_be_folded(m)}
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        convolutions = {name: m for name, m in convolutions.items() if not _embeds_patches(m)}
    outputs: dict[str, list[Tensor]] = {}
    normalized: list[Tensor] = []  # held, so that no other tensor gets the address
    with (
        at_outputs(convolutions, lambda name, y: outputs.setdefault(name, []).append(y)),
        at_inputs(norms, lambda name, x: normalized.append(x)),
    ):
        run()
    taken = {id(x) for x in normalized}
    return tuple(
        name
        for name, ys in outputs.items()
        if any(y.shape[2:].numel() > 1 for y in ys) and not any(id(y) in taken for y in ys)
    )


def recover(model: nn.Module, moments: Mapping[str, Moments[Tensor]]) -> None:
    """Put a virtual norm after each of the convolutions named, in place; the model computes what it did.

    Args:
        model: any module.
        moments: mean and variance (C,) of the output of each convolution, by the convolution's name.
    """
    for name, part in moments.items():
        convolution = model.get_submodule(name)
        if _child(convolution) is None:
            convolution.register_forward_hook(_then_normalize)
        convolution.add_module(FUSED.removeprefix("."), VirtualNorm(part))


def is_convolution(model: nn.Module, name: str) -> bool:
    """Does the model have a convolution of this name, with a bias?"""
    module = dict(model.named_modules()).get(name)
    return isinstance(module, _CONVOLUTIONS) and module.bias is not None


def _may_be_folded(module: nn.Module) -> bool:
    is_plain = type(module) in _CONVOLUTIONS and _child(module) is None
    return is_plain and isinstance(bias := module.bias, Tensor) and bool(torch.any(bias != 0))


def _embeds_patches(module: nn.Module) -> bool:
    """Does it take patches that do not overlap?"""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return module.kernel_size == module.stride and math.prod(module.stride) > 1


def _child(convolution: nn.Module) -> nn.Module | None:
    return convolution._modules.get(FUSED.removeprefix("."))


def _then_normalize(convolution: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
    """The hook: a function of the module, so that copies and pickles of a model have it as well."""
    norm = _child(convolution)
    return output if norm is None else norm(output)
