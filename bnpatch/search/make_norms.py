"""What a search needs before it begins: norm layers that have running moments."""

from bnpatch.data.dataset import Examples, Indices
from bnpatch.models.base import Patchable
from bnpatch.models.running_stats import calibrate
from bnpatch.models.running_stats import recover_folded as recover


def make_norms(
    model: Patchable,
    calib: Examples | None,
    examples: Examples,
    tuning: Indices,
    *,
    batch_size: int,
    recover_folded: bool,
) -> list[str]:
    """Take running moments from data where a model has none.

    Args:
        model: norms without running moments become norm layers.
        calib: where the moments are from; None for the examples to tune on.
        examples: where those are.
        tuning: which they are.
        batch_size: examples at a time.
        recover_folded: take convolutions that a Batch Norm was fused into as norm layers, too.

    Returns:
        What the user should know of it, as notes.
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
        notes.append(f"{len(names)} norms have no running moments: they were taken from {source}")
    return notes
