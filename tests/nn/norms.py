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
