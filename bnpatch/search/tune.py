"""Tune a model on data: find weights, and judge them on held-out examples."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Literal, get_args

from torch import nn

from bnpatch import __version__
from bnpatch.core.errors import BnpatchError
from bnpatch.data.corruptions import augmented
from bnpatch.data.dataset import Examples
from bnpatch.data.sources import open_examples
from bnpatch.evaluation.metrics import Metric, ScoreFunction
from bnpatch.models.base import Model
from bnpatch.models.load import load
from bnpatch.search.config import Granularity, Plan, SearchConfig, Trial
from bnpatch.search.job import Job
from bnpatch.search.objective import Goal
from bnpatch.search.parts import parts_of
from bnpatch.search.progress import Progress
from bnpatch.search.result import TuneResult


def tune_alpha(
    model: str | os.PathLike[str] | nn.Module | Model[Any],
    data: Any,
    *,
    metric: str | Metric | ScoreFunction = "accuracy",
    granularity: Granularity = "auto",
    test_data: Any = None,
    calib_data: Any = None,
    timeout: float | None = None,
    seed: int = 0,
    config: SearchConfig | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    **options: Any,
) -> TuneResult:
    """Find alpha and lambda for a model and data; the model's own parameters are not trained.

    Alpha is the weight of the example's own statistics, lambda that of re-estimated statistics. The model is
    not changed: ``result.recipe`` has the weights, and :func:`bnpatch.apply` sets them.

    Args:
        model: what :func:`bnpatch.load` takes or returns.
        data: what :func:`bnpatch.open_examples` takes, or returned.
        metric: ``accuracy``, ``cross-entropy`` or ``top5``; a function from (outputs, targets) to one number
            per example, where higher is better; or without labels ``unlabeled`` and, for comparison,
            ``information``, ``alignment``, ``entropy`` and ``evalnorm``, see
            :mod:`bnpatch.search.label_free`.
        granularity: one weight for all norm layers ("global"), per "stage" (the norm layers of one
            resolution) or per "layer"; "auto" tries "global" and "layer".
        timeout: seconds after which the search starts nothing new; what it found is still judged.
        test_data: other data for the verdict; then all of ``data`` is for tuning.
        calib_data: data to re-estimate statistics on, without labels; by default the tuning examples. For
            ``recover_folded`` and for Group Norm, which have no running statistics, give images like those
            that the model was trained on; otherwise a shift that all images share goes unnoticed.
        seed: seed of all random choices.
        progress: called with a label, the examples done, and an estimate of all examples.
        on_trial: called after each trial of a global search, with the trial and whether it is the best so far
            of all global searches; ``trial.state`` is the state of the model. The searches of a cross-fit
            don't call it.
        config: the less common options, see :class:`~bnpatch.search.config.SearchConfig`.
        options: fields of ``config`` by their names, which override it, and options of
            :func:`bnpatch.open_examples`.

    Raises:
        BnpatchError: the model or the data can't be used.
    """
    started = time.monotonic()
    fields = {key: options.pop(key) for key in list(options) if key in SearchConfig.__dataclass_fields__}
    config = replace(config or SearchConfig(), **fields)
    goal = checked_goal(metric, granularity, timeout, config)
    patchable: Model[Any] = load(model) if isinstance(model, (str, os.PathLike, nn.Module)) else model
    if not (patchable.inventory().norm_layers or patchable.uncalibrated() or config.recover_folded):
        patchable.set_alphas(0.0)  # raises, with the reasons

    def opened(source: Any, labels: Literal["required", "optional"]) -> Examples:
        if isinstance(source, Examples):
            return source
        return open_examples(source, patchable, labels=labels, classes=goal.classes, seed=seed, **options)

    labels: Literal["required", "optional"] = "required" if goal.needs_labels else "optional"
    examples = opened(data, labels)
    test_examples = examples if test_data is None else opened(test_data, labels)
    calib = None if calib_data is None else opened(calib_data, "optional")
    job = Job(
        patchable,
        goal,
        examples,
        examples if config.augment is None else augmented(examples, config.augment, seed),
        test_examples,
        test_examples if config.augment is None else augmented(test_examples, config.augment, seed),
        calib,
        parts_of(
            examples, None if test_data is None else test_examples, config.holdout, seed, goal.needs_labels
        ),
        Plan(
            granularity=granularity,
            recalibrate=granularity == "auto" if config.recalibrate is None else config.recalibrate,
            trials=config.trials,
            max_passes=config.max_passes,
            timeout=timeout,
            seed=seed,
            batch_size=config.batch_size,
            storage=config.storage,
            study=config.study,
        ),
        Progress(progress),
        on_trial,
        config.max_overhead,
    )
    result = job.run(config.recover_folded)
    result.seconds = time.monotonic() - started
    result.recipe.provenance.update(_provenance(result, job, data, test_data))
    return result


def checked_goal(
    metric: str | Metric | ScoreFunction, granularity: str, timeout: float | None, config: SearchConfig
) -> Goal:
    """Check the arguments of :func:`tune_alpha` that are independent of model and data.

    Returns:
        The goal of the search.

    Raises:
        BnpatchError: arguments are out of range, unknown, or can't be combined.
    """
    if granularity not in get_args(Granularity):
        raise BnpatchError(
            f"there is no granularity {granularity!r}", f"choose one of {', '.join(get_args(Granularity))}"
        )
    if timeout is not None and not timeout >= 0:
        raise BnpatchError(f"{timeout:g} seconds are no time", "set --timeout to 0 or more")
    return Goal.of(metric, config.class_prior, config.batch_size)


def _provenance(result: TuneResult, job: Job, data: Any, test_data: Any) -> dict[str, Any]:
    def named(source: Any) -> str | None:
        return str(source) if isinstance(source, (str, os.PathLike)) else None

    model, plan = job.model, job.plan
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model.name,
        "architecture": str(model.arch) if model.arch else None,
        "output": model.output.name if model.output else None,
        "preprocessing": None if job.examples.as_they_are else model.preprocessing.to_json(),
        "data": {
            "name": named(data),
            "test_name": named(test_data),
            "fingerprint": job.seen.fingerprint(),
            "tuning_examples": result.num_tuning,
            "held_out_examples": result.num_held_out,
            "skipped": len(result.skipped),
        },
        "metric": result.metric.name,
        "granularity": plan.granularity,
        "ladder": [
            {"rung": r.name, "mean": r.mean, "change": r.change.to_json(), "chosen": r.chosen}
            for r in result.candidates
        ],
        "passes": round(result.passes, 2),
        "trials": len(result.trials),
        "interrupted": result.interrupted,
        "verdict": str(result.verdict),
        "held_out": result.verdict.to_json(),
        "notes": result.notes,
        "seed": plan.seed,
        "versions": {
            "bnpatch": __version__,
            **{name: version(name) for name in ("torch", "timm", "optuna")},
            "python": platform.python_version(),
        },
    }
