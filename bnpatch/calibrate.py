"""Running moments from data: exact, pooled over all examples, in one pass, and free of labels."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnpatch.data import Examples, Indices
from bnpatch.errors import BnpatchError
from bnpatch.graph.folded import FOLDED, folded_candidates, observe
from bnpatch.graph.session import open_session
from bnpatch.model import Patchable
from bnpatch.moments import Moments, mix, pool
from bnpatch.onnx_model import OnnxModel

OnBatch = Callable[[int], None]


def recover_folded(
    model: Patchable,
    examples: Examples,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: OnBatch = lambda count: None,
) -> int:
    """Give a model whose Batch Norm was folded into its convolutions sites again, in place.

    The moments of what each such convolution puts out are taken over the examples, no labels needed; see
    :mod:`bnpatch.graph.folded` for why they are enough. At alpha = 0 the model computes what it did.

    Args:
        model: an ONNX model.
        examples: what it is used on.
        indices: which of them; None for all.
        batch_size: examples at a time; it changes the result by rounding only.
        on_batch: called with the number of examples done, for progress.

    Returns:
        The number of sites that were recovered.

    Raises:
        BnpatchError: the model is not an ONNX one, has no such convolution, or no example can be read.
    """
    if not isinstance(model, OnnxModel):
        raise BnpatchError(f"{model.name} is not an ONNX model", "leave out --recover-folded")
    graph = model.graph.clone()
    candidates = [c for c in folded_candidates(graph) if c.node.graph is graph.graph]
    if not candidates:
        raise BnpatchError(
            f"{model.name} has no convolution that a Batch Norm may have been folded into",
            "leave out --recover-folded",
        )
    names = observe(graph, candidates)
    session = open_session(graph, model.device)
    pooled = _Pool()
    for batch in examples.batches(batch_size, indices):
        outputs = model.run(session, [name for pair in names for name in pair], batch.x)
        pairs = zip(candidates, outputs[::2], outputs[1::2], strict=True)
        pooled.add({c.name + FOLDED: _over_examples(mean, var) for c, mean, var in pairs}, len(batch.indices))
        on_batch(len(batch.indices))
    model.calibrate(pooled.moments())
    return len(candidates)


def calibrate(
    model: Patchable,
    examples: Examples,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: OnBatch = lambda count: None,
) -> tuple[str, ...]:
    """Give running moments to norms that have none, in place: Group Norm and its kin become sites.

    Exact moments per channel of the input of each such norm, pooled over all positions of all examples,
    while the model computes what it always did: the result does not depend on how the examples are
    split into batches, but for rounding. The model computes the same afterwards.

    Args:
        model: any model.
        examples: images like those that the model was trained on, labels unused. Images that are
            shifted describe the shift as if it were normal.
        indices: which of them; None for all.
        batch_size: examples at a time.
        on_batch: called with the number of examples done, for progress.

    Returns:
        The names of the norms that are sites now.

    Raises:
        BnpatchError: no example can be read.
    """
    if not (names := model.uncalibrated()):
        return ()
    pooled = _Pool()
    with model.borrowed():
        for batch in examples.batches(batch_size, indices):
            _, seen = model.observe(batch.x)
            parts = {n: _over_examples(seen[n].mean, seen[n].var) for n in names if n in seen}
            pooled.add(parts, len(batch.indices))
            on_batch(len(batch.indices))
    found = pooled.moments()  # a norm that no example reaches is missing
    model.calibrate(found)
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

    One pass, in random order, in which every norm normalizes by the moments of its batch, as in
    training; they are pooled over all batches. The model stays as it is.

    Args:
        model: any model.
        examples: the data at hand, labels unused.
        indices: which of them; None for all.
        batch_size: examples at a time. The moments by which the layers below normalize are the batch's, so
            a small batch makes noisy ones.
        seed: of the order.
        on_batch: called with the number of examples done, for progress.

    Returns:
        Mean and variance (C,) by name of site, for :meth:`Patchable.retarget`.

    Raises:
        BnpatchError: no example can be read.
    """
    order = np.random.default_rng(seed).permutation(np.arange(len(examples)) if indices is None else indices)
    pooled = _Pool()
    for batch in examples.batches(batch_size, order):
        seen = model.moments_by_batch(batch.x)
        arrays = {
            name: Moments(*(np.asarray(p.cpu(), np.float64) for p in (m.mean, m.var)))
            for name, m in seen.items()
        }
        pooled.add(arrays, len(batch.indices))
        on_batch(len(batch.indices))
    return pooled.moments()


class _Pool:
    """Moments of the union of parts of unlike size: the law of total variance, which is ``mix``."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[int, Moments[Any]]] = {}
        self._count = 0

    def add(self, parts: Mapping[str, Moments[Any]], size: int) -> None:
        """Take in the moments (C,) of ``size`` further examples, by name of site."""
        self._count += size
        for name, part in parts.items():
            before, total = self._totals.get(name, (0, part))
            self._totals[name] = (before + size, mix(size / (before + size), part, total))

    def moments(self) -> dict[str, Moments[Any]]:
        """Moments (C,) of everything, by name of site."""
        if not self._count:
            raise BnpatchError("no example could be read", "look at the files")
        return {name: total for name, (_, total) in self._totals.items()}


def _over_examples(mean: Any, var: Any) -> Moments[Any]:
    """Moments (N, C, 1, ...) of single examples to those (C,) of all of them."""
    rows = (np.asarray(part, np.float64).reshape(part.shape[:2]) for part in (mean, var))
    pooled = pool(Moments(*rows), axes=0)
    return Moments(pooled.mean[0], pooled.var[0])
