"""Tune a model on data: find weights, and judge them on held-out examples."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchState
from bnpatch.core.text import counted
from bnpatch.evaluation.clusters import FEW_GROUPS
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CALIBRATION_ERROR,
    ROUGH_BELOW,
    Metric,
    ScoreFunction,
    paired_difference,
)
from bnpatch.evaluation.permutation import warn_if_permuted
from bnpatch.models.base import Model
from bnpatch.models.load import load
from bnpatch.search.class_shares import by_predicted_shares
from bnpatch.search.config import Candidate, Granularity, Plan, SearchConfig, Trial, chosen_of
from bnpatch.search.cross_fit import Searches
from bnpatch.search.distributed import on_all_processes
from bnpatch.search.held_out import Decision, PairedScores, decide
from bnpatch.search.keep import ANSWERS_KEPT
from bnpatch.search.latency_limit import Point, choose, knee, trade_off
from bnpatch.search.objective import LABEL_FREE, Objective, ObjectiveSpec
from bnpatch.search.progress import Progress
from bnpatch.search.result import TuneResult, provenance
from bnpatch.search.task import Task, open_task
from bnpatch.search.thumbnails import drawn

#: Seconds to measure latencies for, where there is a latency limit.
LATENCY_SECONDS = 10.0

# A verdict on fewer examples than this says little, and a note says so.
_FEW = 30


@torch.inference_mode(False)  # in which nothing could be learned
def tune_alpha(
    model: str | os.PathLike[str] | nn.Module | Model[Any],
    data: Any,
    *,
    metric: str | Metric | ScoreFunction = "accuracy",
    granularity: Granularity = "auto",
    test_data: Any = None,
    calib_data: Any = None,
    keep: Any = None,
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
            ``recover_fused`` and for Group Norm, which have no running statistics, give images like those
            that the model was trained on; otherwise a shift that all images share goes unnoticed.
        keep: images, labelled or not, on which a patch must not lose more than ``margin``, such as the
            original validation set; see :mod:`bnpatch.search.keep`.
        seed: seed of all random choices.
        progress: called with a label, the examples scored so far, and an estimate of all; a learning step
            counts three times.
        on_trial: called after each trial of a global search, with the trial and whether it is the best so far
            of all global searches; ``trial.state`` is the state of the model. The searches of a cross-fit
            don't call it.
        config: the less common options, see :class:`~bnpatch.search.config.SearchConfig`.
        options: fields of ``config`` by their names, which override it, and options of
            :func:`bnpatch.open_examples`, such as ``groups``. Groups given as labels are those of ``data``; a
            function of names also groups ``test_data`` and ``keep``.

    Raises:
        BnpatchError: the model or the data can't be used.
    """
    started = time.monotonic()
    fields = {key: options.pop(key) for key in list(options) if key in SearchConfig.__dataclass_fields__}
    config = replace(config or SearchConfig(), **fields)
    spec = checked_objective(metric, granularity, timeout, config)
    patchable: Model[Any] = load(model) if isinstance(model, (str, os.PathLike, nn.Module)) else model
    if not (patchable.inventory().norm_layers or patchable.uncalibrated() or config.recover_fused):
        patchable.set_alphas(0.0)  # raises, with the reasons
    sources = {"data": data, "test_data": test_data, "calib_data": calib_data, "keep": keep}
    task = open_task(patchable, spec, Plan.of(config, granularity, timeout, seed), sources, options)
    inputs = task.some_inputs()
    result = _run(task, Progress(progress), on_trial)
    result.inputs = inputs
    result.seconds = time.monotonic() - started
    about, is_recommended = provenance(result, task, sources), result.is_recommended
    result.recipe.provenance.update({**about, "recommended": is_recommended, "applied": is_recommended})
    if result.candidate_recipe is not None:
        result.candidate_recipe.provenance.update(
            {**about, "recommended": False, "applied": False, "reason": result.reason}
        )
    return result


