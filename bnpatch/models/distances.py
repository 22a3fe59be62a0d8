"""How far images are from those of training, as norm layers see them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import Moments, distance, pool
from bnpatch.data.dataset import Examples, Indices
from bnpatch.models.base import Model

# Number of images to run at a time.
_BATCH = 64


@dataclass(frozen=True)
class Shift:
    """How images differ from those of training, as one norm layer sees them.

    Attributes:
        norm_layer: name of the layer.
        distance: the distance of the moments of all images together from the running statistics.
        common_share: what part of the images' squared deviations is one shift that all share, in [0, 1].
    """

    norm_layer: str
    distance: float
    common_share: float


def shifts(model: Model[Any], x: Tensor) -> tuple[Shift, ...]:
    """Measure how images differ from those of training at each norm layer, in the order of the model.

    Args:
        model: the model, in the state in which it was trained.
        x: images (N, C, H, W) as bytes, or inputs.

    Returns:
        The shift at each norm layer that has running statistics from training and that the images reach.
    """
    facts, (_, seen) = model.facts(), model.observe(x)
    return tuple(
        Shift(name, pooled_distance(moments, facts[name]), _common_share(moments, facts[name]))
        for name, moments in seen.items()
        if name in facts and name not in model.state.running
    )


def first_shift(model: Model[Any], x: Tensor) -> tuple[Shift, ...]:
    """Measure the shift at the first norm layer alone, which takes a small part of the model.

    Returns:
        The first of :func:`shifts`, or nothing.
    """
    if (first := first_moments(model, x)) is None:
        return ()
    name, moments, facts = first
    return (Shift(name, pooled_distance(moments, facts), _common_share(moments, facts)),)


def first_moments(model: Model[Any], x: Tensor) -> tuple[str, Moments[Any], NormFacts] | None:
    """Observe a batch at the first norm layer that it reaches and that has statistics from training.

    Returns:
        The name of the layer, the moments (N, C) at its input, and its facts; None if there is no such layer.
    """
    facts = {name: fact for name, fact in model.facts().items() if name not in model.state.running}
    first = model.first_moments(x, facts)
    return None if first is None else (*first, facts[first[0]])


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
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no such type
    return np.asarray(values)


def _common_share(moments: Moments[Any], facts: NormFacts) -> float:
    """Return what part of the squared deviations of the images (mean, logarithm of variance) they share.

    The mean of N deviations that share nothing is not 0, so 1 / N, the share of independent ones, is taken
    off.
    """
    rows, source = doubles(moments), doubles(facts.source)
    total = source.var + facts.eps + np.finfo(np.float64).tiny
    deviations = np.concatenate(
        [(rows.mean - source.mean) / np.sqrt(total), np.log((rows.var + facts.eps) / total)], axis=1
    )
    whole, count = float(np.mean(deviations**2)), len(deviations)
    if not whole or count < 2:
        return 0.0
    share = float(np.mean(deviations.mean(0) ** 2)) / whole
    return min(1.0, max(0.0, (share - 1 / count) / (1 - 1 / count)))
