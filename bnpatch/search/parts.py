"""Split examples into those that a search may see and those that are held out to judge it."""

import numpy as np

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Examples, Indices, folds, split

#: With fewer labelled examples than this, a split in halves leaves too few to tune on and to judge by.
SCARCE = 150

#: Number of parts of a cross-fit, each of which is held out once.
_FOLDS = 5


def parts_of(
    examples: Examples, test: Examples | None, holdout: float | None, seed: int, needs_labels: bool
) -> list[tuple[Indices, Indices]]:
    """Choose the examples to tune on and those to judge by; a cross-fit has several such pairs.

    Raises:
        BnpatchError: the examples are too few, or of one class.
    """
    if needs_labels and examples.classes and len(np.unique(examples.targets)) < 2:
        raise BnpatchError(
            "all examples are of one class", "give data with the classes that the model tells apart"
        )
    everything = np.arange(len(examples), dtype=np.int64)
    if test is not None:
        parts = [(everything, np.arange(len(test), dtype=np.int64))]
    elif holdout is None and _FOLDS * 2 <= int((examples.strata >= 0).sum()) < SCARCE:
        held = folds(examples.strata, _FOLDS, seed)
        parts = [(np.setdiff1d(everything, held_out), held_out) for held_out in held]
    else:
        parts = [split(examples.strata, 0.5 if holdout is None else holdout, seed)]
    if any(len(tuning) < 2 or not len(held_out) for tuning, held_out in parts):
        raise BnpatchError(
            f"{len(examples)} examples are too few to tune on some and to judge by others", "give more data"
        )
    return parts
