"""Files that a run writes after each epoch: its state, to resume from, and a table of its history."""

import csv
import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import atomic_path, write_text
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY

_FORMAT = 1


@dataclass(frozen=True)
class Epoch:
    """One epoch, as a line of ``metrics.csv``.

    Attributes:
        epoch: number of the epoch, from 1.
        lr: learning rate at the end of the epoch.
        batch_size: examples per process and forward pass.
        train_loss: mean loss over the training examples.
        accuracy: accuracy on the validation examples that the run selects by, in [0, 1].
        cross_entropy: cross-entropy on the same examples.
        seconds: wall time.
    """

    epoch: int
    lr: float
    batch_size: int
    train_loss: float
    accuracy: float
    cross_entropy: float
    seconds: float

    def score(self, metric: str) -> float:
        """Return the validation score of a metric, accuracy or cross-entropy."""
        return {ACCURACY.name: self.accuracy, CROSS_ENTROPY.name: self.cross_entropy}[metric]


def write_history(history: list[Epoch], path: str | os.PathLike[str]) -> None:
    """Write one line per epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Epoch)]
    writer.writerow(names)
    for epoch in history:
        values = (getattr(epoch, name) for name in names)
        writer.writerow([f"{value:.8g}" if isinstance(value, float) else value for value in values])
    write_text(path, text.getvalue())


def save_state(path: str | os.PathLike[str], run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a state for :func:`load_state`, atomically.

    Args:
        path: the file.
        run: what identifies the run, as plain JSON values: model, data, settings.
        state: tensors and plain values.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "run": json.dumps(run, sort_keys=True), **state}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: str | os.PathLike[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Read a state.

    Raises:
        BnpatchError: the file is damaged, or of another run; the error names the first difference.
    """
    path = Path(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        stored = json.loads(state["run"]) if state["format"] == _FORMAT else None
    # torch and pickle raise these for a file that is cut off or no checkpoint, and Python for missing keys.
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise BnpatchError(
            f"{path} is damaged: the run can't go on from it", "start anew without --resume"
        ) from error
    if stored is None:
        raise BnpatchError(f"{path} is of another version of bnpatch", "start anew without --resume")
    wanted = json.loads(json.dumps(run))
    if (key := difference(stored, wanted)) is not None:
        raise BnpatchError(
            f"{path} is of another run: {key} differs", "repeat the command as it was, or leave out --resume"
        )
    return dict(state)


def difference(a: Any, b: Any, name: str = "") -> str | None:
    """Return the dotted name of the first value in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            inner = f"{name}.{key}" if name else str(key)
            if key not in a or key not in b:
                return inner
            if (found := difference(a[key], b[key], inner)) is not None:
                return found
        return None
    return None if a == b else name
