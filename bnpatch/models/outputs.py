"""Find out what a model returns: which of its outputs has the classes, and what the numbers in it are.

A model may return a tensor, several of them in a tuple, a list, a dictionary or an object, logits or
probabilities, and one number for two classes. :func:`choose` decides by the shapes and by the number of
classes. It looks at the outputs for random inputs and never at the images, so every batch is read alike.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnpatch.core.errors import BnpatchError, BnpatchWarning

#: Number of inputs that a model runs to find out what it returns. The axis of this size is the batch.
PROBES = 3

# Names that people give to the output that counts.
_MAIN = re.compile(r"(class_?)?(logits?|out|outputs?|preds?|predictions?|y|main)")
_DEPTH = 3  # of containers within containers
_COPIES = ("clone", "_to_copy", "contiguous")


class Kind(Enum):
    """What the numbers of an output are."""

    LOGITS = "logits"
    SOFTMAX = "probabilities of a softmax"
    SIGMOID = "probabilities of a sigmoid"


@dataclass(frozen=True)
class Output:
    """One of the tensors that a model returns.

    Attributes:
        name: where it is in the return value, such as ``logits``, ``heads.age`` or ``1`` (the second of a
            tuple); "" if the model returns this tensor alone.
        shape: its shape for one example, without the axis of the batch.
        kind: what the numbers are.
        batch_axis: the axis of the batch; it is 1 for the (T, N, K) of many recurrent models.
        position: its number among the tensors that the model returns, from 0.
        repeats: whether an output before it has the same answers, such as the logits of its probabilities.
        is_only: whether the model returns no other tensor, so that the name does not matter.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = Kind.LOGITS
    batch_axis: int = 0
    position: int = 0
    repeats: bool = False
    is_only: bool = False

    @property
    def num_classes(self) -> int | None:
        """Number of classes: K, and 2 for a single number; None if it is not one number per class."""
        if self._is_single:
            return 2
        return self.shape[0] if len(self.shape) == 1 or self.shape[1:] == (1, 1) else None

    @property
    def _is_single(self) -> bool:
        return self.shape in ((), (1,), (1, 1, 1))

    def __str__(self) -> str:
        dims = ["N" if axis == self.batch_axis else str(size) for axis, size in enumerate(self._dims())]
        return f"{self.name or 'output'} ({', '.join(dims)})"

    def _dims(self) -> list[int]:
        dims = list(self.shape)
        dims.insert(self.batch_axis, 0)
        return dims

    def read(self, y: Tensor) -> Tensor:
        """Return the tensor with the batch axis first; (N, K, 1, 1) becomes (N, K).

        Probabilities of a softmax become their logarithms: the softmax of these is the probabilities again.
        """
        y = y.movedim(self.batch_axis, 0)
        y = y.flatten(1) if y.ndim == 4 and y.shape[2:] == (1, 1) else y
        return y.float().clamp_min(_TINY).log() if self.kind is Kind.SOFTMAX else y

    def check_classes(self, model: str) -> int:
        """Return the number of classes.

        Raises:
            BnpatchError: the output for one image isn't one number per class; the message names the model.
        """
        if self.num_classes is None:
            raise BnpatchError(
                f"{model} returns {self}, not one number per class",
                "choose another output with --output-name, or give tune_alpha a metric of your own in Python",
            )
        return self.num_classes

    def as_classes(self, y: Tensor) -> Tensor:
        """Return the logits (N, K) of the classes for what :meth:`read` returned.

        Probabilities p of a sigmoid become log(p / (1 - p)), and a single logit z becomes [0, z], whose
        softmax is [1 - p, p].
        """
        if self.kind is Kind.SIGMOID:
            y = y.double() if y.dtype == torch.float64 else y.float()
            y = torch.special.logit(y, eps=torch.finfo(y.dtype).eps / 2)
        if self._is_single:
            y = y.reshape(len(y), 1)
            y = torch.cat([torch.zeros_like(y), y], 1)
        return y


_TINY = torch.finfo(torch.float32).tiny


def tensors_of(value: Any, depth: int = _DEPTH) -> dict[str, Tensor]:
    """Return the tensors in the return value of a module, by :attr:`Output.name`, in their order."""
    if isinstance(value, Tensor):
        return {"": value}
    parts: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, (tuple, list)):
        parts = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    elif not isinstance(value, type) and hasattr(value, "__dict__"):
        parts = vars(value)
    if not depth:
        return {}
    return {
        f"{name}.{path}".rstrip("."): tensor
        for name, part in parts.items()
        for path, tensor in tensors_of(part, depth - 1).items()
    }


