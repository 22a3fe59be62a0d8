"""Find torch convolutions that a Batch Norm was fused into, and add the Batch Norm again.

:mod:`bnpatch.onnx.fused_conv` does the same for ONNX graphs and explains why it works. The models were fused
or re-parameterized in torch (timm's RepVGG, MobileOne, FastViT; ``torch.nn.utils.fusion``). The output of
such a convolution is treated as that of a recovered Batch Norm, whose running statistics, scale and shift
follow from the moments of that output.

The recovered norm is a child module of its convolution, and a forward hook of the convolution calls it. The
norm adds nothing to the state dict. It is an ordinary norm layer, with the name that it also has in an ONNX
export.
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


class RecoveredNorm(nn.Module):
    """A Batch Norm that returns its input, because its scale and shift undo the normalization.

    Args:
        moments: mean and variance of its input, each of shape (C,). They become its running statistics.
        eps: the layer adds it to the variance, so that a constant channel is not divided by 0.
    """

    def __init__(self, moments: Moments[Tensor], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        parts = {"running_mean": moments.mean, "running_var": moments.var}
        parts |= {"weight": (moments.var + eps).sqrt(), "bias": moments.mean}
        for name, part in parts.items():  # not persistent, because values found on data belong in a recipe
            self.register_buffer(name, part.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input unchanged."""
        return x


def find_fused_convs(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Name the convolutions that a Batch Norm may have been fused into. The model is not changed.

    Such a convolution has a bias (in most architectures with Batch Norm a convolution has none of its own),
    no norm after it, and more than one value per channel in its output (unlike squeeze-and-excite). The
    function leaves out convolutions that are recovered already, and those that embed patches in a model with
    Layer Norm (a transformer).

    Args:
        model: the model, in evaluation mode.
        run: a function that runs the model on one input.
    """
    found = inventory(model)
    names = (*(norm.name for norm in found.norm_layers), *(norm.name for norm in found.skipped_norms))
    norms = {name: model.get_submodule(name) for name in names}
    convolutions = {name: m for name, m in model.named_modules() if may_be_fused(m)}
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        convolutions = {name: m for name, m in convolutions.items() if not _embeds_patches(m)}
    outputs: dict[str, list[Tensor]] = {}
    normalized: list[Tensor] = []  # keeps the tensors alive, so that no other tensor gets the same id
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
    """Put a recovered norm after each named convolution, in place. The model still computes the same.

    Args:
        model: any module.
        moments: by name of convolution, mean and variance of its output, each of shape (C,).
    """
    for name, part in moments.items():
        convolution = model.get_submodule(name)
        if _child(convolution) is None:
            convolution.register_forward_hook(_then_normalize)
        convolution.add_module(FUSED.removeprefix("."), RecoveredNorm(part))


def forget(model: nn.Module, name: str) -> None:
    """Undo :func:`recover` for the convolution of this name."""
    del model.get_submodule(name)._modules[FUSED.removeprefix(".")]


def is_convolution(model: nn.Module, name: str) -> bool:
    """Tell whether the model has a convolution of this name, with a bias."""
    module = dict(model.named_modules()).get(name)
    return isinstance(module, _CONVOLUTIONS) and module.bias is not None


def may_be_fused(module: nn.Module) -> bool:
    """Tell whether a module is a convolution with a bias, and has no recovered norm yet."""
    is_plain = type(module) in _CONVOLUTIONS and _child(module) is None
    if not is_plain or not isinstance(bias := module.bias, Tensor):
        return False
    return bias.is_meta or bool(torch.any(bias != 0))  # on the device "meta" it has no values


def _embeds_patches(module: nn.Module) -> bool:
    """Tell whether a convolution takes patches that do not overlap (kernel size = stride > 1)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return module.kernel_size == module.stride and math.prod(module.stride) > 1


def _child(convolution: nn.Module) -> nn.Module | None:
    return convolution._modules.get(FUSED.removeprefix("."))


def _then_normalize(convolution: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
    """Forward hook: apply the recovered norm.

    It is a function at module level, because copies and pickles of a model then keep it.
    """
    norm = _child(convolution)
    return output if norm is None else norm(output)
