"""Running moments of a model in training: taken anew, and merged between processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.moments import Moments, pool
from bnpatch.nn.surgery import NormLayer, inventory


@torch.no_grad()
def recalibrate(module: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Take the running moments anew: plain averages over batches, which count alike.

    Each norm normalizes by its batch meanwhile, as in training; everything else is as in evaluation.

    Args:
        module: left in the mode that it was in.
        inputs: batches of one size, (N, C, H, W), on the module's device.
    """
    with _norms_averaging(module):
        for x in inputs:
            module(x)


@contextmanager
def _norms_averaging(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    norms: list[Any] = [s.module for s in _sites_with_buffers(module) if hasattr(s.module, "momentum")]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.training = True
        norm.momentum = None  # the average of all batches since the counter was 0
        norm.num_batches_tracked.zero_()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for child, mode in modes.items():
            child.training = mode


@torch.no_grad()
def merge_processes(module: nn.Module, accelerator: Any) -> None:
    """Give every process the running moments of all: what each saw is an equal part of a batch."""
    if accelerator.num_processes == 1:
        return
    for norm_layer in _sites_with_buffers(module):
        mean, var = norm_layer.parameters()[2:]
        assert mean is not None  # that is which norm layers these are
        assert var is not None
        parts = Moments(*(accelerator.gather(t.detach()[None].contiguous()) for t in (mean, var)))
        pooled = pool(parts, 0)
        mean.copy_(pooled.mean[0])
        var.copy_(pooled.var[0])


def _sites_with_buffers(module: nn.Module) -> list[NormLayer]:
    """Group Norm, for one, is no part of this: its running moments come from data, and have no buffers."""
    return [
        norm_layer for norm_layer in inventory(module).norm_layers if norm_layer.parameters()[2] is not None
    ]
