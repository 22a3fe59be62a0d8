"""Tune a model on data: find the weights, and give an honest verdict on them."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from bnpatch import __version__
from bnpatch.calibration import calibrate
from bnpatch.calibration import recover_folded as recover
from bnpatch.data.augment import augmented
from bnpatch.data.examples import Examples, Indices, folds, split
from bnpatch.data.sources import open_examples
from bnpatch.errors import BnpatchError
from bnpatch.evaluation import STANDARD_METRICS, Comparison, warn_at_chance
from bnpatch.loading.load import load
from bnpatch.metrics import (
    ACCURACY,
    CONFIDENCE,
    METRICS,
    PREDICTION,
    Metric,
    ScoreFunction,
    Values,
    as_metric,
    paired_difference,
)
from bnpatch.model import Patchable, TorchModel
from bnpatch.onnx_model import OnnxModel
from bnpatch.processes import Processes, Shared, dismiss, serve, start
from bnpatch.recipe import Recipe
from bnpatch.search import objectives as label_free
from bnpatch.search.insurance import harmless
from bnpatch.search.judge import ByMetric, ByObjective, Judge
from bnpatch.search.ladder import GLOBAL_RUNGS, Granularity, Ladder, Plan, Rung, Trial
from bnpatch.search.sparse import trade_off
from bnpatch.search.trade_off import Point, choose, knee
from bnpatch.search.verdict import Evidence, Verdict, conclude, gather
from bnpatch.setting import Setting

#: Metrics that need no labels, and what each can't see.
LABEL_FREE = {
    "unlabeled": "it presumes that all classes are equally frequent, or as --class-prior says",
    "alignment": "it looks at the moments of the norms' inputs alone, never at an answer",
    "entropy": "it takes certainty for truth, which fails where a strong shift makes one class of everything",
    "evalnorm": "it makes inference like training, batch by batch, whether or not that helps",
}

#: With fewer labelled examples than this, holding half of them out leaves too few for either purpose.
SCARCE = 150

#: Parts that take turns in being held out where examples are scarce.
_FOLDS = 5


@dataclass(repr=False)
class TuneResult:
    """What a search found.

    Attributes:
        metric: what was tuned.
        rungs: the ladder of the search, the identity first, each with its score on the selection
            examples; one of them is chosen.
        trials: weights for all sites that were tried, with their scores on the tuning examples.
        verdict: on held-out examples.
        setting: the weights that are kept: those of the chosen rung, or those that the model had before where
            the verdict is a loss.
        sites: names of the sites, in the order of the model.
        passes: how often the tuning examples were gone through; learning counts threefold.
        num_tuning: examples that the search saw, without the unreadable.
        num_folds: parts that took turns in being held out, each judged by a search without it; else 1.
        skipped: examples that can't be read, by name, and why.
        notes: what a person should know about the result.
        interrupted: the user stopped the search early.
        trade_off: gain against latency of ever more sites, where a limit was set; the original first.
        seconds: wall time.
        recipe: the weights and their provenance, to keep and to apply.
    """

    metric: Metric
    rungs: list[Rung]
    trials: list[Trial]
    verdict: Verdict
    setting: Setting
    sites: list[str]
    passes: float
    num_tuning: int
    num_folds: int = 1
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    trade_off: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    recipe: Recipe = field(default_factory=lambda: Recipe(()))

    def __repr__(self) -> str:
        return f"TuneResult({self.chosen.name}, {self.comparisons[0].metric.name}: {self.verdict})"

    @property
    def chosen(self) -> Rung:
        """The rung that the selection examples support."""
        return next(rung for rung in self.rungs if rung.chosen)

    @property
    def comparisons(self) -> list[Comparison]:
        """Held-out examples, metric by metric."""
        return self.verdict.comparisons

    @property
    def num_held_out(self) -> int:
        """Examples that gave the verdict."""
        return self.verdict.num_examples

    @property
    def alpha(self) -> float | None:
        """The one alpha of all sites; None where they differ."""
        values = set(self.setting.alphas.values())
        return values.pop() if len(values) == 1 else None


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
            per example, of which more is better; or without labels ``unlabeled``, ``alignment``,
            ``entropy`` or ``evalnorm``, see :mod:`bnpatch.search.objectives`.
        granularity: one weight for all ("global"), per "stage" (the sites of one resolution) or per "layer";
            "auto" tries both ends.
        recalibrate: let lambda join, the weight of running moments re-estimated on ``calib_data``; by default
            where the granularity is "auto".
        trials: at most so many weights in each race for one weight.
        max_passes: of each race, over the tuning examples; 2 of them are the identity and the winner.
        timeout: seconds after which nothing further is begun.
        holdout: the part of the data that the search does not see, and that gives the verdict. By
            default half; with few labelled examples all take turns in being held out (cross-fitting).
        test_data: other data for the verdict; then all of ``data`` is for tuning.
        calib_data: where moments are re-estimated, labels unused; by default the tuning examples. For
            ``recover_folded`` and for Group Norm, which have no running moments: images like those that
            the model was trained on, or a shift that all of them share is taken for normal.
        class_prior: for ``unlabeled``, how often the classes occur, in the order of the outputs.
        augment: tune on a mixture of the examples and of shifted ones, see :mod:`bnpatch.data.augment`.
        max_overhead: find the best weights whose measured latency, one image at a time, is at most so many
            times the original's; sites that aren't worth their time stay as they were.
        recover_folded: take convolutions that a Batch Norm was folded into as sites. For ONNX models,
            which stay that way.
        batch_size: examples at a time.
        seed: of everything random.
        storage: where the trials are kept, so that a search that was killed goes on: ``sqlite:///x.db`` or
            ``x.journal``; None for memory.
        study: its name there.
        progress: called with what is going on, examples done and examples in all, about.
        on_trial: called after each trial of a race with whether it is the best of that race so far.
        options: for :func:`bnpatch.open_examples`.

    Raises:
        BnpatchError: the model or the data can't be used.
    """
    started = time.monotonic()
    _check_settings(trials, max_passes, holdout, max_overhead)
    patchable = load(model) if isinstance(model, (str, os.PathLike, nn.Module)) else model
    if not (patchable.survey().sites or patchable.uncalibrated() or recover_folded):
        patchable.set_alphas(0.0)  # raises, with the reasons
    goal = _Goal.of(metric, class_prior, batch_size)

    def opened(source: Any, labels: Literal["required", "optional"]) -> Examples:
        if isinstance(source, Examples):
            return source
        return open_examples(source, patchable, labels=labels, classes=goal.classes, seed=seed, **options)

    labels: Literal["required", "optional"] = "required" if goal.needs_labels else "optional"
    examples = opened(data, labels)
    test_examples = examples if test_data is None else opened(test_data, labels)
    calib = None if calib_data is None else opened(calib_data, "optional")
    job = _Job(
        patchable,
        goal,
        examples,
        examples if augment is None else augmented(examples, augment, seed),
        test_examples,
        test_examples if augment is None else augmented(test_examples, augment, seed),
        calib,
        _parts(examples, None if test_data is None else test_examples, holdout, seed, goal.needs_labels),
        Plan(
            granularity,
            granularity == "auto" if recalibrate is None else recalibrate,
            trials,
            max_passes,
            timeout,
            seed,
            batch_size,
            storage,
            study,
        ),
        _Progress(progress),
        on_trial,
        max_overhead,
    )
    result = job.run(recover_folded)
    result.seconds = time.monotonic() - started
    result.recipe.provenance.update(_provenance(result, job, data, test_data))
    return result