def _run(task: Task, progress: Progress, on_trial: Callable[[Trial, bool], None]) -> TuneResult:
    """Search, and judge what was found; the model has its former state again when this returns."""
    started, model = time.monotonic(), task.model
    with model.borrowed():
        notes = task.make_norms()
        baseline = model.state
        if task.plan.database:
            task = replace(task, plan=replace(task.plan, fingerprint=task.fingerprint()))
        tuned = task.spec.objective(model, task.seen, task.tuning)
        judging, metrics = task.spec.held_out_objective(tuned, task.test_examples, task.held_out)

        def search(shared: Objective, held_out: Objective) -> TuneResult:
            with progress.part(0):  # this work is in no estimate
                keep = task.keep_set(progress.count)
            searches = Searches(task, shared, tuned, progress, on_trial, started, keep)
            searches.notes += notes
            result = _search_and_evaluate(searches, baseline, (held_out, judging), metrics)
            progress.finish()
            return result

        return on_all_processes(
            model,
            [(tuned, task.seen), (judging, task.test_examples)],
            [task.spec.metric, *metrics, CALIBRATION_ERROR, ACCURACY, ANSWERS_KEPT],
            search,
        )


def _search_and_evaluate(
    searches: Searches,
    baseline: PatchState,
    objectives: tuple[Objective, Objective],
    metrics: Sequence[Metric],
) -> TuneResult:
    """Search, and evaluate what was found on held-out examples.

    Args:
        searches: the searches, none of which has begun.
        baseline: the state of the model before the search.
        objectives: what scores the held-out examples, in all processes and in this one alone.
        metrics: metrics to compare; the first decides.
    """
    task, model, keep = searches.task, searches.task.model, searches.keep
    candidates, points = searches.search_all(), list[Point]()
    if task.plan.max_overhead is not None:
        candidates, points = _within_limit(searches, candidates, task.plan.max_overhead)
    chosen = chosen_of(candidates)
    paired, shifted, num_parts = searches.paired_scores(*objectives, baseline, chosen.weights)
    if task.test_examples is not task.examples and (says := task.test_examples.warn_of_near_copies()):
        searches.notes.append(f"held-out data: {says}")
    found = searches.whole.base.with_weights(chosen.weights)
    paired, doubt = by_predicted_shares(task, task.test_examples, paired, baseline, found)
    if shifted is not None and not doubt:
        shifted, doubt = by_predicted_shares(task, task.test_seen, shifted, baseline, found)
    searches.notes += [doubt] if doubt else []
    best = None if baseline.computes_like(found) else found
    judged = None if keep is None else keep.judged(found)
    decision = decide(None if best is None else chosen.name, paired, shifted, metrics, judged)
    if best is None and searches.refused is not None:
        best, reason = searches.refused
        decision = replace(decision, reason=reason)
    state, held_out = found if decision.is_recommended else baseline, decision.held_out
    if held_out.classes is not None:
        warn_if_permuted(held_out.classes[1], held_out.classes[0], model.class_names)
    if shifted is not None:
        searches.notes.append(_robustness_note(metrics[0], shifted))
    return TuneResult(
        metric=task.spec.metric,
        candidates=candidates,
        trials=searches.whole.trials,
        held_out=held_out,
        weights=state.weights,
        norm_layers=list(state.weights.alphas),
        passes=searches.passes,
        num_tuning=len(set(task.tuning.tolist()) - task.examples.skipped.keys()),
        num_tuning_groups=task.examples.num_groups(task.tuning),
        num_parts=num_parts,
        skipped=task.skipped(),
        notes=[*searches.notes, *_notes(searches, decision)],
        interrupted=searches.interrupted,
        trade_off=points,
        samples=drawn(held_out, model, task.test_examples, task.plan.seed),
        recipe=model.recipe(state),
        is_recommended=decision.is_recommended,
        candidate_recipe=None if best is None or decision.is_recommended else model.recipe(best),
        reason=decision.reason,
    )


