"""What the norms of a torch model are given to normalize, while it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.moments import Moments, pool


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode as long as the context lasts; then each in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def at_inputs(modules: Mapping[str, nn.Module], do: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call ``do(name, input)`` before each of the modules runs, as long as the context lasts."""
    handles = []
    for name, module in modules.items():

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            do(name, args[0] if args else next(iter(kwargs.values())))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_outputs(modules: Mapping[str, nn.Module], do: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call ``do(name, output)`` after each of the modules ran, as long as the context lasts."""
    handles = []
    for name, module in modules.items():

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            do(name, output)

        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def accurate_moments(x: Tensor) -> Moments[Tensor]:
    """Moments of each channel of each example: (N, C, *spatial) to (N, C), in float32 or wider.

    In two passes, so that no digits are lost where the mean is large against the standard deviation. The
    layer's own :func:`~bnpatch.nn.norm.example_moments` is faster, and loses them.
    """
    values = x.flatten(2) if x.ndim > 2 else x[..., None]
    values = values.to(torch.promote_types(x.dtype, torch.float32))
    mean = values.mean(2)
    return Moments(mean, (values - mean[..., None]).square().mean(2))


def pooled_rows(moments: Moments[Tensor]) -> Moments[Tensor]:
    """Moments (N, C) of N parts to those (C,) of their union."""
    pooled = pool(moments, axes=0)
    return Moments(pooled.mean[0], pooled.var[0])


def joined(parts: Sequence[Moments[Tensor]]) -> Moments[Tensor]:
    """Moments (N_i, C) one below the other: (N_1 + N_2 + ..., C)."""
    return Moments(torch.cat([part.mean for part in parts]), torch.cat([part.var for part in parts]))
