"""Which norms reach the output of a model past no other normalization layer?

A norm whose output is normalized again has no say in its own scale: whatever is learned there, the next
norm divides out. Weight decay on gamma and beta can act only where some path to the output meets no
further norm (Summers & Dinneen 2020, section 3.3): at the last norms of a chain, and at those of the
residual branches that add up after the last norm that all paths share.

The answer is found by running the model once on an example and noting, for every tensor, which norms it
comes from since it was last normalized. Nothing is traced into a graph, so every model that runs can be
asked, whatever its control flow. Calls of ``F.rms_norm`` outside a module are not seen: torch takes them
apart.
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

# Operators that normalize by moments, as they are after composite ones were taken apart.
_NORMALIZING = re.compile(r"(batch|group|layer|instance|rms)_?norm")

# They take the shape of a tensor, not its values.
_LIKE = re.compile(r"^new_|_like$")

# Listed as skipped, for they are called norms, and yet they don't divide their input by its moments.
_NOT_NORMALIZING = re.compile(r"affine|layerscale|stdconv|(local|global)response", re.IGNORECASE)


@dataclass(frozen=True)
class NormPaths:
    """Where the outputs of a model's norms end up.

    Attributes:
        unnormalized: names of the norms with a path to the output that meets no other norm.
        normalized: names of those that ran, and meet another norm on every path.
        num_function_calls: calls of ``F.batch_norm`` and the like in the model's own code, outside of any
            norm module: a patch of modules does not reach them.
    """

    unnormalized: frozenset[str]
    normalized: frozenset[str]
    num_function_calls: int


def unnormalized_norms(model: nn.Module, example_input: Tensor) -> frozenset[str]:
    """Name the norm layers whose scales and shifts reach the output of a model past no other norm.

    Args:
        model: patched or not; it is run once, in evaluation mode, and left as it was.
        example_input: an input (N, ...) as the model takes it, on its device. One small example will do.

    Returns:
        Names of norm layers, as :func:`bnpatch.inventory` gives them.

    Raises:
        BnpatchError: the model does not run on this input.
    """
    reached = norm_paths(model, example_input).unnormalized
    return frozenset(
        norm_layer.name for norm_layer in inventory(model).norm_layers if norm_layer.name in reached
    )


def norm_paths(model: nn.Module, example_input: Tensor) -> NormPaths:
    """The same for all normalization layers: those that aren't norm layers stop a path, and may start one.

    Args:
        model: see :func:`unnormalized_norms`.
        example_input: likewise.

    Raises:
        BnpatchError: the model does not run on this input, or returns no tensor.
    """
    norms = _norm_modules(model)
    record = _Provenance(_names_by_storage(norms), {_storage(p) for p in model.parameters()})
    with in_evaluation_mode(model), _noting_modules(norms, record), torch.no_grad(), record:
        try:
            y = model(example_input)
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
    """Notes for each tensor from which norms it comes without having been normalized again.

    What is noted belongs to a storage: views and what is written in place share it. A tensor in new memory
    comes from what its operator read. The weak references keep no data, and keep the address of what is gone
    from being taken for that of a new tensor.
    """

    def __init__(self, names: dict[StorageWeakRef, str], parameters: set[StorageWeakRef]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self.num_function_calls = 0
        self.norms_running = 0
        self._names, self._parameters = names, parameters
        self._sources: dict[StorageWeakRef, frozenset[str]] = {}

    def of(self, x: Tensor) -> frozenset[str]:
        return self._sources.get(_storage(x), frozenset())

    def set_norm(self, y: Any, name: str | None) -> None:
        """Note that a norm made ``y``; without a name it is a call that belongs to no module."""
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
            is_of_weights = _storage(read[0]) in self._parameters  # standardized convolutions do that
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
    """Modules that normalize by moments of their input, by name: norm layers, and others."""
    found = inventory(model)
    names = {norm_layer.name for norm_layer in found.norm_layers}
    names |= {left.name for left in found.skipped_norms if not _NOT_NORMALIZING.search(left.kind)}
    return {name: module for name, module in model.named_modules() if name in names}


def _names_by_storage(norms: dict[str, nn.Module]) -> dict[StorageWeakRef, str]:
    """Whose parameters are these? Finds the name of a norm that is computed without calling its module."""
    return {
        _storage(tensor): name
        for name, module in norms.items()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }


@contextmanager
def _noting_modules(norms: dict[str, nn.Module], record: _Provenance) -> Iterator[None]:
    """Some norms have no operator of their own, others an activation after it: their modules know best."""

    def enter(module: nn.Module, args: Any) -> None:
        record.norms_running += 1

    def leaving(name: str) -> Any:
        def leave(module: nn.Module, args: Any, y: Any) -> None:
            record.norms_running -= 1
            record.set_norm(y, name)

        return leave

    handles = []
    for name, module in norms.items():
        if not isinstance(module, torch.jit.ScriptModule):  # these take no hooks
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leaving(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_REACHED_BY_EXPORT = (
    "called in a forward, where no module can be swapped: export the model, and patch the file"
)
_BY_ITS_BATCH = "called in a forward: it normalizes by its own batch, or standardizes weights"
_BY_EXAMPLE = "called in a forward: Instance Norm normalizes by the example alone, on purpose"

_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm)


def functional_norms(model: nn.Module, run: Callable[[], Any]) -> tuple[SkippedNorm, ...]:
    """The calls of functional norms that come from no norm module, by the module in whose forward they are.

    Args:
        model: in evaluation mode; left as it is.
        run: runs it on one input, without torch.compile.

    Returns:
        One entry per module and function, its name that of the module; ``batch_norm`` with running moments
        and ``group_norm`` become norm layers of an ONNX export (:func:`bnpatch.export_onnx`).
    """
    found = inventory(model)
    known = {norm_layer.name for norm_layer in found.norm_layers} | {
        left.name for left in found.skipped_norms
    }
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
        SkippedNorm(name, f"F.{function}" + (f" x {count}" if count > 1 else ""), reason)
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
