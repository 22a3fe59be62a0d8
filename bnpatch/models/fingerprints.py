"""Hash the parameters of norm layers, to tell whether a recipe is for a model; a patch changes no hash.

A torch module and its export have the same hashes: those of the values in float32.
"""

import hashlib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bnpatch.core.inventory import FUSED
from bnpatch.nn.fused_conv import RecoveredNorm, is_convolution
from bnpatch.nn.surgery import inventory, uncalibrated
from bnpatch.onnx.match import OnnxNormLayer


def fingerprint(parameters: Iterable[npt.ArrayLike]) -> str:
    """Hash the parameters of a norm layer: gamma, beta, running mean and running variance.

    The hash is of the float32 values, so an export or a change of dtype that keeps the values keeps the hash.
    """
    digest = hashlib.sha256()
    for values in parameters:
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()[:16]


def of_module(module: nn.Module, running: Collection[str]) -> dict[str, str]:
    """Return the hashes by name of norm layer of a torch module.

    Args:
        module: the module.
        running: names of further norms to include, which have no running statistics yet.
    """
    hashes = {
        # A recovered norm is known by its convolution, because its moments depend on the data.
        norm.name: _of_fused(module, norm.name)
        if norm.kind == RecoveredNorm.__name__
        else _of_parameters(norm.num_channels, norm.parameters())
        for norm in inventory(module).norm_layers
    }
    waiting = uncalibrated(module)
    hashes |= {name: _of_uncalibrated(waiting[name]) for name in waiting.keys() & set(running)}
    return hashes | {name: _of_fused(module, name) for name in running if is_fused(module, name)}


def is_fused(module: nn.Module, name: str) -> bool:
    """Tell whether a name is that of the Batch Norm that was fused into a convolution of the module."""
    return name.endswith(FUSED) and is_convolution(module, name.removesuffix(FUSED))


def _of_fused(module: nn.Module, name: str) -> str:
    convolution: Any = module.get_submodule(name.removesuffix(FUSED))
    parts = (convolution.weight, convolution.bias)
    return fingerprint(part.detach().float().cpu().numpy() for part in parts)


def _of_parameters(num_channels: int, parameters: Iterable[Tensor | None]) -> str:
    """Hash gamma, beta, running mean and variance; a missing one counts as the value without effect."""
    zeros = torch.zeros(num_channels)
    defaults = (zeros + 1, zeros, zeros, zeros + 1)
    parts = (default if p is None else p for p, default in zip(parameters, defaults, strict=True))
    return fingerprint(part.detach().float().cpu().numpy() for part in parts)


def _of_uncalibrated(norm: Any) -> str:
    num_channels = getattr(norm, "num_channels", None) or norm.num_features  # Group Norm, Batch Norm
    return _of_parameters(num_channels, (norm.weight, norm.bias, None, None))


def of_graph_norm(norm_layer: OnnxNormLayer) -> str:
    """Return the hash of a norm layer of a graph."""
    like = np.zeros(norm_layer.num_channels)
    mean = like if norm_layer.running_mean is None else norm_layer.running_mean
    var = like + 1 if norm_layer.running_var is None else norm_layer.running_var
    learned = (np.broadcast_to(part, like.shape) for part in (norm_layer.weight, norm_layer.bias))
    return fingerprint([*learned, mean, var])
