"""Running moments from data: pooled over all examples, in one pass, and free of labels."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import Moments, mix, pool
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.data.sources import open_examples
from bnpatch.models.base import Patchable
from bnpatch.models.load import load
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel
from bnpatch.onnx.fused_conv import find_fused_convs, observe
from bnpatch.onnx.runtime import open_session

OnBatch = Callable[[int], None]
#: From a batch to the moments of each example by name of convolution.
Watch = Callable[[Tensor], dict[str, Moments[Any]]]


def recover_folded(
    model: nn.Module | Patchable,
    images: Any,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: OnBatch = lambda count: None,
    **options: Any,
) -> int:
    """Give a model whose Batch Norm was fused into its convolutions norm layers again, in place.

    The moments of what each such convolution puts out are taken over the images, no labels needed; see
    :mod:`bnpatch.onnx.fused_conv` for why they are enough. At alpha = 0 the model computes what it did.

    Args:
        model: a module, or what :func:`bnpatch.load` returns.
        images: what it is used on, see :func:`calibrate`.
        indices: which of them; None for all.
        batch_size: examples at a time; it changes the result by rounding only.
        on_batch: called with the number of examples done, for progress.
        options: see :func:`bnpatch.open_examples`.

    Returns:
        The number of norm layers that were recovered.

    Raises:
        BnpatchError: the model has no such convolution, or no example can be read.
    """
    patchable = load(model) if isinstance(model, nn.Module) else model
    examples = _open(images, patchable, options)
    pooled, watch = _Pool(), None
    with _as_it_came(patchable):
        for batch in examples.batches(batch_size, indices):
            watch = watch or _watch(patchable, batch.x[:1])
            for name, rows in watch(batch.x).items():
                pooled.add(name + FUSED, rows)
            on_batch(len(batch.indices))
    found = pooled.moments()
    patchable.calibrate(found)
    return len(found)


def _watch(model: Patchable, example: Tensor) -> Watch:
    watch = None
    if isinstance(model, TorchModel):
        watch = _watch_torch(model, example)
    elif isinstance(model, OnnxModel):
        watch = _watch_onnx(model)
    if watch is None:
        raise BnpatchError(
            f"{model.name} has no convolution that a Batch Norm may have been fused into",
            "leave out --recover-folded",
        )
    return watch


def _watch_torch(model: TorchModel, example: Tensor) -> Watch | None:
    names = model.fused_convs(example)
    return (lambda x: model.observe_outputs(names, x)) if names else None


def _watch_onnx(model: OnnxModel) -> Watch | None:
    graph = model.graph.clone()
    candidates = [c for c in find_fused_convs(graph) if c.node.graph is graph.graph]
    names = [name for pair in observe(graph, candidates) for name in pair]
    session = open_session(graph, model.device)

    def watch(x: Tensor) -> dict[str, Moments[Any]]:
        outputs = model.run(session, names, x)
        pairs = zip(candidates, outputs[::2], outputs[1::2], strict=True)
        return {candidate.name: Moments(mean, var) for candidate, mean, var in pairs}

    return watch if candidates else None


def calibrate(
    model: nn.Module | Patchable,
    images: Any,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    tolerance: float | None = None,
    seed: int = 0,
    on_batch: OnBatch = lambda count: None,
    **options: Any,
) -> tuple[str, ...]:
    """Give running moments to norms that have none, in place: Group Norm and its kin become norm layers.

    Exact moments per channel of the input of each such norm, pooled over all positions of all examples,
    while the model computes what it always did: the result does not depend on how the examples are
    split into batches, but for rounding. Group Norm computes the same afterwards, at alpha = 1.

    Batch Norm without running moments normalizes by its batch while they are taken, and by what was found
    afterwards, at alpha = 0: nothing that is free of the batch would be the same. The larger the batches, the
    better.

    Args:
        model: a module, or what :func:`bnpatch.load` returns.
        images: like those that the model was trained on, as :func:`bnpatch.open_examples` takes them, or
            what it returns; labels are not used. Images that are shifted describe the shift as if it were
            normal.
        indices: which of them; None for all.
        batch_size: examples at a time.
        tolerance: stop as soon as the moments have settled: when, at every norm, the standard error of the
            pooled means, in standard deviations and in the root mean square over channels, is at
            most this. None takes all images; 0.01 is plenty.
        seed: of the order of the images.
        on_batch: called with the number of examples done, for progress.
        options: see :func:`bnpatch.open_examples`.

    Returns:
        The names of the norms that are norm layers now.

    Raises:
        BnpatchError: no example can be read, or the module is itself a norm.
    """
    patchable = load(model) if isinstance(model, nn.Module) else model
    names = patchable.uncalibrated()
    if not names:
        return ()
    if "" in names and isinstance(model, nn.Module):
        raise BnpatchError("the model is itself a norm", "put it into a torch.nn.Sequential")
    examples = _open(images, patchable, options)
    pooled = _Pool()
    with _as_it_came(patchable):
        for batch in _random_batches(examples, indices, batch_size, seed):
            _, seen = patchable.observe(batch.x)
            for name in names:
                if name in seen:
                    pooled.add(name, seen[name])
            on_batch(len(batch.indices))
            if tolerance is not None and pooled.standard_error() <= tolerance:
                break
    found = pooled.moments()  # a norm that no example reaches is missing
    patchable.calibrate(found)
    return tuple(found)


def target_moments(
    model: Patchable,
    examples: Examples,
    *,
    indices: Indices | None = None,
    batch_size: int = 250,
    seed: int = 0,
    on_batch: OnBatch = lambda count: None,
) -> dict[str, Moments[Any]]:
    """Re-estimate running moments on the data at hand: what others call AdaBN, or precise BN.

    One pass, in random order, in which every Batch Norm normalizes by the moments of its batch, as in
    training, and Group Norm does what it always does; the moments are pooled over all batches. The model
    stays as it is.

    Args:
        model: any model.
        examples: the data at hand, labels unused.
        indices: which of them; None for all.
        batch_size: examples at a time. The moments by which the layers below normalize are the batch's, so
            a small batch makes noisy ones.
        seed: of the order.
        on_batch: called with the number of examples done, for progress.

    Returns:
        Mean and variance (C,) by name of norm layer, for :meth:`Patchable.retarget`. Norm layers that no
        example reaches are missing, and in ONNX files those in branches.

    Raises:
        BnpatchError: no example can be read.
    """
    pooled = _Pool()
    for batch in _random_batches(examples, indices, batch_size, seed):
        for name, moments in model.moments_by_batch(batch.x).items():
            pooled.add(name, Moments(moments.mean[None], moments.var[None]), weight=len(batch.indices))
        on_batch(len(batch.indices))
    return pooled.moments()


@contextmanager
def _as_it_came(model: Patchable) -> Iterator[None]:
    """The model computes what it did before any patch; its weights are back when the context ends."""
    with model.borrowed():
        if identities := model.identities():
            model.set(PatchWeights(identities, dict.fromkeys(identities, 0.0)))
        yield


def _open(images: Any, model: Patchable, options: Mapping[str, Any]) -> Examples:
    if isinstance(images, Examples):
        return images
    return open_examples(images, model, labels="optional", classes=False, **options)


def _random_batches(
    examples: Examples, indices: Indices | None, batch_size: int, seed: int
) -> Iterator[Batch]:
    """In random order, since folders are sorted by class; of equal size, since moments of a few are poor."""
    order = np.random.default_rng(seed).permutation(np.arange(len(examples)) if indices is None else indices)
    count = max(1, math.ceil(len(order) / batch_size))
    return examples.batches(max(1, math.ceil(len(order) / count)), order)


class _Pool:
    """Moments of the union of parts of unlike size: the law of total variance, which is ``mix``."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._totals: dict[str, Moments[Any]] = {}
        self._means: dict[str, Moments[Any]] = {}  # those of the means of the examples

    def add(self, name: str, rows: Moments[Any], weight: int = 1) -> None:
        """Take in moments (N, C) or (N, C, 1, ...) at a norm layer, each row standing for ``weight``
        examples.
        """
        mean, var = (np.asarray(_on_host(part), np.float64) for part in (rows.mean, rows.var))
        mean, var = (part.reshape(part.shape[:2]) for part in (mean, var))
        if not len(mean):
            return
        before, size = self._counts.get(name, 0), weight * len(mean)
        self._counts[name] = before + size
        for totals, parts in ((self._totals, Moments(mean, var)), (self._means, Moments(mean, 0 * var))):
            pooled = pool(parts, axes=0)
            part = Moments(pooled.mean[0], pooled.var[0])
            totals[name] = mix(size / (before + size), part, totals.get(name, part))

    def moments(self) -> dict[str, Moments[Any]]:
        """Moments (C,) of everything, by name of norm layer."""
        if not self._totals:
            raise BnpatchError("no example could be read", "look at the files")
        return dict(self._totals)

    def standard_error(self) -> float:
        """Of the means, see :func:`calibrate`; infinite as long as there is one example."""
        errors = [
            self._means[name].var / total.var.clip(np.finfo(np.float64).tiny) / (count - 1)
            for name, total in self._totals.items()
            if (count := self._counts[name]) > 1
        ]
        return max((math.sqrt(error.mean()) for error in errors), default=math.inf)


def _on_host(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part
