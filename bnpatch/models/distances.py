"""How far images are from those of training, as the first norm layer sees them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import Moments, distance, pool
from bnpatch.data.dataset import Examples, Indices
from bnpatch.models.base import Model

# Number of images to run at a time.
_BATCH = 64


def first_moments(model: Model[Any], x: Tensor) -> tuple[str, Moments[Any], NormFacts] | None:
    """Return the first norm layer that a batch reaches, the moments (N, C) there, and what it has.

    Returns:
        The name, the moments and the facts; None if no norm layer has running
        statistics from training.
    """
    facts, (_, seen) = model.facts(), model.observe(x)
    name = next((name for name in seen if name in facts and name not in model.state.running), None)
    return None if name is None else (name, seen[name], facts[name])


def pooled_distance(moments: Moments[Any], facts: NormFacts) -> float:
    """Return the distance from the running statistics of the moments of all images together."""
    return float(distance(pool(doubles(moments), axes=0), doubles(facts.source), facts.eps)[0, 0])


def example_distances(
    model: Model[Any], examples: Examples, indices: Indices
) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Compute the distance of each example from the running statistics of the first norm layer.

        model = bnpatch.load("model.pt")
        examples = bnpatch.open_examples("val/", model, labels="optional")
        which, far = example_distances(model, examples, np.arange(len(examples)))

    It is the D of :func:`bnpatch.core.moments.distance`, by which slopes weigh an example.

    Args:
        model: the model; it is left as it was.
        examples: the examples.
        indices: which of them.

    Returns:
        The indices of those that can be read, of shape (N,), and their distances, of shape (N,); both are
        empty if no norm layer has running statistics from training.

    Raises:
        BnpatchError: the model does not take the examples.
    """
    which, found = [np.zeros(0, np.int64)], [np.zeros(0)]
    with model.in_state(model.baseline()):
        for batch in examples.batches(_BATCH, indices):
            if (first := first_moments(model, batch.x)) is None:
                break
            _, moments, facts = first
            far = distance(doubles(moments), doubles(facts.source), facts.eps)[:, 0]
            which.append(np.asarray(batch.indices))
            found.append(far.reshape(-1, len(batch.indices)).mean(0))  # over the calls of one module
    return np.concatenate(which), np.concatenate(found)


def doubles(moments: Moments[Any]) -> Moments[npt.NDArray[np.float64]]:
    """Return moments (C,) or (N, C) or (N, C, 1, ...) as doubles of shape (1 or N, C) on the host."""
    parts = (on_host(part).astype(np.float64) for part in (moments.mean, moments.var))
    return Moments(*(np.atleast_2d(part).reshape(-1, part.shape[min(1, part.ndim - 1)]) for part in parts))


def on_host(values: Any) -> npt.NDArray[Any]:
    """Return a tensor or an array as an array."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
