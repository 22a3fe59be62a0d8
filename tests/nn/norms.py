"""Inputs and layers for the tests of norm layers."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnpatch.core.moments import Moments

LAYOUTS = {3: [torch.contiguous_format], 2: [torch.contiguous_format]}
LAYOUTS[4] = [torch.contiguous_format, torch.channels_last]
LAYOUTS[5] = [torch.contiguous_format, torch.channels_last_3d]


# Relative to the largest output, which is near 5. float64: rounding. float32: about twenty roundings, and
# a variance by E[x^2] - mean^2 at mean = std. Half precision: the rounding of the output, whose unit in
# the last place is 2^-8 and 2^-11 of it, once; statistics are in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def settle(model, seed=0):
    """Random running statistics, scales and shifts, as a trained model has them, so that nothing cancels."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=g) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=g) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.rand(module.weight.shape, generator=g) + 0.5)
                module.bias.data.copy_(torch.randn(module.bias.shape, generator=g) * 0.1)
    return model.eval()


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(num_channels=8, seed=0):
    mean = images(num_channels, seed=seed)
    return Moments(mean, images(num_channels, seed=seed + 1).abs() + 0.3)


def sample(shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 1.5 + 1.2
    return x.to(dtype).contiguous(memory_format=layout)


def parameters(num_channels, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    mean, weight, bias = (torch.randn(num_channels, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(num_channels, generator=g, dtype=torch.float64) + 0.3
    return [t.to(dtype) for t in (mean, var, weight, bias)]


def batch_norm(num_channels, rank=2, dtype=torch.float32):
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](num_channels).to(dtype).eval()
    for own, value in zip(
        (bn.running_mean, bn.running_var, bn.weight, bn.bias), parameters(num_channels, dtype), strict=True
    ):
        own.data.copy_(value)
    return bn


def running(num_channels=6, dtype=torch.float64, seed=7):
    """Running moments unlike those of :func:`batch_norm`."""
    mean, var, *_ = parameters(num_channels, dtype, seed)
    return Moments(mean, var)


class Sizes(TorchDispatchMode):
    """Lists the numbers of values of the tensors that operators make; views make none."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if not op.is_view:
            parts = made if isinstance(made, tuple | list) else (made,)
            self.made += [part.numel() for part in parts if isinstance(part, torch.Tensor)]
        return made
