"""Running moments from data, for places that have none."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bnpatch.data import Examples, Indices
from bnpatch.errors import BnpatchError
from bnpatch.graph.folded import folded_candidates, observe
from bnpatch.graph.session import open_session
from bnpatch.model import Patchable
from bnpatch.moments import Moments, mix, pool
from bnpatch.onnx_model import OnnxModel


def recover_folded(
    model: Patchable,
    examples: Examples,
    *,
    indices: Indices | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
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
    totals: list[Moments[Any] | None] = [None] * len(candidates)
    count = 0
    for batch in examples.batches(batch_size, indices):
        outputs = model.run(session, [name for pair in names for name in pair], batch.x)
        size = len(batch.indices)
        count += size
        for index, (mean, var) in enumerate(zip(outputs[::2], outputs[1::2], strict=True)):
            part = _over_examples(mean, var)
            total = totals[index]
            totals[index] = part if total is None else mix(size / count, part, total)
        on_batch(size)
    if not count:
        raise BnpatchError("no example could be read", "look at the files")
    model.calibrate({c.name: t for c, t in zip(candidates, totals, strict=True) if t is not None})
    return len(candidates)


def _over_examples(mean: Any, var: Any) -> Moments[Any]:
    """Moments (N, C, 1, ...) of single examples to those (C,) of all of them."""
    rows = (np.asarray(part, np.float64).reshape(mean.shape[:2]) for part in (mean, var))
    pooled = pool(Moments(*rows), axes=0)
    return Moments(pooled.mean[0], pooled.var[0])
