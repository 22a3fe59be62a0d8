"""The search for alpha, and an honest verdict on what it found."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import optuna
from torch import nn

from bnpatch import __version__
from bnpatch.calibration import recover_folded as recover
from bnpatch.data import Examples, Indices, split
from bnpatch.errors import BnpatchError
from bnpatch.evaluation import (
    STANDARD_METRICS,
    Comparison,
    OutputsNotFiniteError,
    Scores,
    compare,
    evaluate,
    warn_at_chance,
)
from bnpatch.loading import load
from bnpatch.metrics import Metric, ScoreFunction, as_metric
from bnpatch.model import Patchable
from bnpatch.recipe import Recipe
from bnpatch.sources import open_examples

# Square roots of the weights that are tried before the sampler has anything to go by.
_FIRST_ROOTS = (0.0, 0.1, 0.2, 0.35, 0.6, 1.0)


@dataclass(frozen=True)
class Trial:
    """One weight, and how the tuning examples scored with it (means by name of metric)."""

    number: int
    alpha: float
    scores: Mapping[str, float]
    seconds: float


@dataclass(repr=False)
class TuneResult:
    """What the search found.

    Attributes:
        alpha: the weight that scored best on the tuning examples; 0 is the model as it was.
        metric: what was tuned.
        trials: all that was tried, the identity first.
        comparisons: held-out examples, metric by metric, the tuned one first.
        num_tuning: examples that the search saw, without the unreadable.
        num_held_out: examples that it did not see, without the unreadable.
        skipped: examples that can't be read, by name, and why.
        interrupted: the user stopped the search early.
        seconds: wall time.
        recipe: the weights and their provenance, to keep and to apply; those that the model had before,
            where the verdict is "loss".
    """

    alpha: float
    metric: Metric
    trials: list[Trial]
    comparisons: list[Comparison]
    num_tuning: int
    num_held_out: int
    skipped: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0
    recipe: Recipe = field(default_factory=lambda: Recipe(()))

    def __repr__(self) -> str:
        what = f"{self.metric.name}: {self.verdict}"
        return f"TuneResult(alpha={self.alpha:.4g}, {what}, {len(self.trials)} trials)"

    @property
    def verdict(self) -> str:
        """The verdict on the tuned metric."""
        return self.comparisons[0].verdict


def tune_alpha(
    model: str | os.PathLike[str] | nn.Module | Patchable,
    data: Any,
    *,
    metric: str | Metric | ScoreFunction = "accuracy",
    trials: int = 15,
    timeout: float | None = None,
    holdout: float = 0.5,
    test_data: Any = None,
    batch_size: int = 64,
    seed: int = 0,
    recover_folded: bool = False,
    calib_data: Any = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    **options: Any,
) -> TuneResult:
    """Find the weight of the example that suits a model and data best: one number, no retraining.

    The model is left as it was; ``result.recipe`` has the weights, :func:`bnpatch.apply` sets them.

    Args:
        model: what :func:`bnpatch.load` takes or returns.
        data: what :func:`bnpatch.open_examples` takes, or returned.
        metric: ``accuracy``, ``cross-entropy``, ``top5``, or a function from (outputs, targets) to one
            number per example, of which more is better.
        trials: how many weights to try, the identity included.
        timeout: seconds after which no further weight is tried.
        holdout: the part of the data that the search does not see, and that gives the verdict.
        test_data: other data for the verdict; then all of ``data`` is for tuning.
        batch_size: examples at a time.
        seed: of the split and of the sampler.
        recover_folded: take convolutions that a Batch Norm was folded into as sites. For ONNX models,
            which stay that way.
        calib_data: where the running moments of such sites are taken from, labels unused: images like
            those that the model was trained on. By default the tuning examples; then the sites answer
            what differs from image to image, and not a shift that all of these images share.
        progress: called with what is going on, examples done and examples in all.
        on_trial: called after each trial with whether it is the best so far.
        options: for :func:`bnpatch.open_examples`.

    Raises:
        BnpatchError: the model or the data can't be used.
    """
    chosen = as_metric(metric)
    _check_settings(trials, holdout)
    started = time.monotonic()
    patchable = load(model) if isinstance(model, (str, os.PathLike, nn.Module)) else model
    if not patchable.survey().sites and not recover_folded:
        patchable.set_alphas(0.0)  # raises, with the reasons

    def opened(source: Any) -> Examples:
        return (
            source if isinstance(source, Examples) else open_examples(source, patchable, seed=seed, **options)
        )

    examples = opened(data)
    if test_data is None:
        tuning, held_out = split(examples.targets, holdout, seed)
        test_examples = examples
    else:
        test_examples = opened(test_data)
        tuning, held_out = (np.arange(len(e), dtype=np.int64) for e in (examples, test_examples))
    _check_parts(examples, tuning, held_out)
    if recover_folded:
        calib_examples, calib = (examples, tuning) if calib_data is None else (opened(calib_data), None)
        recover(patchable, calib_examples, indices=calib, batch_size=batch_size)
    total = trials * len(tuning) + 2 * len(held_out)
    done = 0

    def count(examples_done: int) -> None:
        nonlocal done
        done += examples_done
        progress(label, done, total)

    as_it_is = patchable.alphas()
    with patchable.borrowed():
        label = "searching alpha"
        run = _Search(patchable, examples, tuning, chosen, batch_size, seed, count)
        interrupted = run.go(trials, timeout, on_trial)
        label, done = "verdict on held-out examples", trials * len(tuning)
        chosen_alphas = dict.fromkeys(as_it_is, run.best.alpha)
        patchable.set_alphas(as_it_is)
        comparisons = compare(
            patchable,
            test_examples,
            chosen_alphas,
            run.metrics,
            indices=held_out,
            batch_size=batch_size,
            on_batch=count,
        )
        progress(label, total, total)
        # What did worse on examples that the search did not see is not worth applying.
        patchable.set_alphas(as_it_is if comparisons[0].verdict == "loss" else chosen_alphas)
        recipe = patchable.recipe()
    skipped = {examples.source.name(index): why for index, why in examples.skipped.items()}
    skipped |= {test_examples.source.name(index): why for index, why in test_examples.skipped.items()}
    result = TuneResult(
        run.best.alpha,
        chosen,
        run.trials,
        comparisons,
        num_tuning=len(tuning) - len(examples.skipped.keys() & set(tuning.tolist())),
        num_held_out=len(held_out) - len(test_examples.skipped.keys() & set(held_out.tolist())),
        skipped=skipped,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
    )
    result.recipe = Recipe(recipe.sites, _provenance(result, patchable, examples, data, test_data, seed))
    return result


class _Search:
    """Optuna asks, the model answers; the study's one parameter is the square root of alpha.

    Useful weights are often near 0.01, which a uniform scale of alpha would hardly ever try.
    """

    def __init__(
        self,
        model: Patchable,
        examples: Examples,
        indices: Indices,
        metric: Metric,
        batch_size: int,
        seed: int,
        count: Callable[[int], None],
    ) -> None:
        self.model, self.examples, self.indices = model, examples, indices
        self.metric, self.batch_size, self.count = metric, batch_size, count
        self.metrics = [metric, *(m for m in STANDARD_METRICS if m.name != metric.name)]
        self.trials: list[Trial] = []
        self.study = _quiet_study(
            direction="maximize" if metric.higher_is_better else "minimize",
            # One smooth dimension: a Gaussian process finds its best point in about ten trials.
            sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=len(_FIRST_ROOTS)),
        )
        for root in _FIRST_ROOTS:
            self.study.enqueue_trial({"sqrt_alpha": root})

    @property
    def best(self) -> Trial:
        """The best trial; among equals the smallest weight, so that the identity wins a tie."""
        sign = -1 if self.metric.higher_is_better else 1
        return min(self.trials, key=lambda trial: (sign * trial.scores[self.metric.name], trial.alpha))

    def go(self, trials: int, timeout: float | None, on_trial: Callable[[Trial, bool], None]) -> bool:
        """Run the trials; True if the user interrupted them, which keeps those that are finished."""
        started = time.monotonic()
        try:
            for number in range(trials):
                self._try(number)
                if self.trials and self.trials[-1].number == number:
                    on_trial(self.trials[-1], self.best is self.trials[-1])
                if timeout is not None and time.monotonic() - started >= timeout:
                    break
        except KeyboardInterrupt:
            if not self.trials:
                raise
            return True
        return False

    def _try(self, number: int) -> None:
        started = time.monotonic()
        asked = self.study.ask()
        alpha = asked.suggest_float("sqrt_alpha", 0.0, 1.0) ** 2
        self.model.set_alphas(alpha)
        try:
            scores = self._evaluate()
        except OutputsNotFiniteError:
            if number == 0:
                raise  # the model itself is broken, not this weight
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return
        means = {metric.name: scores.mean(metric) for metric in self.metrics}
        if not math.isfinite(means[self.metric.name]):
            raise BnpatchError(
                f"{self.metric.name} is {means[self.metric.name]}", "look at the metric and the data"
            )
        if number == 0:
            warn_at_chance(scores, self.examples)
        for name, value in means.items():
            asked.set_user_attr(name, value)
        asked.set_user_attr("alpha", alpha)
        self.study.tell(asked, means[self.metric.name])
        self.trials.append(Trial(number, alpha, means, time.monotonic() - started))

    def _evaluate(self) -> Scores:
        return evaluate(
            self.model,
            self.examples,
            self.metrics,
            indices=self.indices,
            batch_size=self.batch_size,
            on_batch=self.count,
        )


def _quiet_study(**options: Any) -> optuna.Study:
    """A study whose birth is not announced on stderr."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(**options)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _check_settings(trials: int, holdout: float) -> None:
    if trials < 1:
        raise BnpatchError(f"{trials} trials find nothing", "set --trials to 1 or more")
    if not 0 < holdout < 1:
        raise BnpatchError(f"a held-out part of {holdout} is not a fraction", "set --holdout between 0 and 1")


