"""Running statistics of a model in training: measure them again, and merge those of several processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.moments import Moments, pool
from bnpatch.nn.hooks import in_evaluation_mode
from bnpatch.nn.surgery import TorchNormLayer, inventory


@torch.no_grad()
def recalibrate(module: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Measure the running statistics again, as averages over batches with equal weights.

    The norms normalize by their batch, as in training; all else is in evaluation mode.

    Args:
        module: the module; it is in its former mode when this returns.
        inputs: batches of one size, (N, C, H, W), on the module's device.
    """
    with _norms_averaging(module):
        for x in inputs:
            module(x)


@contextmanager
def _norms_averaging(module: nn.Module) -> Iterator[None]:
    norms: list[Any] = [s.module for s in _norms_with_buffers(module) if hasattr(s.module, "momentum")]
    momenta = [norm.momentum for norm in norms]
    with in_evaluation_mode(module):
        for norm in norms:
            norm.training = True
            norm.momentum = None  # the average of all batches since the counter was 0
            norm.num_batches_tracked.zero_()
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@torch.no_grad()
def merge_processes(module: nn.Module, accelerator: Any) -> None:
    """Pool the running statistics of all processes, which have seen equal numbers of examples."""
    if accelerator.num_processes == 1:
        return
    for norm_layer in _norms_with_buffers(module):
        mean, var = norm_layer.parameters()[2:]
        assert mean is not None  # these norm layers have buffers
        assert var is not None
        parts = Moments(*(accelerator.gather(t.detach()[None].contiguous()) for t in (mean, var)))
        pooled = pool(parts, 0)
        mean.copy_(pooled.mean[0])
        var.copy_(pooled.var[0])


def _norms_with_buffers(module: nn.Module) -> list[TorchNormLayer]:
    """Return the norm layers with buffers for running statistics, which Group Norm does not have."""
    return [
        norm_layer for norm_layer in inventory(module).norm_layers if norm_layer.parameters()[2] is not None
    ]