@dataclass(frozen=True)
class _Goal:
    """What is tuned for.

    Attributes:
        metric: name and direction; of label-free objectives, which no example has a score of, no more.
        needs_labels: it compares outputs with targets.
        classes: these targets are classes.
        prior: how often the classes occur, for label-free objectives.
        batch_size: examples at a time.
    """

    metric: Metric
    needs_labels: bool
    classes: bool
    prior: str | Sequence[float] | None
    batch_size: int

    @classmethod
    def of(
        cls, metric: str | Metric | ScoreFunction, prior: str | Sequence[float] | None, batch_size: int
    ) -> "_Goal":
        if isinstance(metric, str) and metric in LABEL_FREE:
            return cls(Metric(metric, _no_scores, higher_is_better=False), False, True, prior, batch_size)
        if prior is not None:
            raise BnpatchError("a class prior is for tuning without labels", "add --metric unlabeled")
        tuned = as_metric(metric, also=LABEL_FREE)
        return cls(tuned, True, METRICS.get(tuned.name) is tuned, None, batch_size)

    def judge(self, model: Patchable, examples: Examples, indices: Indices) -> Judge:
        """What the search goes by, on examples of which these will be seen."""
        if self.needs_labels:
            beside = STANDARD_METRICS if self.classes else ()
            metrics = [self.metric, *(m for m in beside if m.name != self.metric.name)]
            return ByMetric(self.metric, metrics, self.batch_size)
        readable = examples.readable(indices)  # or an error that says why not
        num_outputs = model.num_outputs(next(examples.batches(1, readable)).x)
        objectives: Mapping[str, label_free.Objective] = {
            "unlabeled": label_free.unlabeled(label_free.as_prior(self.prior, num_outputs)),
            "alignment": label_free.alignment,
            "entropy": label_free.entropy,
            "evalnorm": label_free.evalnorm,
        }
        beside = STANDARD_METRICS if examples.labelled[indices].all() else ()
        objective = objectives[self.metric.name]
        return ByObjective(self.metric, objective, model.facts(), beside, num_outputs, self.batch_size)

    def final_judge(self, judge: Judge, examples: Examples, indices: Indices) -> tuple[Judge, list[Metric]]:
        """What gives the verdict on these examples, by labels where there are, and the metrics compared."""
        answers = (CONFIDENCE, PREDICTION)
        if not self.classes:
            return judge, [self.metric]
        if self.needs_labels or examples.labelled[indices].all():
            first = self.metric if self.needs_labels else ACCURACY
            metrics = [first, *(m for m in STANDARD_METRICS if m.name != first.name)]
            return ByMetric(first, [*metrics, *answers], self.batch_size), metrics
        assert isinstance(judge, ByObjective)
        return replace(judge, metrics=answers), [self.metric]


