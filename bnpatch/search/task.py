"""What a search is given: model, data and settings, all opened and checked."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnpatch.data.dataset import Examples, Indices
from bnpatch.models.base import Model
from bnpatch.search.config import Plan
from bnpatch.search.keep import KeepSet
from bnpatch.search.objective import ObjectiveSpec


@dataclass(frozen=True, eq=False)
class Task:
    """A model to tune, the examples to tune it on and to judge it by, and the settings of the search.

    Attributes:
        model: the model.
        spec: what is tuned.
        examples: the examples to tune on.
        seen: the examples as the search scores them: the same, or augmented.
        test_examples: the examples to judge by; they may be the same data set.
        test_seen: these, augmented likewise.
        calib: examples to re-estimate statistics on; None for those to tune on.
        parts: indices of examples to tune on (in ``examples``) and to judge by (in ``test_examples``); a
            cross-fit has several such pairs.
        plan: settings of the search.
        max_overhead: maximum ratio of the patched model's latency to the baseline's; None for no limit.
        keep: images on which a patch must do no harm; None for none.
        margin: the loss of accuracy that is accepted on them, as a fraction.
    """

    model: Model[Any]
    spec: ObjectiveSpec
    examples: Examples
    seen: Examples
    test_examples: Examples
    test_seen: Examples
    calib: Examples | None
    parts: Sequence[tuple[Indices, Indices]]
    plan: Plan
    max_overhead: float | None = None
    keep: Examples | None = None
    margin: float = 0.005

    @property
    def tuning(self) -> Indices:
        """All examples to tune on."""
        return self.parts[0][0] if len(self.parts) == 1 else np.arange(len(self.examples), dtype=np.int64)

    @property
    def held_out(self) -> Indices:
        """All examples to judge by."""
        return np.concatenate([held_out for _, held_out in self.parts])

    @property
    def is_augmented(self) -> bool:
        """Whether the search scores shifted examples."""
        return self.seen is not self.examples

    @property
    def num_searches(self) -> int:
        """One search, and in a cross-fit one more without each part."""
        return 1 if len(self.parts) == 1 else 1 + len(self.parts)

    def keep_set(self, count: Callable[[str, int], None]) -> KeepSet | None:
        """The images to keep, compared with the present state of the model; None where there are none.

        Args:
            count: called with a label and the number of images that were scored.
        """
        if self.keep is None:
            return None
        return KeepSet(self.model, self.keep, self.margin, self.plan.batch_size, self.plan.seed, count)

    def fingerprint(self) -> dict[str, Any]:
        """What a study was made with: its trials are invalid for another model, other data or metrics."""
        norm_layers = json.dumps(self.model.fingerprints(), sort_keys=True)
        return {
            "model": hashlib.sha256(norm_layers.encode()).hexdigest()[:16],
            "preprocessing": None if self.examples.as_they_are else self.model.preprocessing.to_json(),
            "data": self.seen.fingerprint(),
            "calibration data": None if self.calib is None else self.calib.fingerprint(),
            "weigh single values": self.model.state.include_1x1,
            "metric": self.spec.metric.name,
            "class prior": str(self.spec.prior),
            "seed": self.plan.seed,
        }

    def skipped(self) -> dict[str, str]:
        """The reason for each example that can't be read, by its name."""
        return {
            examples.source.name(index): why
            for examples in (self.examples, self.test_examples, self.keep)
            if examples is not None
            for index, why in examples.skipped.items()
        }
