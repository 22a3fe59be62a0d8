"""Normalization that a forward computes by a call of ``torch.nn.functional``, with no module to swap."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnpatch.nn.surgery import survey
from bnpatch.sites import LeftAlone

_REACHED_BY_EXPORT = (
    "called in a forward, where no module can be swapped: export the model, and patch the file"
)
_BY_ITS_BATCH = "called in a forward: it normalizes by its own batch, or standardizes weights"
_BY_EXAMPLE = "called in a forward: Instance Norm normalizes by the example alone, on purpose"

_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm)


def functional_norms(model: nn.Module, run: Callable[[], Any]) -> tuple[LeftAlone, ...]:
    """The calls of functional norms that come from no norm module, by the module in whose forward they are.

    Args:
        model: in evaluation mode; left as it is.
        run: runs it on one input, without torch.compile.

    Returns:
        One entry per module and function, its name that of the module; ``batch_norm`` with running moments
        and ``group_norm`` become sites of an ONNX export (:func:`bnpatch.export_onnx`).
    """
    found = survey(model)
    known = {site.name for site in found.sites} | {left.name for left in found.left_alone}
    calls: Counter[tuple[str, str, str]] = Counter()
    running: list[str] = []  # names of the modules whose forward is going on, the innermost last

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            owner = running[-1] if running else ""
            if func in _FUNCTIONS and owner not in known:
                calls[owner, func.__name__, _reason(func, args, kwargs or {})] += 1
            return func(*args, **(kwargs or {}))

    with _telling_which_run(model, running), Watch():
        run()
    return tuple(
        LeftAlone(name, f"F.{function}" + (f" x {count}" if count > 1 else ""), reason)
        for (name, function, reason), count in calls.items()
    )


def _reason(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    if func is F.group_norm:
        return _REACHED_BY_EXPORT
    if func is F.instance_norm:
        return _BY_EXAMPLE
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    by_running = isinstance(given.get("running_mean"), Tensor) and not given.get("training", False)
    return _REACHED_BY_EXPORT if by_running else _BY_ITS_BATCH


@contextmanager
def _telling_which_run(model: nn.Module, running: list[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def begin(module: nn.Module, args: Any, name: str = name) -> None:
            running.append(name)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
