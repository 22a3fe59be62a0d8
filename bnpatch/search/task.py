"""What a search is given: model, data and settings, all opened and checked."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted
from bnpatch.data.corruptions import augmented
from bnpatch.data.dataset import Examples, Indices, folds, others, split
from bnpatch.data.groups import warn_of_shared_groups
from bnpatch.data.sources import open_examples
from bnpatch.evaluation.metrics import METRICS
from bnpatch.models.base import Model
from bnpatch.models.running_stats import calibrate, recover_fused
from bnpatch.search.config import Plan
from bnpatch.search.keep import KeepSet
from bnpatch.search.objective import ObjectiveSpec

#: With fewer labelled examples (or groups of examples) than this, halves of them are too few to tune on and
#: to judge by, so there is a cross-fit.
SCARCE = 150

#: Number of parts of a cross-fit, each of which is held out once.
_FOLDS = 5


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
        keep: images on which a patch must do no harm; None for none.
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
    keep: Examples | None = None

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
        """The number of searches: one, and in a cross-fit one more without each part."""
        return 1 if len(self.parts) == 1 else 1 + len(self.parts)

    def keep_set(self, count: Callable[[str, float], None]) -> KeepSet | None:
        """Make the set of images to keep, for the present state of the model; None where there are none.

        Args:
            count: called with a label and the number of images that were scored.
        """
        if self.keep is None:
            return None
        plan = self.plan
        return KeepSet(self.model, self.keep, plan.margin, plan.batch_size, plan.seed, count)

    def make_norms(self) -> list[str]:
        """Estimate running statistics for norms that have none, so that they become norm layers.

        With the option ``recover_fused``, convolutions that a Batch Norm was fused into become norm layers.

        Returns:
            Notes for the user.
        """
        notes = []
        images, indices = (self.examples, self.tuning) if self.calib is None else (self.calib, None)
        if self.plan.recover_fused:
            recover_fused(self.model, images, indices=indices, batch_size=self.plan.batch_size)
            if self.calib is None:
                notes.append(
                    "the moments of what was fused were taken from the tuning examples: a shift that all of "
                    "them share is taken for normal (--calib-data: images like those of training)"
                )
        if names := calibrate(self.model, images, indices=indices, batch_size=self.plan.batch_size):
            is_own = self.calib is None
            source = "the tuning examples (--calib-data says otherwise)" if is_own else "--calib-data"
            norms = counted(len(names), "norm")
            notes.append(f"the running statistics of {norms} without any were taken from {source}")
        return notes

    def some_inputs(self) -> Tensor | None:
        """Return up to four inputs (N, ...) of tuning examples; None if they can't be read."""
        some = self.tuning[:: -(-len(self.tuning) // 4)]
        batch = next(self.examples.batches(4, some), None)
        return None if batch is None else batch.x

    def fingerprint(self) -> dict[str, Any]:
        """Return what the trials of a study depend on: the model, the data, the metric and settings."""
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
        """Return the reason for each example that can't be read, by its name."""
        return {
            examples.source.name(index): why
            for examples in (self.examples, self.test_examples, self.keep)
            if examples is not None
            for index, why in examples.skipped.items()
        }


def open_task(
    model: Model[Any],
    spec: ObjectiveSpec,
    plan: Plan,
    sources: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Task:
    """Open the data of a search, and split it into what the search sees and what judges.

    Args:
        model: the model.
        spec: what is tuned.
        plan: settings of the search.
        sources: what :func:`bnpatch.open_examples` takes, by name of the parameter of
            :func:`bnpatch.tune_alpha`: ``data``, and ``test_data``, ``calib_data`` and ``keep`` or None.
        options: options of :func:`bnpatch.open_examples`. Groups given as labels are those of ``data``; a
            function of names also groups other data.

    Raises:
        BnpatchError: the data can't be used.
    """

    def opened(name: str, needs_labels: bool) -> Examples:
        if isinstance(source := sources[name], Examples):
            if options.get("groups") is not None:
                raise BnpatchError("the examples are open already", "give groups to open_examples instead")
            return source
        labels: Literal["required", "optional"] = "required" if needs_labels else "optional"
        is_grouped = source is sources["data"] or callable(options.get("groups"))
        own = options if is_grouped else {**options, "groups": None}
        return open_examples(source, model, labels=labels, classes=spec.classes, seed=plan.seed, **own)

    def seen(examples: Examples) -> Examples:
        return examples if plan.augment is None else augmented(examples, plan.augment, plan.seed)

    if sources["keep"] is not None and not spec.classes:
        raise BnpatchError(
            f"{spec.metric.name} is not about classes, so answers to keep are unknown",
            f"tune for one of {', '.join(METRICS)}, or leave out the images to keep",
        )
    examples = opened("data", spec.needs_labels)
    preprocessing = model.preprocessing  # with the size of the data to tune on
    test = None if sources["test_data"] is None else opened("test_data", spec.needs_labels)
    judging = examples if test is None else test
    if test is not None and callable(rule := options.get("groups")):
        warn_of_shared_groups(rule, examples.source, test.source)
    task = Task(
        model,
        spec,
        examples,
        seen(examples),
        judging,
        seen(judging),
        None if sources["calib_data"] is None else opened("calib_data", False),
        parts_of(examples, test, plan.holdout, plan.seed, spec.needs_labels),
        plan,
        None if sources["keep"] is None else opened("keep", False),
    )
    model.preprocessing = preprocessing
    return task


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
            f"{counted(count, 'example')}: too few to tune on some and to judge by others", "give more data"
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
