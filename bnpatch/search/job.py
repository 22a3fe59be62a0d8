"""A search from end to end: make norm layers, find candidates, judge the best on held-out examples."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import warn_at_chance
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CALIBRATION_ERROR,
    ROUGH_BELOW,
    Metric,
    Values,
    paired_difference,
)
from bnpatch.evaluation.permutation import warn_if_permuted
from bnpatch.models.base import Model
from bnpatch.search.candidates import CandidateSearch
from bnpatch.search.config import Candidate, Plan, Trial, kept
from bnpatch.search.distributed import Processes, SharedJudge, dismiss, serve, start
from bnpatch.search.held_out import Evidence, Verdict, conclude, gather
from bnpatch.search.latency_limit import Point, choose, knee, trade_off
from bnpatch.search.make_norms import make_norms
from bnpatch.search.objective import LABEL_FREE, ByMetric, Goal, Judge
from bnpatch.search.progress import Progress
from bnpatch.search.result import TuneResult
from bnpatch.search.robustness import without_harm

#: Seconds to measure latencies for, where there is a latency limit.
LATENCY_SECONDS = 10.0

# A verdict on fewer examples than this says little, and a note says so.
_FEW = 30


@dataclass
class Job:
    """A search from end to end.

    In a cross-fit, further searches each leave out one part of the examples, which then judges what was
    found. These searches share the time that is left and find as many candidates as the first search did. If
    time runs out or the user interrupts, the verdict comes from the parts judged so far, at least one. If the
    first search keeps the baseline, the verdict is about the baseline. Two things are taken from all examples
    once: running statistics of norms that have none, and which norm layers a latency limit leaves out.
    """

    model: Model[Any]
    goal: Goal
    examples: Examples
    seen: Examples  # the same, or augmented: what the search scores
    test_examples: Examples
    test_seen: Examples  # the same, or augmented likewise
    calib: Examples | None
    parts: list[tuple[Indices, Indices]]  # to tune on (of examples), and to judge by (of test_examples)
    plan: Plan
    progress: Progress
    on_trial: Callable[[Trial, bool], None]
    max_overhead: float | None
    notes: list[str] = field(default_factory=list)

    # Set by run: the judges, and what was done so far.
    judge: Judge = field(init=False)
    final_judge: Judge = field(init=False)
    metrics: list[Metric] = field(init=False)
    _alone: tuple[Judge, Judge] = field(init=False)  # the judges, before several processes share them
    _started: float = field(init=False)
    _seconds_of_first: float = field(init=False)
    _searches: list[CandidateSearch] = field(default_factory=list, init=False)
    _seen_clean: int = field(default=0, init=False)
    _interrupted: bool = field(default=False, init=False)

    def run(self, recover_folded: bool) -> TuneResult:
        """Run the search; the model has its former state again when this returns."""
        self._started = time.monotonic()
        with self.model.borrowed():
            self.notes += make_norms(
                self.model,
                self.calib,
                self.examples,
                self._whole,
                batch_size=self.plan.batch_size,
                recover_folded=recover_folded,
            )
            before = self.model.state
            if self.plan.storage:
                self.plan = replace(self.plan, fingerprint=self._fingerprint())
            self.judge = self.goal.judge(self.model, self.seen, self._whole)
            held = np.concatenate([held_out for _, held_out in self.parts])
            self.final_judge, self.metrics = self.goal.final_judge(self.judge, self.test_examples, held)
            self._alone = self.judge, self.final_judge
            processes = start()
            return self._search(before) if processes is None else self._search_together(before, processes)

    @property
    def _whole(self) -> Indices:
        """All examples to tune on."""
        return self.parts[0][0] if len(self.parts) == 1 else np.arange(len(self.examples), dtype=np.int64)

    def _search_together(self, before: PatchState, processes: Processes) -> TuneResult:
        """Search in the first process; the others score what it asks for, and all return its result."""
        judges = {
            number: (judge, examples)
            for number, (judge, examples) in enumerate(
                ((self.judge, self.seen), (self.final_judge, self.test_examples))
            )
            if isinstance(judge, ByMetric)
        }
        if processes.rank > 0:
            served: TuneResult = serve(
                processes, self.model, judges, [self.goal.metric, *self.metrics, CALIBRATION_ERROR]
            )
            return served
        if 0 in judges:
            self.judge = SharedJudge(judges[0][0], 0, processes)
        if 1 in judges:
            self.final_judge = SharedJudge(judges[1][0], 1, processes)
        result = None
        try:
            result = self._search(before)
            return result
        finally:
            dismiss(processes, result)

    def _search(self, before: PatchState) -> TuneResult:
        search = self._candidate_search(self._whole, self.plan)
        candidates = self._found_by(search)
        self._seconds_of_first = time.monotonic() - self._started
        points: list[Point] = []
        if self.max_overhead is not None:
            thinned, points = self._thinned(kept(candidates), search)
            candidates = [*(replace(candidate, chosen=False) for candidate in candidates), thinned]
        state, verdict, num_parts = self._verdict(before, candidates)
        if verdict.classes is not None:
            warn_if_permuted(verdict.classes[1], verdict.classes[0], self.model.class_names)
        if self.seen is not self.examples and len(self.parts) == 1:
            self.notes.append(self._robustness_note(before, state))
        recipe = self.model.recipe(state)
        self.progress.finish()
        if resumed := sum(climbed.resumed for climbed in self._searches):
            self.notes.append(f"{resumed} trials were in the storage already")
        if verdict.num_examples < _FEW:
            self.notes.append(f"{verdict.num_examples} examples judged: so few say little")
        elif any(comparison.is_rough for comparison in verdict.comparisons):
            self.notes.append(f"below {ROUGH_BELOW} examples the interval of the cross-entropy is rough")
        if not self.goal.needs_labels:
            name = self.goal.metric.name
            self.notes.append(f"{name} needs no labels, and can't see everything: {LABEL_FREE[name]}")
        skipped = {
            examples.source.name(index): why
            for examples in (self.examples, self.test_examples)
            for index, why in examples.skipped.items()
        }
        return TuneResult(
            self.goal.metric,
            candidates,
            search.trials,
            verdict,
            state.weights,
            list(state.weights.alphas),
            (sum(climbed.seen for climbed in self._searches) + self._seen_clean) / len(search.tuning),
            len(set(self._whole.tolist()) - self.examples.skipped.keys()),
            num_parts,
            skipped,
            self.notes,
            self._interrupted,
            trade_off=points,
            recipe=recipe,
        )

    def _found_by(self, search: CandidateSearch) -> list[Candidate]:
        """Find the candidates; with augmentation, choose one that does no harm to the original images."""
        candidates = search.find()
        if search.interrupted and search is self._searches[0]:  # the verdict still takes a while
            self._interrupted = True
            warnings.warn(
                "interrupted: what was found so far is judged now (interrupt again to end sooner)",
                BnpatchWarning,
                stacklevel=2,
            )
        if self.seen is self.examples or len(candidates) == 1:
            return candidates
        name = self.goal.metric.name

        def clean(weights: PatchWeights) -> Values:
            self.model.set_state(search.base.with_weights(weights))
            self._seen_clean += len(search.tuning)
            return self._alone[0].scores(self.model, self.examples, search.tuning)[name]

        best = without_harm(
            candidates, self.goal.metric, search.selection.scores, search.selection.gains, clean
        )
        if best is None:
            if search is self._searches[0]:
                self.notes.append(
                    "nothing was found that helps the shifted images and leaves those at hand unharmed"
                )
            return [replace(candidate, chosen=number == 0) for number, candidate in enumerate(candidates)]
        others = [replace(candidate, chosen=False) for candidate in candidates if candidate.name != best.name]
        return [*others, best]

    def _robustness_note(self, before: PatchState, state: PatchState) -> str:
        """Describe what the state does to augmented held-out examples."""
        held_out = np.concatenate([held_out for _, held_out in self.parts])
        seen = gather(self.model, self.test_seen, self._alone[1], before, state, held_out)
        metric = self.metrics[0]
        change = paired_difference(seen.before[metric.name], seen.after[metric.name])
        values = (metric.format(float(np.mean(v[metric.name]))) for v in (seen.before, seen.after))
        return (
            f"the held-out examples as --augment shifts them: {metric.name} {' → '.join(values)}, "
            f"{metric.format(change.value, signed=True)} "
            f"[{metric.format(change.low, signed=True)}, {metric.format(change.high, signed=True)}]"
        )

    def _verdict(self, before: PatchState, candidates: list[Candidate]) -> tuple[PatchState, Verdict, int]:
        """Judge the chosen candidate on held-out examples, which have no say in what is chosen.

        Returns the state that is kept, the verdict, and how many parts judged.
        """
        chosen = kept(candidates)
        base = self._searches[0].base
        parts = self._evidence(before, chosen.weights)
        evidence = Evidence.joined(parts)
        verdict = conclude(evidence, self.metrics)
        identities = self.model.identities()
        if (
            len(parts) > 1
            and before.weights.is_identity(identities)
            and chosen.weights.is_identity(identities)
        ):
            tuned = verdict.comparisons[0]
            if change := tuned.change.value:
                self.notes.append(
                    "what was found without one of the parts changes their "
                    f"{tuned.metric.name} by {tuned.metric.format(change, signed=True)}; all images together "
                    "speak for none of it"
                )
            return before, conclude(replace(evidence, after=evidence.before), self.metrics), len(parts)
        if str(verdict) == "loss":
            self.notes.append(f"{chosen.name}: best in tuning, but a loss on held-out examples; not applied")
            return before, verdict, len(parts)
        return base.with_weights(chosen.weights), verdict, len(parts)

    def _thinned(self, chosen: Candidate, search: CandidateSearch) -> tuple[Candidate, list[Point]]:
        """Keep as many norm layers patched as the latency limit allows."""
        assert self.max_overhead is not None  # the caller has checked it
        seconds = LATENCY_SECONDS
        if self.plan.timeout is not None:
            seconds = min(seconds, max(1.0, self._left() / (1 + self._searches_left)))
        points = trade_off(
            self.model, chosen.weights, search.selection.scores, self.goal.metric, seconds=seconds
        )
        best = choose(points, self.max_overhead)
        self.notes.append(f"--max-overhead: {best.reason}")
        if suggestion := knee(points):
            norm_layers, ratio = suggestion.num_norms, suggestion.latency.ratio
            self.notes.append(f"the gain flattens beyond {norm_layers} norm layers, at {ratio:.2f}x the time")
        weights = best.point.weights
        after, before = search.selection.scores(weights), search.selection.scores(points[0].weights)
        change = paired_difference(before, after)
        return Candidate(
            f"at most {self.max_overhead:g}x", weights, float(np.mean(after)), change, True
        ), points

    def _left(self) -> float:
        """Seconds left, where there is a time limit."""
        assert self.plan.timeout is not None  # the callers have checked it
        return max(0.0, self.plan.timeout - (time.monotonic() - self._started))

    @property
    def _searches_left(self) -> int:
        """Number of searches that have not begun."""
        return (1 if len(self.parts) == 1 else 1 + len(self.parts)) - len(self._searches)

    def _candidate_search(self, tuning: Indices, plan: Plan, at_least: float = 0.0) -> CandidateSearch:
        """Make a search, with its share of the time left or with ``at_least`` seconds."""
        if plan.timeout is not None:
            plan = replace(plan, timeout=max(at_least, self._left() / self._searches_left))
        is_first = not self._searches
        search = CandidateSearch(
            self.model,
            self.seen,
            self.seen.readable(tuning),
            self.judge,
            plan,
            statistics_from=None if self.calib is None else (self.calib, None),
            count=self.progress.count,
            on_trial=self._report if is_first else lambda trial, is_best: None,
        )
        self.progress.expect(search.expected())
        self._searches.append(search)
        return search

    def _report(self, trial: Trial, is_best: bool) -> None:
        if (
            trial.number == 0
            and trial.candidate == "alpha"
            and self.goal.classes
            and ACCURACY.name in trial.scores
        ):
            warn_at_chance(trial.scores[ACCURACY.name], self.examples)
        self.on_trial(trial, is_best)

    def _evidence(self, before: PatchState, chosen: PatchWeights) -> list[Evidence]:
        """Evidence from each held-out part; in a cross-fit, about what a search without it finds."""
        if len(self.parts) == 1:
            after = self._searches[0].base.with_weights(chosen)
            return [self._gathered(before, after, self.parts[0][1])]
        judged: list[Evidence] = []
        for fold in range(len(self.parts)):
            try:
                evidence = self._judged_by(fold, before, chosen)
            except KeyboardInterrupt:
                if not judged:
                    raise
                self._interrupted = True
                evidence = None
            if evidence is None:
                break
            judged.append(evidence)
        moves = f"{len(judged)} of {len(self.parts)} parts took turns in being held out (cross-fitting)"
        note = f"few examples: {moves}"
        if len(judged) < len(self.parts):
            note += ", then the search was interrupted" if self._interrupted else ", then time was over"
        self.notes.append(note)
        return judged

    def _judged_by(self, fold: int, before: PatchState, chosen: PatchWeights) -> Evidence | None:
        """Search without one part, and judge by that part; None if time ran out before the search was done.

        Raises:
            KeyboardInterrupt: the user interrupted the search, so that its result is incomplete.
        """
        tuning, held_out = self.parts[fold]
        whole = self._searches[0]
        plan = replace(self.plan, study=f"{self.plan.study or 'bnpatch'}.fold{fold}", reach=whole.reached)
        # A verdict needs one part, so the first has time enough to repeat the search on all examples.
        search = self._candidate_search(
            tuning, plan, at_least=2 * self._seconds_of_first if fold == 0 else 0.0
        )
        weights = kept(self._found_by(search)).weights
        if search.interrupted:
            raise KeyboardInterrupt
        cut_shorter = search.cut and not (whole.cut and search.passes >= whole.passes)
        if fold > 0 and (search.reached < whole.reached or cut_shorter):
            return None
        if self.max_overhead is not None:
            weights = _thinned_like(chosen, weights, self.model.identities())
        return self._gathered(before, search.base.with_weights(weights), held_out)

    def _gathered(self, before: PatchState, after: PatchState, held_out: Indices) -> Evidence:
        self.progress.expect(2 * len(held_out))
        evidence = gather(
            self.model,
            self.test_examples,
            self.final_judge,
            before,
            after,
            held_out,
        )
        self.progress.count("verdict on held-out examples", 2 * len(held_out))
        return evidence

    def _fingerprint(self) -> dict[str, Any]:
        """What a study was made with: its trials are invalid for another model, other data or metrics."""
        norm_layers = json.dumps(self.model.fingerprints(), sort_keys=True)
        return {
            "model": hashlib.sha256(norm_layers.encode()).hexdigest()[:16],
            "preprocessing": None if self.examples.as_they_are else self.model.preprocessing.to_json(),
            "data": self.seen.fingerprint(),
            "calibration data": None if self.calib is None else self.calib.fingerprint(),
            "weigh single values": self.model.state.include_1x1,
            "metric": self.goal.metric.name,
            "class prior": str(self.goal.prior),
            "seed": self.plan.seed,
        }


def _thinned_like(
    chosen: PatchWeights, weights: PatchWeights, identities: Mapping[str, float]
) -> PatchWeights:
    """Set to their identity the norm layers that the latency limit left out of ``chosen``."""
    return PatchWeights(
        {n: identities[n] if chosen.alphas[n] == identities[n] else a for n, a in weights.alphas.items()},
        weights.lambdas,
    )