def _within_limit(
    searches: Searches, candidates: Sequence[Candidate], limit: float
) -> tuple[list[Candidate], list[Point]]:
    """Add a candidate with as many norm layers patched as the latency limit allows, and choose it."""
    task, selection = searches.task, searches.whole.selection
    seconds, share = LATENCY_SECONDS, searches.share_of_time(others=1)
    if share is not None:
        seconds = min(seconds, max(1.0, share))
    scores, groups = selection.scores, selection.groups
    points = trade_off(
        task.model, chosen_of(candidates).weights, scores, task.spec.metric, seconds=seconds, groups=groups
    )
    best = choose(points, limit)
    searches.notes.append(f"--max-overhead: {best.reason}")
    if suggestion := knee(points):
        searches.notes.append(
            f"the gain flattens beyond {counted(suggestion.num_norms, 'norm layer')}, "
            f"at {suggestion.latency.ratio:.2f}x the time"
        )
    weights = best.point.weights
    after, before = scores(weights), scores(points[0].weights)
    change = paired_difference(before, after, groups)
    limited = Candidate(f"at most {limit:g}x", weights, float(np.mean(after)), change, chosen=True)
    return [*(replace(candidate, chosen=False) for candidate in candidates), limited], points


def _robustness_note(metric: Metric, shifted: PairedScores) -> str:
    """Describe what the candidate does to augmented held-out examples."""
    change = paired_difference(shifted.before[metric.name], shifted.after[metric.name], shifted.groups)
    values = (metric.format(float(np.mean(v[metric.name]))) for v in (shifted.before, shifted.after))
    return (
        f"the held-out examples as --augment shifts them: {metric.name} {' → '.join(values)}, "
        f"{metric.format(change.value, signed=True)} "
        f"[{metric.format(change.low, signed=True)}, {metric.format(change.high, signed=True)}]"
    )


def _notes(searches: Searches, decision: Decision) -> list[str]:
    """Return what a user must know to read the result."""
    spec = searches.task.spec
    notes, held_out = [decision.reason] if decision.reason else [], decision.held_out
    if searches.resumed:
        notes.append(f"the storage had {counted(searches.resumed, 'trial')} already")
    if held_out.num_examples < _FEW:
        notes.append(f"{counted(held_out.num_examples, 'example')} judged: so few say little")
    elif held_out.num_groups is not None and held_out.num_groups < FEW_GROUPS:
        notes.append(
            f"{counted(held_out.num_groups, 'group')} judged: with fewer than {FEW_GROUPS} all intervals are "
            "rough; images of more groups would make them reliable"
        )
    elif any(comparison.is_rough for comparison in held_out.comparisons):
        units = "examples" if held_out.num_groups is None else "groups"
        notes.append(f"below {ROUGH_BELOW} {units} the interval of the cross-entropy is rough")
    if not spec.needs_labels:
        name = spec.metric.name
        notes.append(f"{name} needs no labels, and can't see everything: {LABEL_FREE[name]}")
    return notes


def checked_objective(
    metric: str | Metric | ScoreFunction, granularity: str, timeout: float | None, config: SearchConfig
) -> ObjectiveSpec:
    """Check the arguments of :func:`tune_alpha` that are independent of model and data.

    Returns:
        What the search optimizes.

    Raises:
        BnpatchError: arguments are out of range, unknown, or can't be combined.
    """
    if granularity not in get_args(Granularity):
        raise BnpatchError(
            f"there is no granularity {granularity!r}", f"choose one of {', '.join(get_args(Granularity))}"
        )
    if timeout is not None and not timeout >= 0:
        raise BnpatchError(f"{timeout:g} seconds are no time", "set --timeout to 0 or more")
    return ObjectiveSpec.of(metric, config.class_prior, config.batch_size)
