"""Small pictures of held-out examples: what the model is given, and which answers the patch changes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.confusion import class_changes, most_changed
from bnpatch.models.base import Model
from bnpatch.models.distances import example_distances, on_host
from bnpatch.search.held_out import HeldOutEvaluation

#: Longest side of a picture in pixels, and the number of pictures of each kind.
SIDE, MOST = 96, 8

#: Number of classes that have pictures of their own, and of pictures of each.
MOST_CLASSES, MOST_OF_CLASS = 6, 4

#: Number of held-out examples, drawn at random, whose distances are measured to find the farthest.
MOST_MEASURED = 1000

Pixels = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """A held-out example.

    Attributes:
        name: name of the file, or number of the example.
        pixels: its input without normalization, reduced to a small picture: (H, W) or (H, W, 3).
        target: its class; None where classes are unknown.
        answers: the predicted class without and with the patch; None where outputs are not classes.
        confidences: the probability of each of these answers.
        distance: its distance from the running statistics of the first norm layer, of the farthest.
    """

    name: str
    pixels: Pixels
    target: int | None = None
    answers: tuple[int, int] | None = None
    confidences: tuple[float, float] | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Samples:
    """Some held-out examples.

    Attributes:
        inputs: any of them, drawn at random.
        gained: examples that were wrong before and are right after, drawn at random.
        lost: examples that were right before and are wrong after, drawn at random.
        by_class: of the classes whose numbers of right answers change most, examples of both kinds.
        farthest: the examples that lie farthest from the running statistics of the first norm layer.
        num_measured: number of examples whose distance was measured.
        stretched: whether the inputs came as floats, so that black and white are the ends of each.
    """

    inputs: Sequence[Sample] = ()
    gained: Sequence[Sample] = ()
    lost: Sequence[Sample] = ()
    by_class: Mapping[int, Sequence[Sample]] = field(default_factory=dict)
    farthest: Sequence[Sample] = ()
    num_measured: int = 0
    stretched: bool = False


def drawn(held_out: HeldOutEvaluation, model: Model[Any], examples: Examples, seed: int = 0) -> Samples:
    """Draw held-out examples, and make pictures of their inputs.

    Args:
        held_out: the held-out evaluation, which has the indices and the answers.
        model: the model, which measures distances; it is left as it was.
        examples: the data set that the indices are of.
        seed: seed of the draw.

    Returns:
        The samples; none where inputs are not images of one or three channels.
    """
    rng = np.random.default_rng(seed)

    def some(which: npt.NDArray[Any], most: int = MOST) -> Positions:
        return np.sort(rng.permutation(np.flatnonzero(which))[:most])

    inputs, gained, lost = some(np.ones(len(held_out.indices))), *[np.zeros(0, np.int64)] * 2
    by_class: dict[int, Positions] = {}
    if held_out.classes is not None:
        target, before, after = held_out.classes
        became_right, became_wrong = (
            (a != target) & (b == target) for a, b in ((before, after), (after, before))
        )
        gained, lost = some(became_right), some(became_wrong)
        for change in most_changed(class_changes(held_out.classes), MOST_CLASSES):
            if change.before != change.after:
                by_class[change.target] = some(
                    (became_right | became_wrong) & (target == change.target), MOST_OF_CLASS
                )
    try:
        measured = some(np.ones(len(held_out.indices)), MOST_MEASURED)
        far, num_measured = _farthest(held_out, model, examples, measured)
        every = np.concatenate([inputs, gained, lost, *by_class.values(), np.array([*far], np.int64)])
        pixels, stretched = _pixels(examples, np.unique(held_out.indices[every]))
    except BnpatchError:  # an example is gone by now; pictures are no reason to lose what was found
        far, num_measured, pixels, stretched = {}, 0, {}, False
    if not pixels:
        return Samples()

    def samples(positions: Iterable[int]) -> list[Sample]:
        found = []
        for at in map(int, positions):
            # An example that can't be read any more is left out.
            if (index := int(held_out.indices[at])) in pixels:
                name, about = examples.source.name(index), _answers(held_out, at)
                found.append(Sample(name, pixels[index], *about, far.get(at)))
        return found

    return Samples(
        samples(inputs),
        samples(gained),
        samples(lost),
        {target: samples(positions) for target, positions in by_class.items()},
        samples(far),
        num_measured,
        stretched,
    )


def _farthest(
    held_out: HeldOutEvaluation, model: Model[Any], examples: Examples, positions: Positions
) -> tuple[dict[int, float], int]:
    """Return the largest distances by position, the largest first, and how many were measured."""
    which, distances = example_distances(model, examples, held_out.indices[positions])
    at = dict(zip(held_out.indices[positions].tolist(), positions.tolist(), strict=True))
    order = np.argsort(-distances, kind="stable")[:MOST]
    return {at[int(which[n])]: float(distances[n]) for n in order}, len(distances)


def _answers(held_out: HeldOutEvaluation, at: int) -> tuple[Any, Any, Any]:
    """Return the class of an example, its answers, and their confidences; None each where unknown."""
    if held_out.classes is None or held_out.confidences is None:
        return None, None, None
    target, *answers = held_out.classes[:, at].tolist()
    return target, tuple(answers), tuple(held_out.confidences[:, at].tolist())


def _pixels(examples: Examples, indices: Indices) -> tuple[dict[int, Pixels], bool]:
    """Return small pictures by index, and whether they were floats; none where inputs are no pictures."""
    pixels: dict[int, Pixels] = {}
    stretched = False
    for batch in examples.batches(1, indices):
        if batch.x.ndim != 4 or batch.x.shape[1] not in (1, 3):
            return {}, False
        stretched = batch.x.dtype != torch.uint8
        pixels[int(batch.indices[0])] = small(batch.x[0])
    return pixels, stretched


def small(x: Tensor) -> Pixels:
    """Reduce an input (C, H, W), bytes or floats, to a picture of at most :data:`SIDE` pixels a side."""
    values = on_host(x)
    if values.dtype != np.uint8:
        values = values.astype(np.float64)
        low, high = values.min(), values.max()
        values = (255 * (values - low) / (high - low) if high > low else 0 * values).round().astype(np.uint8)
    values = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(values))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
