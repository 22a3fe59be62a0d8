"""What a patch changes class by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassChange:
    """The recall of a class: which part of its examples is answered rightly.

    Attributes:
        target: the class.
        examples: of this class.
        before: how many of them were right as the model was.
        after: and are with the patch.
    """

    target: int
    examples: int
    before: int
    after: int


@dataclass(frozen=True)
class MistakeChange:
    """How often examples of one class were taken for another one.

    Attributes:
        target: their class.
        answer: what they were taken for.
        before: how often, as the model was.
        after: and with the patch.
    """

    target: int
    answer: int
    before: int
    after: int


def class_changes(classes: npt.NDArray[np.int64]) -> list[ClassChange]:
    """Of all classes that there are examples of, in their order.

    Args:
        classes: target, answer before and answer after of each example, (3, N).
    """
    targets, before, after = classes
    counts = np.bincount(targets)
    rights = [np.bincount(targets[answers == targets], minlength=len(counts)) for answers in (before, after)]
    return [
        ClassChange(int(k), int(counts[k]), int(rights[0][k]), int(rights[1][k])) for k in counts.nonzero()[0]
    ]


def mistake_changes(classes: npt.NDArray[np.int64], most: int) -> list[MistakeChange]:
    """The confusions that became rarer or more frequent, the largest change first; at most so many.

    Args:
        classes: see :func:`class_changes`.
        most: of them.
    """
    targets = classes[0]
    counts: dict[tuple[int, int], list[int]] = {}
    for side, answers in enumerate(classes[1:]):
        wrong = answers != targets
        pairs, numbers = np.unique(np.stack([targets[wrong], answers[wrong]]), axis=1, return_counts=True)
        for target, answer, number in zip(*pairs.tolist(), numbers.tolist(), strict=True):
            counts.setdefault((target, answer), [0, 0])[side] = number
    changes = [MistakeChange(*pair, *sides) for pair, sides in counts.items() if sides[0] != sides[1]]
    return sorted(changes, key=lambda c: (-abs(c.after - c.before), c.target, c.answer))[:most]


def most_changed(changes: Sequence[ClassChange], most: int) -> list[ClassChange]:
    """The classes whose recall changed by most examples, in the order of the classes; at most so many."""
    kept = sorted(changes, key=lambda c: (-abs(c.after - c.before), c.target))[:most]
    return sorted(kept, key=lambda c: c.target)