@dataclass
class _Job:
    """A search: the sites made, the ladder climbed, the verdict given."""

    model: Patchable
    goal: _Goal
    examples: Examples
    seen: Examples  # the same, or augmented: what the search goes by
    test_examples: Examples
    test_seen: Examples  # the same, or augmented likewise
    calib: Examples | None
    parts: list[tuple[Indices, Indices]]  # of the examples to tune on, and of the test examples to judge by
    plan: Plan
    progress: "_Progress"
    on_trial: Callable[[Trial, bool], None]
    max_overhead: float | None
    notes: list[str] = field(default_factory=list)

    def run(self, recover_folded: bool) -> TuneResult:
        """Do it; the model is as before when this returns."""
        with self.model.borrowed():
            came_with = self.model.setting()
            self.came_with = dict(self.model.targets())
            self._make_sites(recover_folded)
            before = Setting(
                {**self.model.identities(), **came_with.alphas},
                {**self.model.setting().lambdas, **came_with.lambdas},
            )
            if self.plan.storage:
                self.plan = replace(self.plan, fingerprint=self._fingerprint())
            self.judge = self.goal.judge(self.model, self.seen, self._whole)
            held = np.concatenate([held_out for _, held_out in self.parts])
            self.final_judge, self.metrics = self.goal.final_judge(self.judge, self.test_examples, held)
            self.alone = self.judge, self.final_judge  # what no process shares
            processes = start()
            return self._search(before) if processes is None else self._search_together(before, processes)

    @property
    def _whole(self) -> Indices:
        """All examples to tune on."""
        return self.parts[0][0] if len(self.parts) == 1 else np.arange(len(self.examples), dtype=np.int64)

    def _search_together(self, before: Setting, processes: Processes) -> TuneResult:
        """The first process searches, the others score what it asks for; all return its result."""
        judges = {
            number: (judge, examples)
            for number, (judge, examples) in enumerate(
                ((self.judge, self.seen), (self.final_judge, self.test_examples))
            )
            if isinstance(judge, ByMetric)
        }
        if processes.rank > 0:
            served: TuneResult = serve(processes, self.model, judges)
            return served
        if 0 in judges:
            self.judge = Shared(judges[0][0], 0, processes)
        if 1 in judges:
            self.final_judge = Shared(judges[1][0], 1, processes)
        result = None
        try:
            result = self._search(before)
            return result
        finally:
            dismiss(processes, result)

    def _search(self, before: Setting) -> TuneResult:
        ladder = self._ladder(self._whole, self.plan)
        rungs = self._climbed(ladder)
        points: list[Point] = []
        if self.max_overhead is not None:
            thinned, points = self._thinned(_chosen(rungs), ladder)
            rungs = [*(replace(rung, chosen=False) for rung in rungs), thinned]
        found = dict(self.model.targets())  # a cross-fit re-estimates moments without each part in turn
        rungs, setting, verdict = self._judge(before, rungs)
        self.model.retarget(self.came_with if setting is before else found)
        if self.seen is not self.examples and len(self.parts) == 1:
            self.notes.append(self._insured(before, setting))
        self.model.set(setting)
        recipe = self.model.recipe()
        self.progress.finish()
        if not self.goal.needs_labels:
            name = self.goal.metric.name
            self.notes.append(f"{name} needs no labels, and can't see everything: {LABEL_FREE[name]}")
        if len(self.parts) > 1:
            self.notes.append(
                f"few examples: {len(self.parts)} parts of them took turns in being held out (cross-fitting)"
            )
        skipped = {
            examples.source.name(index): why
            for examples in (self.examples, self.test_examples)
            for index, why in examples.skipped.items()
        }
        return TuneResult(
            self.goal.metric,
            rungs,
            ladder.trials,
            verdict,
            setting,
            list(setting.alphas),
            ladder.passes,
            len(set(self._whole.tolist()) - self.examples.skipped.keys()),
            len(self.parts),
            skipped,
            self.notes,
            ladder.interrupted,
            trade_off=points,
            recipe=recipe,
        )

    def _climbed(self, ladder: Ladder) -> list[Rung]:
        """The rungs of a ladder. Insurance against shifts that the data does not show costs it nothing."""
        rungs = ladder.climb()
        if self.seen is self.examples or len(rungs) == 1:
            return rungs
        name = self.goal.metric.name

        def clean(setting: Setting) -> Values:
            self.model.set(setting)
            return self.alone[0].scores(self.model, self.examples, ladder.tuning)[name]

        best = harmless(rungs, self.goal.metric, ladder.selected, clean)
        if best is None:
            self.notes.append(
                "nothing was found that helps the shifted images and leaves those at hand unharmed"
            )
            return [replace(rung, chosen=number == 0) for number, rung in enumerate(rungs)]
        others = [replace(rung, chosen=False) for rung in rungs if rung.name != best.name]
        return [*others, best]

    def _insured(self, before: Setting, setting: Setting) -> str:
        """What a setting does to held-out examples that are shifted, in words."""
        held_out = np.concatenate([held_out for _, held_out in self.parts])
        seen = gather(self.model, self.test_seen, self.alone[1], before, setting, held_out, self.came_with)
        metric = self.metrics[0]
        change = paired_difference(seen.before[metric.name], seen.after[metric.name])
        values = (metric.format(float(np.mean(v[metric.name]))) for v in (seen.before, seen.after))
        return (
            f"the held-out examples as --augment shifts them: {metric.name} {' → '.join(values)}, "
            f"{metric.format(change.value, signed=True)} "
            f"[{metric.format(change.low, signed=True)}, {metric.format(change.high, signed=True)}]"
        )

    def _judge(self, before: Setting, rungs: list[Rung]) -> tuple[list[Rung], Setting, Verdict]:
        """What held-out examples say of the chosen rung, and what is kept after that."""
        chosen = _chosen(rungs)
        evidence = self._evidence(before, chosen.setting)
        verdict = conclude(evidence, self.metrics)
        if str(verdict) == "loss":
            self.notes.append(f"{chosen.name}: best in tuning, but a loss on held-out examples; not applied")
            return rungs, before, verdict
        bound = self.max_overhead is not None or self.seen is not self.examples  # by more than the score
        if not bound and (lower := self._better_global(rungs, evidence)):
            self.notes.append(f"{chosen.name} does worse than {lower.name} on held-out examples: not applied")
            rungs = [replace(rung, chosen=rung is lower) for rung in rungs]
            return rungs, lower.setting, conclude(self._evidence(before, lower.setting), self.metrics)
        return rungs, chosen.setting, verdict

    def _thinned(self, chosen: Rung, ladder: Ladder) -> tuple[Rung, list[Point]]:
        """As many of the sites as the limit on latency allows."""
        assert self.max_overhead is not None  # or nobody would ask
        assert isinstance(self.model, (TorchModel, OnnxModel))  # what can be measured
        points = trade_off(self.model, chosen.setting, ladder.selected, self.goal.metric)
        best = choose(points, self.max_overhead)
        self.notes.append(f"--max-overhead: {best.reason}")
        if suggestion := knee(points):
            sites, ratio = suggestion.num_sites, suggestion.latency.ratio
            self.notes.append(f"the gain flattens beyond {sites} sites, at {ratio:.2f}x the time")
        setting = best.point.setting
        after, before = ladder.selected(setting), ladder.selected(points[0].setting)
        change = paired_difference(before, after)
        return Rung(f"at most {self.max_overhead:g}x", setting, float(np.mean(after)), change, True), points

    def _make_sites(self, recover_folded: bool) -> None:
        """Running moments from data where there are none."""
        where: dict[str, Any] = {"images": self.calib or self.examples, "batch_size": self.plan.batch_size}
        if self.calib is None:
            where["indices"] = self.parts[0][0]
        if recover_folded:
            recover(self.model, **where)
        if names := calibrate(self.model, **where):
            self.notes.append(
                f"{len(names)} norms have no running moments: they were taken from "
                + (
                    "the tuning examples (--calib-data says otherwise)"
                    if self.calib is None
                    else "--calib-data"
                )
            )

    def _ladder(self, tuning: Indices, plan: Plan) -> Ladder:
        ladder = Ladder(
            self.model,
            self.seen,
            self.seen.readable(tuning),
            self.judge,
            plan,
            targets_from=None if self.calib is None else (self.calib, None),
            count=self.progress.count,
            on_trial=self._report,
        )
        self.progress.expect(ladder.expected())
        return ladder

    def _report(self, trial: Trial, is_best: bool) -> None:
        if (
            trial.number == 0
            and trial.rung == "alpha"
            and self.goal.classes
            and ACCURACY.name in trial.scores
        ):
            warn_at_chance(trial.scores[ACCURACY.name], self.examples)
        self.on_trial(trial, is_best)

    def _evidence(self, before: Setting, chosen: Setting) -> Evidence:
        """On held-out examples; in a cross-fit, of what the same search finds without them."""
        label, parts = "verdict on held-out examples", []
        for fold, (tuning, held_out) in enumerate(self.parts):
            setting = chosen
            if len(self.parts) > 1:
                plan = replace(self.plan, study=f"{self.plan.study or 'bnpatch'}.fold{fold}")
                setting = _chosen(self._climbed(self._ladder(tuning, plan))).setting
                if self.max_overhead is not None:
                    setting = _thinned_like(chosen, setting, self.model.identities())
            self.progress.expect(2 * len(held_out))
            parts.append(
                gather(
                    self.model,
                    self.test_examples,
                    self.final_judge,
                    before,
                    setting,
                    held_out,
                    self.came_with,
                )
            )
            self.progress.count(label, 2 * len(held_out))
        return Evidence.joined(parts)

    def _better_global(self, rungs: list[Rung], evidence: Evidence) -> Rung | None:
        """One weight for all, if it does better on the held-out examples than the richer setting chosen."""
        lower = [rung for rung in rungs if rung.name in GLOBAL_RUNGS]
        metric = self.goal.metric
        best = sorted(lower, key=lambda rung: rung.mean, reverse=metric.higher_is_better)[0]
        if _chosen(rungs) in lower or len(self.parts) > 1:
            return None
        judged = self.metrics[0].name
        held_out = self.parts[0][1]
        other = gather(
            self.model, self.test_examples, self.final_judge, best.setting, best.setting, held_out, {}
        )
        change = paired_difference(other.after[judged], evidence.after[judged])
        worse = change.value < 0 if self.metrics[0].higher_is_better else change.value > 0
        return best if worse and change.excludes_zero else None

    def _fingerprint(self) -> dict[str, Any]:
        """What a study is of: with another model, other data or another metric its trials mean nothing."""
        sites = json.dumps(self.model.fingerprints(), sort_keys=True)
        return {
            "model": hashlib.sha256(sites.encode()).hexdigest()[:16],
            "preprocessing": None if self.examples.as_they_are else self.model.preprocessing.to_json(),
            "data": self.seen.fingerprint(),
            "calibration data": None if self.calib is None else self.calib.fingerprint(),
            "weigh single values": self.model.weigh_single_values,
            "examples": [int(sum(len(part) for part, _ in self.parts)), len(self.parts)],
            "metric": self.goal.metric.name,
            "class prior": str(self.goal.prior),
            "seed": self.plan.seed,
        }


