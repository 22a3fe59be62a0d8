"""Tune a model on data: find the weights, and give an honest verdict on them."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Literal, get_args

from torch import nn

from bnpatch import __version__
from bnpatch.core.errors import BnpatchError
from bnpatch.data.corruptions import augmented, parse_kinds
from bnpatch.data.dataset import Examples
from bnpatch.data.sources import open_examples
from bnpatch.evaluation.metrics import Metric, ScoreFunction
from bnpatch.models.base import Patchable
from bnpatch.models.load import load
from bnpatch.search.config import Granularity, Plan, Trial
from bnpatch.search.job import Job
from bnpatch.search.objective import Goal
from bnpatch.search.parts import parts_of
from bnpatch.search.progress import Progress
from bnpatch.search.result import TuneResult


def tune_alpha(
    model: str | os.PathLike[str] | nn.Module | Patchable,
    data: Any,
    *,
    metric: str | Metric | ScoreFunction = "accuracy",
    granularity: Granularity = "auto",
    recalibrate: bool | None = None,
    trials: int | None = None,
    max_passes: float = 3.0,
    timeout: float | None = None,
    holdout: float | None = None,
    test_data: Any = None,
    calib_data: Any = None,
    class_prior: str | Sequence[float] | None = None,
    augment: str | Sequence[str] | None = None,
    max_overhead: float | None = None,
    recover_folded: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    **options: Any,
) -> TuneResult:
    """Find the weights of examples and of re-estimated moments that suit a model and data: no retraining.

    The model is left as it was; ``result.recipe`` has the weights, :func:`bnpatch.apply` sets them.

    Args:
        model: what :func:`bnpatch.load` takes or returns.
        data: what :func:`bnpatch.open_examples` takes, or returned.
        metric: ``accuracy``, ``cross-entropy`` or ``top5``; a function from (outputs, targets) to one number
            per example, of which more is better; or without labels ``unlabeled`` and, for comparison,
            ``information``, ``alignment``, ``entropy`` and ``evalnorm``, see
            :mod:`bnpatch.search.label_free`.
        granularity: one weight for all ("global"), per "stage" (the norm layers of one resolution) or per
            "layer"; "auto" tries both ends.
        recalibrate: let lambda join, the weight of running moments re-estimated on ``calib_data``; by default
            where the granularity is "auto".
        trials: at most so many weights in each global search for one weight.
        max_passes: of each global search, over the tuning examples; 2 of them are the identity and the
            winner. Not of label-free metrics on fewer than a thousand: a dozen trials see all of them.
        timeout: seconds after which the search begins nothing further; what it found is still judged.
        holdout: the part of the data that the search does not see, and that gives the verdict. By
            default half; with few labelled examples all take turns in being held out (cross-fitting).
        test_data: other data for the verdict; then all of ``data`` is for tuning.
        calib_data: where moments are re-estimated, labels unused; by default the tuning examples. For
            ``recover_folded`` and for Group Norm, which have no running moments: images like those that
            the model was trained on, or a shift that all of them share is taken for normal.
        class_prior: for ``unlabeled`` and ``information``, how often the classes occur, in the order of the
            outputs.
        augment: tune on a mixture of the examples and of shifted ones, see :mod:`bnpatch.data.corruptions`.
        max_overhead: find the best weights whose measured latency, one image at a time, is at most so many
            times the original's; norm layers that aren't worth their time stay as they were.
        recover_folded: take convolutions that a Batch Norm was fused into as norm layers. For ONNX models,
            which stay that way.
        batch_size: examples at a time.
        seed: of everything random.
        storage: where the trials are kept, so that a search that was killed goes on: ``sqlite:///x.db`` or
            ``x.journal``; None for memory.
        study: its name there.
        progress: called with what is going on, examples done and examples in all, about.
        on_trial: called after each trial of a global search with whether it is the best so far, of all global
            searches; the model has its weights. The searches of a cross-fit don't call it.
        options: for :func:`bnpatch.open_examples`.

    Raises:
        BnpatchError: the model or the data can't be used.
    """
    started = time.monotonic()
    check_settings(
        metric, granularity, class_prior, augment, trials, max_passes, timeout, holdout, max_overhead
    )
    patchable = load(model) if isinstance(model, (str, os.PathLike, nn.Module)) else model
    if not (patchable.inventory().norm_layers or patchable.uncalibrated() or recover_folded):
        patchable.set_alphas(0.0)  # raises, with the reasons
    goal = Goal.of(metric, class_prior, batch_size)

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
        examples if augment is None else augmented(examples, augment, seed),
        test_examples,
        test_examples if augment is None else augmented(test_examples, augment, seed),
        calib,
        parts_of(examples, None if test_data is None else test_examples, holdout, seed, goal.needs_labels),
        Plan(
            granularity=granularity,
            recalibrate=granularity == "auto" if recalibrate is None else recalibrate,
            trials=trials,
            max_passes=max_passes,
            timeout=timeout,
            seed=seed,
            batch_size=batch_size,
            storage=storage,
            study=study,
        ),
        Progress(progress),
        on_trial,
        max_overhead,
    )
    result = job.run(recover_folded)
    result.seconds = time.monotonic() - started
    result.recipe.provenance.update(_provenance(result, job, data, test_data))
    return result


def check_settings(
    metric: str | Metric | ScoreFunction = "accuracy",
    granularity: str = "auto",
    class_prior: str | Sequence[float] | None = None,
    augment: str | Sequence[str] | None = None,
    trials: int | None = None,
    max_passes: float = 3.0,
    timeout: float | None = None,
    holdout: float | None = None,
    max_overhead: float | None = None,
) -> None:
    """Find what is wrong with arguments of :func:`tune_alpha` that no model or data can put right.

    Raises:
        BnpatchError: they are out of range, not known, or don't go together.
    """
    Goal.of(metric, class_prior, batch_size=1)
    if granularity not in get_args(Granularity):
        raise BnpatchError(
            f"there is no granularity {granularity!r}", f"choose one of {', '.join(get_args(Granularity))}"
        )
    if augment is not None:
        parse_kinds(augment)
    if trials is not None and trials < 1:
        raise BnpatchError(f"{trials} trials find nothing", "set --trials to 1 or more")
    if not max_passes > 0:
        raise BnpatchError(f"{max_passes} passes find nothing", "set --max-passes to 1 or more")
    if timeout is not None and not timeout >= 0:
        raise BnpatchError(f"{timeout:g} seconds are no time", "set --timeout to 0 or more")
    if max_overhead is not None and not max_overhead >= 1:
        raise BnpatchError(f"{max_overhead:g} times the latency is not possible", "write --max-overhead 1.1")
    if holdout is not None and not 0 < holdout < 1:
        raise BnpatchError(f"a held-out part of {holdout} is not a fraction", "set --holdout between 0 and 1")


def _provenance(result: TuneResult, job: Job, data: Any, test_data: Any) -> dict[str, Any]:
    def named(source: Any) -> str | None:
        return str(source) if isinstance(source, (str, os.PathLike)) else None

    model, plan = job.model, job.plan
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model.name,
        "architecture": str(model.arch) if model.arch else None,
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