def _check_parts(examples: Examples, tuning: Indices, held_out: Indices) -> None:
    if len(np.unique(examples.targets)) < 2:
        raise BnpatchError(
            "all examples are of one class", "give data with the classes that the model tells apart"
        )
    if not len(tuning) or not len(held_out):
        raise BnpatchError(
            f"{len(examples)} examples are too few to tune on some and to judge by others", "give more data"
        )


def _provenance(
    result: TuneResult, model: Patchable, examples: Examples, data: Any, test_data: Any, seed: int
) -> dict[str, Any]:
    def named(source: Any) -> str | None:
        return str(source) if isinstance(source, (str, os.PathLike)) else None

    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model.name,
        "architecture": str(model.arch) if model.arch else None,
        "preprocessing": None if examples.as_they_are else model.preprocessing.to_json(),
        "data": {
            "name": named(data),
            "test_name": named(test_data),
            "fingerprint": examples.fingerprint(),
            "tuning_examples": result.num_tuning,
            "held_out_examples": result.num_held_out,
            "skipped": len(result.skipped),
        },
        "metric": result.metric.name,
        "trials": len(result.trials),
        "interrupted": result.interrupted,
        "verdict": result.verdict,
        "held_out": {c.metric.name: c.to_json() for c in result.comparisons},
        "seed": seed,
        "versions": {
            "bnpatch": __version__,
            **{name: version(name) for name in ("torch", "timm", "optuna")},
            "python": platform.python_version(),
        },
    }