def _thinned_like(chosen: Setting, setting: Setting, identities: Mapping[str, float]) -> Setting:
    """Leave at their identity the sites that were not worth their time."""
    return Setting(
        {n: identities[n] if chosen.alphas[n] == identities[n] else a for n, a in setting.alphas.items()},
        setting.lambdas,
    )


def _chosen(rungs: Sequence[Rung]) -> Rung:
    return next(rung for rung in rungs if rung.chosen)


class _Progress:
    """Counts examples towards a total that grows as more is found to be needed."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self._show = show
        self._done, self._total, self._label = 0, 0, ""

    def expect(self, examples: float) -> None:
        """So many more will come, about."""
        self._total += int(examples)

    def count(self, label: str, examples: int) -> None:
        """So many were done."""
        self._label = label
        self._done += examples
        self._show(label, self._done, max(self._done, self._total))

    def finish(self) -> None:
        """All that will be done is done."""
        self._show(self._label, self._done, self._done)


def _no_scores(outputs: Tensor, targets: Tensor) -> Tensor:
    raise BnpatchError("a label-free objective has no scores of single examples", "choose another metric")


def _check_settings(
    trials: int | None, max_passes: float, holdout: float | None, max_overhead: float | None
) -> None:
    if trials is not None and trials < 1:
        raise BnpatchError(f"{trials} trials find nothing", "set --trials to 1 or more")
    if not max_passes > 0:
        raise BnpatchError(f"{max_passes} passes find nothing", "set --max-passes to 1 or more")
    if max_overhead is not None and not max_overhead >= 1:
        raise BnpatchError(f"{max_overhead:g} times the latency is not possible", "write --max-overhead 1.1")
    if holdout is not None and not 0 < holdout < 1:
        raise BnpatchError(f"a held-out part of {holdout} is not a fraction", "set --holdout between 0 and 1")


def _parts(
    examples: Examples, test: Examples | None, holdout: float | None, seed: int, needs_labels: bool
) -> list[tuple[Indices, Indices]]:
    """Which examples to tune on and which to judge by; several such pairs for a cross-fit.

    Raises:
        BnpatchError: they are too few, or of one class.
    """
    if needs_labels and examples.classes and len(np.unique(examples.targets)) < 2:
        raise BnpatchError(
            "all examples are of one class", "give data with the classes that the model tells apart"
        )
    everything = np.arange(len(examples), dtype=np.int64)
    if test is not None:
        parts = [(everything, np.arange(len(test), dtype=np.int64))]
    elif holdout is None and _FOLDS * 2 <= int((examples.strata >= 0).sum()) < SCARCE:
        held = folds(examples.strata, _FOLDS, seed)
        parts = [(np.setdiff1d(everything, held_out), held_out) for held_out in held]
    else:
        parts = [split(examples.strata, 0.5 if holdout is None else holdout, seed)]
    if any(len(tuning) < 2 or not len(held_out) for tuning, held_out in parts):
        raise BnpatchError(
            f"{len(examples)} examples are too few to tune on some and to judge by others", "give more data"
        )
    return parts


def _provenance(result: TuneResult, job: _Job, data: Any, test_data: Any) -> dict[str, Any]:
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
            for r in result.rungs
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