def _described(tensors: Mapping[str, Tensor], sigmoids: Collection[str]) -> list[Output]:
    """Return the outputs with an axis for the batch; those of integers only if there are no others."""
    found = {}
    for position, (name, y) in enumerate(tensors.items()):
        axis = next((axis for axis, size in enumerate(y.shape) if size == PROBES), None)
        if axis is not None:
            shape = (*y.shape[:axis], *y.shape[axis + 1 :])
            output = Output(name, shape, Kind.LOGITS, axis, position, is_only=len(tensors) == 1)
            kind = Kind.SIGMOID if name in sigmoids else _kind_by_values(output.read(y))
            found[name] = replace(output, kind=kind if output.num_classes else Kind.LOGITS)
    found = {n: o for n, o in found.items() if tensors[n].is_floating_point()} or found
    answers: dict[int, list[Tensor]] = {}
    for name, output in found.items():
        if output.num_classes is not None:
            answer = output.as_classes(output.read(tensors[name])).float().log_softmax(1)
            before = answers.setdefault(output.num_classes, [])
            if any(torch.allclose(answer, other, rtol=1e-2, atol=1e-2) for other in before):
                found[name] = replace(output, repeats=True)
            before.append(answer)
    return list(found.values())


def _kind_by_values(y: Tensor) -> Kind:
    """Return SOFTMAX if rows have two values or more, none negative, and sum to 1; else LOGITS."""
    if y.ndim != 2 or y.shape[1] < 2 or not bool((y >= 0).all()):
        return Kind.LOGITS
    rounding = 1e-2 if y.dtype in (torch.float16, torch.bfloat16) else 1e-3
    sums = y.detach().float().sum(1)
    return Kind.SOFTMAX if bool(((sums - 1).abs() < rounding).all()) else Kind.LOGITS


def choose(
    tensors: Mapping[str, Tensor],
    sigmoids: Collection[str],
    wanted: str | None,
    classes: int | None,
    model: str,
) -> Output:
    """Return the output to read, and warn if others could have been meant.

    The function prefers outputs with the right number of classes, among these the ones with a usual name such
    as "logits", and among those of one shape in a tuple the first.

    Args:
        tensors: what the model returned for :data:`PROBES` inputs, by name.
        sigmoids: names of the tensors that come from a sigmoid.
        wanted: name or number of the output that the user wants.
        classes: number of classes that the model or the data has, if it is known.
        model: name of the model, for messages.

    Raises:
        BnpatchError: there is no such output or none at all, or it is not clear which one is meant.
    """
    outputs = _described(tensors, sigmoids)
    if not outputs:
        shapes = ", ".join(str(tuple(y.shape)) for y in tensors.values()) or "no tensor"
        raise BnpatchError(
            f"{model} returns {shapes} for {PROBES} images",
            "give a model that returns a tensor with a row per image",
        )
    distinct = [output for output in outputs if not output.repeats]
    some = ", ".join(map(str, outputs[:8])) + (", ..." if len(outputs) > 8 else "")
    if wanted is not None:
        named = [o for o in outputs if wanted in (o.name, str(o.position))]
        if not named:
            raise BnpatchError(f"{model} has no output {wanted!r}", f"choose --output-name among {some}")
        return named[0]
    if len(distinct) == 1:
        return distinct[0]
    fits = [output for output in distinct if output.num_classes] or distinct
    if classes is not None:
        # The data may lack some of the model's classes, so an output with more comes next.
        larger = [output for output in fits if (output.num_classes or 0) > classes]
        fits = [output for output in fits if output.num_classes == classes] or larger or fits
    fits = [output for output in fits if _MAIN.fullmatch(output.name.split(".")[-1].lower())] or fits
    is_tuple = all(output.name.isdecimal() for output in fits)
    if len(fits) > 1 and not (is_tuple and len({output.shape for output in fits}) == 1):
        raise BnpatchError(
            f"{model} returns several outputs: {some}",
            "say with --output-name (output= in Python) which one has the classes, by its name or number",
        )
    warnings.warn(
        f"{model} returns {some}; {fits[0]} is read, --output-name (output= in Python) takes another",
        BnpatchWarning,
        stacklevel=5,
    )
    return fits[0]


class Sigmoids(TorchDispatchMode):
    """Records which tensors come from a sigmoid while a torch module runs in inference mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, Tensor] = {}  # by address of the memory, which views share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        if operator in ("sigmoid", "sigmoid_") or (operator in _COPIES and args[0] in self):
            self._made[_address(y)] = y  # it stays alive, so that its address is not used again
        return y

    def __contains__(self, y: Tensor) -> bool:
        return _address(y) in self._made


def _address(y: Tensor) -> int:
    return y.untyped_storage().data_ptr()
