"""How well a model does on images with the standard corruptions, as it is and patched.

The benchmark is that of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", ICLR 2019: fifteen kinds of corruption in five severities. The images are the user's own,
and they are corrupted after they were resized and cropped, as those of ImageNet-C are.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchState
from bnpatch.core.recipe import Recipe
from bnpatch.data.corruptions import corrupted
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.sources import open_examples
from bnpatch.data.standard_corruptions import SEVERITIES, check_installed, parse_standard_kinds
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import (
    ACCURACY,
    Comparison,
    Estimate,
    Metric,
    Values,
    mean_estimate,
    no_scores,
    paired,
)
from bnpatch.evaluation.robustness_scores import CLEAN, Condition, ScoreFile
from bnpatch.models.base import Model
from bnpatch.models.load import load

#: The top-1 error, which is what the benchmark reports. It is computed from the accuracy.
ERROR = Metric("error", no_scores, higher_is_better=False, is_rate=True)


@dataclass(frozen=True)
class Progress:
    """How far a benchmark is.

    Attributes:
        label: what is being scored.
        done: number of images that were scored in this run, each state and each corruption counted.
        total: number of images that this run scores.
        seconds_left: estimated remaining time.
    """

    label: str
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Robustness:
    """What a benchmark found: who was wrong, image by image.

    Attributes:
        model: name of the model.
        kinds: the kinds of corruption.
        severities: their severities.
        before: errors of the model as it is by (kind, severity), of shape (N,), 1 where the answer is wrong;
            :data:`~bnpatch.evaluation.robustness_scores.CLEAN` stands for the images as they are.
        after: the same of the patched model; None if there is no patch.
        groups: the group of each image, (N,); None if all are independent.
        skipped: why images were left out, by name.
    """

    model: str
    kinds: tuple[str, ...]
    severities: tuple[int, ...]
    before: Mapping[Condition, Values]
    after: Mapping[Condition, Values] | None
    groups: Indices | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """Number of images."""
        return len(self.before[CLEAN])

    def comparison(self, condition: Condition = CLEAN) -> Comparison:
        """Compare the errors under one corruption, by default on the images as they are."""
        return self._compared([condition])

    def of_kind(self, kind: str) -> Comparison:
        """Compare the errors under one kind of corruption, the mean of its severities."""
        return self._compared([(kind, severity) for severity in self.severities])

    def mean_error(self) -> Comparison:
        """Compare the errors under corruption, the mean of all kinds and severities."""
        return self._compared([(kind, severity) for kind in self.kinds for severity in self.severities])

    def corruption_error(self, kind: str) -> float | None:
        """Return the error of the patched model under a kind of corruption over that of the model as it is.

        Both are sums over the severities. The paper divides by the errors of AlexNet; here the model is
        compared with itself, so that less than 1 is a gain. The value is None if there is no patch, or if
        the model as it is makes no error.
        """
        compared = self.of_kind(kind)
        if self.after is None or not compared.before.value:
            return None
        return compared.after.value / compared.before.value

    def mean_corruption_error(self) -> Estimate | None:
        """Return the mean of :meth:`corruption_error` over the kinds that have one, with a 95% interval.

        The interval is by image (or group), since all conditions share their images: the mean of ratios is
        linearized, so that it becomes a mean over images. The result is None if no kind has a value.
        """
        if self.after is None:
            return None
        parts = []
        for kind in self.kinds:
            conditions = [(kind, severity) for severity in self.severities]
            before, after = (self._mean_over(errors, conditions) for errors in (self.before, self.after))
            if mean := float(before.mean()):
                ratio = float(after.mean()) / mean
                parts.append(ratio + (after - ratio * before) / mean)
        return mean_estimate(np.mean(parts, axis=0), self.groups) if parts else None

    def _compared(self, conditions: Sequence[Condition]) -> Comparison:
        before = self._mean_over(self.before, conditions)
        after = before if self.after is None else self._mean_over(self.after, conditions)
        return paired(ERROR, before, after, self.groups)

    @staticmethod
    def _mean_over(errors: Mapping[Condition, Values], conditions: Sequence[Condition]) -> Values:
        mean: Values = np.mean([errors[condition] for condition in conditions], axis=0)
        return mean


def robustness(
    model: str | PathLike[str] | nn.Module | Model[Any],
    data: Any,
    recipe: str | PathLike[str] | Recipe | None = None,
    *,
    kinds: str | Sequence[str] | None = None,
    severities: Iterable[int] = SEVERITIES,
    batch_size: int = 64,
    seed: int = 0,
    resume: str | PathLike[str] | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
    **options: Any,
) -> Robustness:
    """Score a model on images with the standard corruptions, as it is and patched, on the same images.

        result = bnpatch.robustness("model.pt", "val/", "recipe.json", severities=[1, 3, 5])
        print(result.mean_corruption_error(), result.comparison(("fog", 3)).change)

    The patch is the recipe; without one, it is the weights that the model already has. If these are the
    baseline's, only the model as it is gets scored. The model is left as it was.

    Args:
        model: a model that :func:`bnpatch.load` takes or returns.
        data: labelled images, in a form that :func:`bnpatch.open_examples` takes, or examples that it
            returned.
        recipe: the recipe, or the path of a recipe file.
        kinds: names of corruptions, in a list or in a text with commas; None for all fifteen.
        severities: severities, each of 1 to 5.
        batch_size: examples at a time; it changes only the speed.
        seed: seed of what is random in corruptions, and of the choice of images under a limit.
        resume: a file that keeps what was scored, so that a run that was killed goes on. None keeps nothing.
        progress: called after each batch.
        options: see :func:`bnpatch.open_examples`.

    Returns:
        The errors, image by image, with means and intervals.

    Raises:
        BnpatchError: the package with the corruptions is missing, a kind or severity is not known, the
            images are no bytes or have no labels, the model is patched already and gets a recipe, or the
            file keeps the scores of another model, recipe or data set.
    """
    chosen, levels = parse_standard_kinds(kinds), _checked_severities(severities)
    check_installed()
    loaded = model if isinstance(model, Model) else load(model)
    states = _states(loaded, recipe)
    examples = data if isinstance(data, Examples) else open_examples(data, loaded, seed=seed, **options)
    # All kinds of one severity come before the next severity, so that the time left is soon known.
    conditions = [CLEAN, *((kind, severity) for severity in levels for kind in chosen)]
    scores = ScoreFile(resume, _fingerprint(loaded, states, examples, seed))
    # Clean images are scored in any case, also by a run that goes on: they tell if the model is the same.
    missing = [condition for condition in conditions if condition == CLEAN or condition not in scores]
    clock = _Clock(missing, len(states) * len(examples), progress)
    for condition in missing:
        clock.start(condition)
        seen = examples if condition == CLEAN else corrupted(examples, *condition, seed=seed)
        found = []
        for state in states:
            with loaded.in_state(state):
                found.append(evaluate(loaded, seen, [ACCURACY], batch_size=batch_size, on_batch=clock.count))
        scores.add(condition, found[0].indices, [1 - each.values[ACCURACY.name] for each in found])
    before, *after = scores.errors(conditions)
    return Robustness(
        loaded.name,
        chosen,
        levels,
        before,
        after[0] if after else None,
        None if examples.groups is None else examples.groups[scores.indices],
        {examples.source.name(index): why for index, why in examples.skipped.items()},
    )


def _checked_severities(severities: Iterable[int]) -> tuple[int, ...]:
    levels = tuple(dict.fromkeys(severities))
    if not levels or not set(levels) <= set(SEVERITIES):
        raise BnpatchError(
            f"there is no severity {next((s for s in levels if s not in SEVERITIES), 'in the list')}",
            "choose from 1,2,3,4,5",
        )
    return levels


def _states(model: Model[Any], recipe: str | PathLike[str] | Recipe | None) -> list[PatchState]:
    """Return the state of the model as it is, and the state with a patch if that computes something else."""
    patched, baseline = model.state, _unpatched(model)
    if recipe is not None:
        if not patched.computes_like(baseline):
            raise BnpatchError(
                f"{model.name} is patched already", "leave out the recipe, or give the model as it was"
            )
        with model.borrowed():
            model.apply(recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
            patched, baseline = model.state, _unpatched(model)
    return [baseline] if patched.computes_like(baseline) else [baseline, patched]


def _unpatched(model: Model[Any]) -> PatchState:
    with model.in_state(model.baseline()):
        return model.state


def _fingerprint(
    model: Model[Any], states: Sequence[PatchState], examples: Examples, seed: int
) -> dict[str, Any]:
    """Return what the scores depend on; of the model's weights only those of its norm layers."""
    return {
        "the model": _hash(model.fingerprints()),
        "the recipe": _hash([model.recipe(state).to_json() for state in states]),
        "the preprocessing": {**model.preprocessing.to_json(), "source": None},
        "the data": examples.fingerprint(),
        "the seed": seed,
    }


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _Clock:
    """Estimates the time that is left from the time that conditions took.

    Args:
        conditions: what is scored, in this order.
        count: number of images in each condition, those of all states together.
        progress: called after each batch.
        now: gives the time in seconds.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        count: int,
        progress: Callable[[Progress], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = list(conditions)
        self._count, self._progress, self._now = count, progress, now
        self._took: dict[str, list[float]] = {}  # seconds by kind
        self._current: Condition | None = None
        self._begun, self._done, self._finished = now(), 0, 0

    def start(self, condition: Condition) -> None:
        """Begin with a condition, which ends the one before."""
        now = self._now()
        if self._current is not None:
            self._took.setdefault(self._current[0], []).append(now - self._begun)
            self._finished += 1
        self._waiting.remove(condition)
        self._current, self._begun, self._done = condition, now, 0

    def count(self, more: int) -> None:
        """Count images of the present condition."""
        assert self._current is not None
        self._done += more
        kind, severity = self._current
        label = f"{kind} {severity}" if severity else kind
        total = self._count * (self._finished + 1 + len(self._waiting))
        self._progress(Progress(label, self._count * self._finished + self._done, total, self.seconds_left()))

    def seconds_left(self) -> float:
        """Estimate the remaining time: kinds take as long as before, and new kinds as the mean of others."""
        assert self._current is not None
        kind, elapsed = self._current[0], self._now() - self._begun
        expected = {kind: float(np.mean(seconds)) for kind, seconds in self._took.items()}
        if expected.get(kind, 0.0) <= elapsed:
            expected[kind] = elapsed * self._count / max(1, self._done)
        corruptions = [seconds for kind, seconds in expected.items() if kind != CLEAN[0]]
        usual = float(np.mean(corruptions or [expected[kind]]))
        return expected[kind] - elapsed + sum(expected.get(kind, usual) for kind, _ in self._waiting)
