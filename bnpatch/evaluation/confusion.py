"""Changes of recall and of mistakes, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassChange:
    """Numbers of right answers for one class, from which its recall follows.

    Attributes:
        target: the class.
        examples: number of examples of this class.
        before: number of right answers of the baseline.
        after: number of right answers with the patch.
    """

    target: int
    examples: int
    before: int
    after: int


@dataclass(frozen=True)
class MistakeChange:
    """Numbers of examples of one class that were classified as another.

    Attributes:
        target: the right class.
        answer: the predicted class.
        before: number of these mistakes of the baseline.
        after: number of these mistakes with the patch.
    """

    target: int
    answer: int
    before: int
    after: int


def class_changes(classes: npt.NDArray[np.int64]) -> list[ClassChange]:
    """Count right answers for all classes that have examples, in the order of classes.

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
    """Count the mistakes that became rarer or more frequent, the largest change first.

    Args:
        classes: see :func:`class_changes`.
        most: maximum number of mistakes to return.
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
    """Keep at most ``most`` classes, those with the largest changes in right answers, in their order."""
    kept = sorted(changes, key=lambda c: (-abs(c.after - c.before), c.target))[:most]
    return sorted(kept, key=lambda c: c.target)
