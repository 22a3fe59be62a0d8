"""Preparation of a search: give running statistics to norms that have none."""

from typing import Any

from bnpatch.data.dataset import Examples, Indices
from bnpatch.models.base import Model
from bnpatch.models.running_stats import calibrate
from bnpatch.models.running_stats import recover_folded as recover


def make_norms(
    model: Model[Any],
    calib: Examples | None,
    examples: Examples,
    tuning: Indices,
    *,
    batch_size: int,
    recover_folded: bool,
) -> list[str]:
    """Measure running statistics on data for norms that have none, which makes norm layers of them.

    Args:
        model: the model, which is changed.
        calib: examples to measure on; None for the tuning examples.
        examples: the examples to tune on and others.
        tuning: indices of the tuning examples.
        batch_size: examples per batch.
        recover_folded: also make norm layers of convolutions that a Batch Norm was fused into.

    Returns:
        Notes for the user.
    """
    notes = []
    images, indices = (examples, tuning) if calib is None else (calib, None)
    if recover_folded:
        recover(model, images, indices=indices, batch_size=batch_size)
        if calib is None:
            notes.append(
                "the moments of what was fused were taken from the tuning examples: a shift that all of "
                "them share is taken for normal (--calib-data: images like those of training)"
            )
    if names := calibrate(model, images, indices=indices, batch_size=batch_size):
        source = "the tuning examples (--calib-data says otherwise)" if calib is None else "--calib-data"
        notes.append(f"{len(names)} norms have no running statistics: they were taken from {source}")
    return notes
