"""Run a torch model once, and find norms by the operators that it calls.

The file has two functions. Each runs the model and watches its operators instead of tracing a graph, so it
works for every model that runs, whatever its control flow.

:func:`unnormalized_norms` finds the norms whose output reaches the output of the model without passing
another norm. If a norm's output is normalized again, the next norm divides out whatever scale was learned.
Weight decay on gamma and beta therefore has an effect only if some path to the output meets no further norm
(Summers & Dinneen 2020, section 3.3): at the last norms of a chain, and at those of the residual branches
that add up after the last norm that all paths share. The function records, for every tensor, which norms it
comes from since it was last normalized.

:func:`functional_norms` finds calls such as ``F.batch_norm`` in the model's own code, which a swap of modules
does not reach. It can't see ``F.rms_norm``, which torch decomposes into other operators.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.inventory import SkippedNorm
from bnpatch.nn.hooks import in_evaluation_mode
from bnpatch.nn.surgery import inventory

# Names of operators that normalize by moments, after torch decomposed composite operators.
_NORMALIZING = re.compile(r"(batch|group|layer|instance|rms)_?norm")

# Names of operators that read the shape of a tensor, not its values: new_zeros, ones_like and others.
_LIKE = re.compile(r"^new_|_like$")

# Classes that an inventory lists as skipped norms, though they don't divide their input by its moments.
_NOT_NORMALIZING = re.compile(r"affine|layerscale|stdconv|(local|global)response", re.IGNORECASE)


@dataclass(frozen=True)
class NormPaths:
    """The norms of a model, by whether their output reaches that of the model without passing another norm.

    Attributes:
        unnormalized: names of the norms with a path to the output that meets no other norm.
        normalized: names of the norms that ran and meet another norm on every path.
        num_function_calls: number of calls of ``F.batch_norm`` and the like in the model's own code, outside
            of any norm module. A swap of modules does not reach them.
    """

    unnormalized: frozenset[str]
    normalized: frozenset[str]
    num_function_calls: int


def unnormalized_norms(model: nn.Module, example_input: Tensor) -> frozenset[str]:
    """Name the norm layers whose output reaches the model's output without passing another norm.

    Args:
        model: any module, patched or not. It runs once, in evaluation mode, and is left as it was.
        example_input: an input (N, ...) on the device of the model; one small example is enough.

    Returns:
        Names of norm layers, as in :func:`bnpatch.inventory`.

    Raises:
        BnpatchError: the model does not run on this input.
    """
    reached = norm_paths(model, example_input).unnormalized
    return frozenset(
        norm_layer.name for norm_layer in inventory(model).norm_layers if norm_layer.name in reached
    )


def norm_paths(model: nn.Module, example_input: Tensor) -> NormPaths:
    """Tell which norms reach the output without passing another norm, also among those that bnpatch skips.

    A skipped norm normalizes like any other, so it ends the path of a norm before it.

    Args:
        model: see :func:`unnormalized_norms`.
        example_input: see :func:`unnormalized_norms`.

    Raises:
        BnpatchError: the model does not run on this input, or returns no tensor.
    """
    norms = _norm_modules(model)
    record = _Provenance(_names_by_storage(norms), {_storage(p) for p in model.parameters()})
    with in_evaluation_mode(model), _noting_modules(norms, record), torch.no_grad(), record:
        try:
            y = model(example_input)
        # torch's functions and the checks of a model raise these for an input of another shape or kind.
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            raise BnpatchError(
                "the paths from norms to the output are unknown: the model does not run on an input of "
                f"shape {tuple(example_input.shape)} ({first_line(error)})",
                "give an input that it takes",
            ) from error
    outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
    if not outputs:
        raise BnpatchError(f"the model returns a {type(y).__name__}", "wrap it so that it returns a tensor")
    unnormalized = frozenset[str]().union(*(record.of(output) for output in outputs))
    return NormPaths(unnormalized, frozenset(record.seen - unnormalized), record.num_function_calls)


class _Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, for each tensor, the norms that it comes from since it was last normalized.

    The records are by storage, so that views and in-place operators share them. A tensor with new storage
    gets the records of the tensors that its operator read. Weak references to storages don't keep the data
    alive, and a new storage at the address of a freed one is not mistaken for it.
    """

    def __init__(self, names: dict[StorageWeakRef, str], parameters: set[StorageWeakRef]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self.num_function_calls = 0
        self.norms_running = 0
        self._names, self._parameters = names, parameters
        self._sources: dict[StorageWeakRef, frozenset[str]] = {}

    def of(self, x: Tensor) -> frozenset[str]:
        """Return the names of the norms that a tensor comes from since it was last normalized."""
        return self._sources.get(_storage(x), frozenset())

    def set_norm(self, y: Any, name: str | None) -> None:
        """Record that a norm computed ``y``; None stands for a call that belongs to no module."""
        sources = frozenset([name]) if name is not None else frozenset[str]()
        self.seen |= sources
        for leaf in tree_leaves(y):
            if isinstance(leaf, Tensor):
                self._sources[_storage(leaf)] = sources

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        y = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        if _NORMALIZING.search(operator):
            is_of_weights = _storage(read[0]) in self._parameters  # as in weight-standardized convolutions
            self.num_function_calls += not self.norms_running and not is_of_weights
            names = (self._names.get(_storage(x)) for x in read[1:])
            self.set_norm(y, next((name for name in names if name is not None), None))
            return y
        sources = frozenset[str]().union(*(self.of(x) for x in read if not _LIKE.search(operator)))
        for leaf in tree_leaves(y):
            if isinstance(leaf, Tensor):
                self._sources[_storage(leaf)] = sources
        return y


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def _norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the modules that normalize their input by moments: norm layers and skipped norms."""
    found = inventory(model)
    names = {norm_layer.name for norm_layer in found.norm_layers}
    names |= {norm.name for norm in found.skipped_norms if not _NOT_NORMALIZING.search(norm.kind)}
    return {name: module for name, module in model.named_modules() if name in names}


def _names_by_storage(norms: dict[str, nn.Module]) -> dict[StorageWeakRef, str]:
    """Map the storage of each parameter and buffer of a norm to the norm's name.

    It identifies a norm whose function is called with its parameters, without a call of its module.
    """
    return {
        _storage(tensor): name
        for name, module in norms.items()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }


@contextmanager
def _noting_modules(norms: dict[str, nn.Module], record: _Provenance) -> Iterator[None]:
    """Record the outputs of norm modules by hooks.

    Operators alone are not enough: some norms have no operator of their own, and some norm modules apply an
    activation after they normalized.
    """

    def enter(module: nn.Module, args: Any) -> None:
        record.norms_running += 1

    def leaving(name: str) -> Any:
        def leave(module: nn.Module, args: Any, y: Any) -> None:
            record.norms_running -= 1
            record.set_norm(y, name)

        return leave

    handles = []
    for name, module in norms.items():
        if not isinstance(module, torch.jit.ScriptModule):  # script modules can't have hooks
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leaving(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Reasons why a call of a functional norm is listed as skipped.
_REACHED_BY_EXPORT = (
    "called in a forward, where no module can be swapped: export the model, and patch the file"
)
_BY_ITS_BATCH = "called in a forward: it normalizes by its own batch, or standardizes weights"
_BY_EXAMPLE = "called in a forward: Instance Norm normalizes by the example alone, on purpose"

_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm)


def functional_norms(model: nn.Module, run: Callable[[], Any]) -> tuple[SkippedNorm, ...]:
    """Find the calls of functional norms that come from no norm module, for example ``F.batch_norm``.

    Args:
        model: the model, in evaluation mode; it is left as it is.
        run: a function that runs the model on one input, without torch.compile.

    Returns:
        One entry per module and function, with the name of the module in whose forward the call is. An ONNX
        export (:func:`bnpatch.export_onnx`) makes norm layers of ``group_norm``, and of ``batch_norm`` with
        running statistics.
    """
    found = inventory(model)
    known = {norm_layer.name for norm_layer in found.norm_layers} | {
        norm.name for norm in found.skipped_norms
    }
    calls: Counter[tuple[str, str, str]] = Counter()
    running: list[str] = []  # names of the modules whose forward is running, the innermost last

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
        SkippedNorm(name, f"F.{function}" + (f" x {count}" if count > 1 else ""), reason)
        for (name, function, reason), count in calls.items()
    )


def _reason(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return why a call of a functional norm is listed as skipped."""
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
    """Keep in ``running`` the names of the modules whose forward is running, until the context ends."""
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
