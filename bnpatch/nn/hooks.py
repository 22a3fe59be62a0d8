"""Observe modules while a torch model runs, and compute the moments of what they read or return."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.moments import Moments, pool

# How many values a CPU takes at a time for the variance: 2 MB of float32.
_CPU_VALUES = 2**19


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; when the context ends, each gets back the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def at_inputs(modules: Mapping[str, nn.Module], do: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call ``do(name, input)`` before each of the modules runs, until the context ends."""
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


class _Reached(Exception):  # noqa: N818 - no error
    """Ends a forward pass at a module, with the module's input."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.name, self.x = name, x


def first_input(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> tuple[str, Tensor] | None:
    """Run a model until it reaches one of its modules; return the name and the input of that one, or None."""

    def stop(name: str, x: Tensor) -> None:
        raise _Reached(name, x)

    try:
        with at_inputs(modules, stop):
            run()
    except _Reached as reached:
        return reached.name, reached.x
    return None


@contextmanager
def at_outputs(modules: Mapping[str, nn.Module], do: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call ``do(name, output)`` after each of the modules has run, until the context ends."""
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
    """Compute the moments of each channel of each example: (N, C, *spatial) to (N, C), in float32 or wider.

    The function makes two passes over the data, so it loses no digits if the mean is much larger than the
    standard deviation. :func:`~bnpatch.nn.functional.example_moments`, which the layer uses, is faster but
    loses digits in that case.
    """
    values = x.flatten(2) if x.ndim > 2 else x[..., None]
    values = values.to(torch.promote_types(x.dtype, torch.float32))
    mean = values.mean(2)
    rows = max(1, len(values))
    if x.device.type == "cpu":  # in portions that fit its cache
        rows = max(1, _CPU_VALUES // max(1, values[:1].numel()))
    portions = zip(torch.split(values, rows), torch.split(mean[..., None], rows), strict=True)
    return Moments(mean, torch.cat([(part - center).square().mean(2) for part, center in portions]))


def pooled_rows(moments: Moments[Tensor]) -> Moments[Tensor]:
    """Pool moments of N parts, (N, C), into the moments of their union, (C,)."""
    pooled = pool(moments, axes=0)
    return Moments(pooled.mean[0], pooled.var[0])


def joined(parts: Sequence[Moments[Tensor]]) -> Moments[Tensor]:
    """Concatenate moments of shape (N_i, C) into moments of shape (N_1 + N_2 + ..., C)."""
    return Moments(torch.cat([part.mean for part in parts]), torch.cat([part.var for part in parts]))


class SeenMoments:
    """Collects the moments of tensors by name; a module that runs several times adds examples each time."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Moments[Tensor]]] = {}

    def add(self, name: str, x: Tensor) -> Moments[Tensor]:
        """Add a tensor (N, C, *spatial); return its moments (N, C)."""
        moments = accurate_moments(x)
        self._parts.setdefault(name, []).append(moments)
        return moments

    def joined(self) -> dict[str, Moments[Tensor]]:
        """Return the moments of all examples by name."""
        return {name: joined(parts) for name, parts in self._parts.items()}
