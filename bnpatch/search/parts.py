"""Split examples into those that a search may see and those that are held out to judge it."""

from collections.abc import Sequence

import numpy as np

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Examples, Indices, folds, others, split

#: With fewer labelled examples than this, or groups of them, a split in halves leaves too few to tune on and
#: to judge by.
SCARCE = 150

#: Number of parts of a cross-fit, each of which is held out once.
_FOLDS = 5


def parts_of(
    examples: Examples, test: Examples | None, holdout: float | None, seed: int, needs_labels: bool
) -> list[tuple[Indices, Indices]]:
    """Choose the examples to tune on and those to judge by; a cross-fit has several such pairs.

    Raises:
        BnpatchError: the examples or their groups are too few, or the examples are of one class.
    """
    if needs_labels and examples.classes and len(np.unique(examples.targets)) < 2:
        raise BnpatchError(
            "all examples are of one class", "give data with the classes that the model tells apart"
        )
    groups, count = examples.groups, len(examples)
    labelled = np.flatnonzero(examples.strata >= 0)
    units = len(labelled) if groups is None else len(np.unique(groups[labelled]))
    if test is not None:
        parts = [(np.arange(count, dtype=np.int64), np.arange(len(test), dtype=np.int64))]
    elif holdout is None and _FOLDS * 2 <= units < SCARCE:
        held = folds(examples.strata, _FOLDS, seed, groups)
        parts = [(others(held_out, count, groups), held_out) for held_out in held]
    else:
        parts = [split(examples.strata, 0.5 if holdout is None else holdout, seed, groups)]
    if any(len(tuning) < 2 or not len(held_out) for tuning, held_out in parts):
        raise BnpatchError(
            f"{count} examples are too few to tune on some and to judge by others", "give more data"
        )
    _check_groups(examples, examples if test is None else test, parts)
    return parts


def _check_groups(examples: Examples, test: Examples, parts: Sequence[tuple[Indices, Indices]]) -> None:
    """Check that there are two groups to learn from and to select by, and two to judge by."""
    tuned = [examples.num_groups(tuning) for tuning, _ in parts]
    judges = test.num_groups(np.concatenate([held_out for _, held_out in parts]))
    for use, count in [*(("tune on", count) for count in tuned), ("judge by", judges)]:
        if count == 1:
            raise BnpatchError(
                f"all examples to {use} are of one group", "give images of more groups, ten or more"
            )
