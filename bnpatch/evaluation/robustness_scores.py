"""The errors of a benchmark by condition, kept in a file so that a run that was killed goes on."""

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import atomic_path
from bnpatch.core.text import counted
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.metrics import Values

#: A kind of corruption and its severity.
Condition = tuple[str, int]

CLEAN: Condition = ("clean", 0)  #: stands for the images as they are

# What share of the answers to the images as they are may differ from those in the file. Other devices and
# batch sizes round otherwise, which changes few answers; another model changes more.
_ROUNDING = 0.01

_FINGERPRINT, _INDICES = "fingerprint", "indices"


class ScoreFile:
    """The errors of each state of a model under each condition.

    The file is an .npz archive. It is written anew, as a whole, after each condition.

    Args:
        path: the file; None to keep the errors in memory only.
        fingerprint: what the errors depend on, as plain values by name.

    Raises:
        BnpatchError: the file is no such file, or has another fingerprint.
    """

    def __init__(self, path: str | PathLike[str] | None, fingerprint: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = json.dumps(fingerprint, sort_keys=True)
        self._errors: dict[Condition, list[Values]] = {}
        self._indices: Indices | None = None
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def __contains__(self, condition: Condition) -> bool:
        """Tell whether the errors under a condition are known."""
        return condition in self._errors

    @property
    def indices(self) -> Indices:
        """Indices of the examples that were scored, (N,), the same under all conditions."""
        assert self._indices is not None  # something was added
        return self._indices

    def errors(self, conditions: Iterable[Condition]) -> list[dict[Condition, Values]]:
        """Return the errors (N,) by condition, for each state."""
        rows = {condition: self._errors[condition] for condition in conditions}
        num_states = len(next(iter(rows.values())))
        return [{condition: row[state] for condition, row in rows.items()} for state in range(num_states)]

    def add(self, condition: Condition, indices: Indices, errors: Sequence[Values]) -> None:
        """Add the errors under a condition, (N,) for each state, and write the file.

        Errors under a condition that is known must be the same, but for a few that rounding may change.

        Raises:
            BnpatchError: they are not, the examples are not the same as before, or the file can't be written.
        """
        if self._indices is not None and not np.array_equal(indices, self._indices):
            raise BnpatchError(
                f"{counted(len(self._indices), 'image')} could be read before, now {len(indices)}",
                "see that the files of the data set stay as they are, and start again with another --output",
            )
        if known := self._errors.get(condition):
            changed = max(float(np.mean(a != b)) for a, b in zip(known, errors, strict=True))
            if changed > _ROUNDING:
                raise self._of_another_run(f"answers to {changed:.1%} of the images are others now")
        self._indices, self._errors[condition] = indices, list(errors)
        if self._path is not None:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        rows = {_key(condition): np.stack(row).astype(np.uint8) for condition, row in self._errors.items()}
        about = {_FINGERPRINT: np.array(self._fingerprint), _INDICES: self.indices}
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **about, **rows)  # type: ignore[arg-type]

    def _read(self, path: Path) -> None:
        try:
            with np.load(path) as content:
                arrays = {name: content[name] for name in content.files}
            fingerprint, self._indices = str(arrays.pop(_FINGERPRINT)), arrays.pop(_INDICES)
            self._errors = {_condition(key): list(rows.astype(np.float64)) for key, rows in arrays.items()}
        # NumPy and zipfile raise these for a file that is cut off, is no archive, or lacks an array.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BnpatchError(
                f"{path} has no scores that can be read", "delete it, or choose another --output"
            ) from error
        if fingerprint != self._fingerprint:
            before, now = json.loads(fingerprint), json.loads(self._fingerprint)
            changed = [name for name in now if before.get(name) != now[name]]
            raise self._of_another_run(f"{' and '.join(changed)} changed")

    def _of_another_run(self, reason: str) -> BnpatchError:
        return BnpatchError(
            f"{self._path} keeps the scores of another run: {reason}",
            "delete it, or choose another --output",
        )


def _key(condition: Condition) -> str:
    return f"{condition[0]}/{condition[1]}"


def _condition(key: str) -> Condition:
    kind, severity = key.split("/")
    return kind, int(severity)
