"""Small pictures of held-out examples: what the model is given, and which answers the patch changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Examples
from bnpatch.search.held_out import Verdict

#: Longest side of a picture in pixels, and the number of pictures of each kind.
SIDE, MOST = 96, 8

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """A held-out example.

    Attributes:
        name: name of the file, or number of the example.
        pixels: its input without normalization, reduced to a small picture: (H, W) or (H, W, 3).
        target: its class; None where classes are unknown.
        answers: the predicted class without and with the patch; None where outputs are not classes.
        confidences: the probability of each of these answers.
    """

    name: str
    pixels: Pixels
    target: int | None = None
    answers: tuple[int, int] | None = None
    confidences: tuple[float, float] | None = None


@dataclass(frozen=True)
class Samples:
    """Held-out examples, drawn at random.

    Attributes:
        inputs: any of them.
        gained: examples that were wrong before and are right after.
        lost: examples that were right before and are wrong after.
        stretched: whether the inputs came as floats, so that black and white are the ends of each.
    """

    inputs: Sequence[Sample] = ()
    gained: Sequence[Sample] = ()
    lost: Sequence[Sample] = ()
    stretched: bool = False


def drawn(verdict: Verdict, examples: Examples, seed: int = 0) -> Samples:
    """Draw held-out examples, and make pictures of their inputs.

    Args:
        verdict: the verdict, which knows which examples it is about.
        examples: the examples that it is about.
        seed: seed of the draw.

    Returns:
        The samples; none where inputs are not images of one or three channels.
    """
    rng = np.random.default_rng(seed)

    def some(which: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return np.sort(rng.permutation(np.flatnonzero(which))[:MOST])

    chosen = [some(np.ones(len(verdict.indices))), some(np.zeros(0)), some(np.zeros(0))]
    if verdict.classes is not None:
        target, before, after = verdict.classes
        chosen[1] = some((before != target) & (after == target))
        chosen[2] = some((before == target) & (after != target))
    wanted = np.unique(verdict.indices[np.concatenate(chosen)])
    pixels: dict[int, Pixels] = {}
    stretched = False
    try:
        for batch in examples.batches(1, wanted):
            if batch.x.ndim != 4 or batch.x.shape[1] not in (1, 3):
                return Samples()
            stretched = batch.x.dtype != torch.uint8
            pixels[int(batch.indices[0])] = small(batch.x[0])
    except BnpatchError:  # an example is gone by now; pictures are no reason to lose what was found
        return Samples()

    def sample(position: int) -> Sample:
        index, classes, sure = int(verdict.indices[position]), verdict.classes, verdict.confidences
        about: list[Any] = [None, None, None]
        if classes is not None and sure is not None:
            target, *answers = classes[:, position].tolist()
            about = [target, tuple(answers), tuple(sure[:, position].tolist())]
        return Sample(examples.source.name(index), pixels[index], *about)

    # An example that can't be read any more is left out.
    kinds = ([sample(at) for at in positions if int(verdict.indices[at]) in pixels] for positions in chosen)
    inputs, gained, lost = kinds
    return Samples(inputs, gained, lost, stretched)


def small(x: Tensor) -> Pixels:
    """Reduce an input (C, H, W), bytes or floats, to a picture of at most :data:`SIDE` pixels a side."""
    values = x.cpu().numpy()
    if values.dtype != np.uint8:
        values = values.astype(np.float64)
        low, high = values.min(), values.max()
        values = (255 * (values - low) / (high - low) if high > low else 0 * values).round().astype(np.uint8)
    values = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(values))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
