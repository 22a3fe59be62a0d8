"""Compute running statistics from data: one pass over the examples, without labels.

:func:`calibrate` gives running statistics to Group Norm and other norms that have none,
:func:`recover_fused` to Batch Norm that was fused into convolutions. :func:`re_estimate_statistics`
re-estimates those of every norm layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import FUSED
from bnpatch.core.moments import Moments, mix, pool
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.data.sources import open_examples
from bnpatch.models.backend import Watch
from bnpatch.models.base import Model
from bnpatch.models.load import load

OnBatch = Callable[[int], None]


def recover_fused(
    model: nn.Module | Model[Any],
    images: Any,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: OnBatch = lambda count: None,
    **options: Any,
) -> int:
    """Add norm layers, in place, to a model whose Batch Norm was fused into its convolutions.

    The function computes the moments of the output of each such convolution over the images;
    :mod:`bnpatch.onnx.fused_conv` explains why they are enough. At alpha = 0 the model computes as before.

        model = bnpatch.load("fused.onnx")
        bnpatch.recover_fused(model, "train/")

    Args:
        model: a module, or what :func:`bnpatch.load` returns.
        images: see :func:`calibrate`.
        indices: indices of the images to use; None for all.
        batch_size: examples at a time; it changes the result only by rounding.
        on_batch: called with the number of examples of each batch, for progress.
        options: see :func:`bnpatch.open_examples`.

    Returns:
        The number of norm layers that were recovered.

    Raises:
        BnpatchError: the model has no such convolution, or no example can be read.
    """
    patchable = load(model) if isinstance(model, nn.Module) else model
    examples = _open(images, patchable, options)
    pooled, watch = _Pool(), None
    with patchable.in_state(patchable.baseline()):
        for batch in examples.batches(batch_size, indices):
            watch = watch or _watch(patchable, batch.x[:1])
            for name, rows in watch(batch.x).items():
                pooled.add(name + FUSED, rows)
            on_batch(len(batch.indices))
    found = pooled.moments()
    patchable.set_running(found)
    return len(found)


def _watch(model: Model[Any], example: Tensor) -> Watch:
    watch = model.watch_fused(example)
    if watch is None:
        has_norms = bool(model.inventory().norm_layers or model.uncalibrated())
        raise BnpatchError(
            f"{model.name} has no convolution that a Batch Norm may have been fused into",
            "leave out --recover-fused" if has_norms else "it has no norms either: take another model",
        )
    return watch


def calibrate(
    model: nn.Module | Model[Any],
    images: Any,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    tolerance: float | None = None,
    seed: int = 0,
    on_batch: OnBatch = lambda count: None,
    **options: Any,
) -> tuple[str, ...]:
    """Give running statistics to norms that have none, such as Group Norm, so that they can be patched.

    The function runs the unpatched model on the images and computes exact moments per channel of the input of
    each such norm, pooled over all positions of all examples. The split into batches changes them only by
    rounding. Afterwards Group Norm has alpha = 1, at which it computes the same as before.

    Batch Norm without running statistics normalizes by its batch while the moments are computed, and by the
    moments afterwards, at alpha = 0. Its output therefore changes, because a layer that does not use the
    batch can't compute the same. Large batches give better moments for it.

        model = bnpatch.load("timm:resnet50_gn")
        bnpatch.calibrate(model, "train/", limit=1000)

    Args:
        model: a module, or what :func:`bnpatch.load` returns.
        images: images like those that the model was trained on, in a form that :func:`bnpatch.open_examples`
            takes, or examples that it returned. Labels are not used. Don't use images with a shift (fog, for
            example), because the model would take the shift for normal.
        indices: indices of the images to use; None for all.
        batch_size: examples at a time.
        tolerance: stop when the standard error of the pooled means, in standard deviations and as the root
            mean square over channels, is at most this at every norm. None uses all images; 0.01 is enough.
        seed: seed of the order of the images.
        on_batch: called with the number of examples of each batch, for progress.
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
    with patchable.in_state(patchable.baseline()):
        for batch in _random_batches(examples, indices, batch_size, seed):
            _, seen = patchable.observe(batch.x)
            for name in names:
                if name in seen:
                    pooled.add(name, seen[name])
            on_batch(len(batch.indices))
            if tolerance is not None and pooled.standard_error() <= tolerance:
                break
    found = pooled.moments()  # a norm that no example reaches is missing
    patchable.set_running(found)
    return tuple(found)


def re_estimate_statistics(
    model: Model[Any],
    examples: Examples,
    *,
    indices: Indices | None = None,
    batch_size: int = 250,
    seed: int = 0,
    on_batch: OnBatch = lambda count: None,
) -> dict[str, Moments[Any]]:
    """Re-estimate running statistics on new data, which is also known as AdaBN or precise BN.

    The model runs once over the examples, in random order. Every Batch Norm normalizes by the moments of its
    batch, as in training; Group Norm computes what it always does. The moments are pooled over all batches.
    The model is left as it was.

    Args:
        model: any model.
        examples: the new data; labels are not used.
        indices: indices of the examples to use; None for all.
        batch_size: examples at a time. Earlier layers normalize by the moments of the batch, so a small
            batch makes the result noisy.
        seed: seed of the order.
        on_batch: called with the number of examples of each batch, for progress.

    Returns:
        By name of norm layer, mean and variance (C,), for
        :meth:`~bnpatch.core.patch.PatchState.with_re_estimated`. Norm layers that no example reaches are
        missing, and in ONNX files also those in branches.

    Raises:
        BnpatchError: no example can be read.
    """
    if not model.alphas():
        model.set_alphas(0.0)  # raises, with the reasons
    pooled = _Pool()
    for batch in _random_batches(examples, indices, batch_size, seed):
        for name, moments in model.moments_by_batch(batch.x).items():
            pooled.add(name, Moments(moments.mean[None], moments.var[None]), weight=len(batch.indices))
        on_batch(len(batch.indices))
    return pooled.moments()


def _open(images: Any, model: Model[Any], options: Mapping[str, Any]) -> Examples:
    if isinstance(images, Examples):
        return images
    return open_examples(images, model, labels="optional", classes=False, **options)


def _random_batches(
    examples: Examples, indices: Indices | None, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Yield batches in random order and of about equal size.

    The order is random because folders are sorted by class. The sizes are equal because the moments of a
    small last batch would be noisy.
    """
    order = np.random.default_rng(seed).permutation(np.arange(len(examples)) if indices is None else indices)
    count = max(1, math.ceil(len(order) / batch_size))
    return examples.batches(max(1, math.ceil(len(order) / count)), order)


class _Pool:
    """Pools moments of parts of different size, by ``mix``, which is the law of total variance."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._totals: dict[str, Moments[Any]] = {}
        self._means: dict[str, Moments[Any]] = {}  # moments of the means of the examples

    def add(self, name: str, rows: Moments[Any], weight: int = 1) -> None:
        """Add moments (N, C) or (N, C, 1, ...) at a norm layer; a row stands for ``weight`` examples."""
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
        """Return the moments (C,) of everything that was added, by name of norm layer."""
        if not self._totals:
            raise BnpatchError("no example could be read", "look at the files")
        return dict(self._totals)

    def standard_error(self) -> float:
        """Return the standard error of the means, see :func:`calibrate`; infinite after one example."""
        errors = [
            self._means[name].var / total.var.clip(np.finfo(np.float64).tiny) / (count - 1)
            for name, total in self._totals.items()
            if (count := self._counts[name]) > 1
        ]
        return max((math.sqrt(error.mean()) for error in errors), default=math.inf)


def _on_host(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part
