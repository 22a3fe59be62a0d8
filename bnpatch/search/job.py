"""A search from end to end: the norm layers made, the list of candidates climbed, the verdict given."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import if_finite, warn_at_chance
from bnpatch.evaluation.metrics import ACCURACY, CALIBRATION_ERROR, Metric, Values, paired_difference
from bnpatch.models.base import Patchable
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.candidates import CandidateSearch
from bnpatch.search.config import GLOBAL_RUNGS, Candidate, Plan, Trial, kept
from bnpatch.search.distributed import Processes, SharedJudge, dismiss, serve, start
from bnpatch.search.held_out import Evidence, Verdict, conclude, gather, scores
from bnpatch.search.latency_limit import Point, choose, knee, trade_off
from bnpatch.search.make_norms import make_norms
from bnpatch.search.objective import LABEL_FREE, ByMetric, Goal, Judge
from bnpatch.search.progress import Progress
from bnpatch.search.result import TuneResult
from bnpatch.search.robustness import without_harm

#: How long latencies are measured where there is a limit on them.
LATENCY_SECONDS = 10.0

# A verdict of fewer examples says little.
_FEW = 30


@dataclass
class Job:
    """A search: the norm layers made, the list of candidates climbed, the verdict given.

    In a cross-fit the list of candidates is climbed once more without each part of the examples, which then
    judges what was found. These searches share the time that there is and climb as far as the first one did.
    Where time is over or the user interrupts, the verdict is of the parts that were judged before, one at
    least. Where the first search keeps the model as it is, that is what is judged. Two things are taken from
    all examples once: running moments of norms that have none, and which norm layers a limit on latency
    leaves out.
    """

    model: Patchable
    goal: Goal
    examples: Examples
    seen: Examples  # the same, or augmented: what the search goes by
    test_examples: Examples
    test_seen: Examples  # the same, or augmented likewise
    calib: Examples | None
    parts: list[tuple[Indices, Indices]]  # of the examples to tune on, and of the test examples to judge by
    plan: Plan
    progress: Progress
    on_trial: Callable[[Trial, bool], None]
    max_overhead: float | None
    notes: list[str] = field(default_factory=list)

    # What is known once it runs: who judges, what the model came with, and what was done so far.
    judge: Judge = field(init=False)
    final_judge: Judge = field(init=False)
    metrics: list[Metric] = field(init=False)
    baseline_statistics: dict[str, Moments[Any]] = field(init=False)
    _alone: tuple[Judge, Judge] = field(init=False)  # the judges, before several processes share them
    _started: float = field(init=False)
    _climbed_in: float = field(init=False)
    _ladders: list[CandidateSearch] = field(default_factory=list, init=False)
    _seen_clean: int = field(default=0, init=False)
    _interrupted: bool = field(default=False, init=False)

    def run(self, recover_folded: bool) -> TuneResult:
        """Do it; the model is as before when this returns."""
        self._started = time.monotonic()
        with self.model.borrowed():
            baseline_statistics = self.model.setting()
            self.baseline_statistics = dict(self.model.targets())
            self.notes += make_norms(
                self.model,
                self.calib,
                self.examples,
                self._whole,
                batch_size=self.plan.batch_size,
                recover_folded=recover_folded,
            )
            before = PatchWeights(
                {**self.model.identities(), **baseline_statistics.alphas},
                {**self.model.setting().lambdas, **baseline_statistics.lambdas},
            )
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

    def _search_together(self, before: PatchWeights, processes: Processes) -> TuneResult:
        """The first process searches, the others score what it asks for; all return its result."""
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

    def _search(self, before: PatchWeights) -> TuneResult:
        ladder = self._ladder(self._whole, self.plan)
        candidates = self._climbed(ladder)
        self._climbed_in = time.monotonic() - self._started
        points: list[Point] = []
        if self.max_overhead is not None:
            thinned, points = self._thinned(kept(candidates), ladder)
            candidates = [*(replace(candidate, chosen=False) for candidate in candidates), thinned]
        found = dict(self.model.targets())  # a cross-fit re-estimates moments without each part in turn
        candidates, setting, verdict, num_parts = self._judge(before, candidates)
        self.model.retarget(self.baseline_statistics if setting is before else found)
        if self.seen is not self.examples and len(self.parts) == 1:
            self.notes.append(self._insured(before, setting))
        self.model.set(setting)
        recipe = self.model.recipe()
        self.progress.finish()
        if resumed := sum(climbed.resumed for climbed in self._ladders):
            self.notes.append(f"{resumed} trials were in the storage already")
        if verdict.num_examples < _FEW:
            self.notes.append(f"{verdict.num_examples} examples judged: so few say little")
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
            ladder.trials,
            verdict,
            setting,
            list(setting.alphas),
            (sum(climbed.seen for climbed in self._ladders) + self._seen_clean) / len(ladder.tuning),
            len(set(self._whole.tolist()) - self.examples.skipped.keys()),
            num_parts,
            skipped,
            self.notes,
            self._interrupted,
            trade_off=points,
            recipe=recipe,
        )

    def _climbed(self, ladder: CandidateSearch) -> list[Candidate]:
        """The candidates. Robustness against shifts that the data does not show costs it nothing."""
        candidates = ladder.climb()
        if ladder.interrupted and ladder is self._ladders[0]:  # the verdict takes a while yet
            self._interrupted = True
            warnings.warn(
                "interrupted: what was found so far is judged now (interrupt again to end sooner)",
                BnpatchWarning,
                stacklevel=2,
            )
        if self.seen is self.examples or len(candidates) == 1:
            return candidates
        name = self.goal.metric.name

        def clean(setting: PatchWeights) -> Values:
            self.model.set(setting)
            self._seen_clean += len(ladder.tuning)
            return self._alone[0].scores(self.model, self.examples, ladder.tuning)[name]

        best = without_harm(
            candidates, self.goal.metric, ladder.selection.scores, ladder.selection.gains, clean
        )
        if best is None:
            if ladder is self._ladders[0]:
                self.notes.append(
                    "nothing was found that helps the shifted images and leaves those at hand unharmed"
                )
            return [replace(candidate, chosen=number == 0) for number, candidate in enumerate(candidates)]
        others = [replace(candidate, chosen=False) for candidate in candidates if candidate.name != best.name]
        return [*others, best]

    def _insured(self, before: PatchWeights, setting: PatchWeights) -> str:
        """What a setting does to held-out examples that are shifted, in words."""
        held_out = np.concatenate([held_out for _, held_out in self.parts])
        seen = gather(
            self.model, self.test_seen, self._alone[1], before, setting, held_out, self.baseline_statistics
        )
        metric = self.metrics[0]
        change = paired_difference(seen.before[metric.name], seen.after[metric.name])
        values = (metric.format(float(np.mean(v[metric.name]))) for v in (seen.before, seen.after))
        return (
            f"the held-out examples as --augment shifts them: {metric.name} {' → '.join(values)}, "
            f"{metric.format(change.value, signed=True)} "
            f"[{metric.format(change.low, signed=True)}, {metric.format(change.high, signed=True)}]"
        )

    def _judge(
        self, before: PatchWeights, candidates: list[Candidate]
    ) -> tuple[list[Candidate], PatchWeights, Verdict, int]:
        """What held-out examples say of the chosen candidate, what is kept then, and how many parts judged
        it.
        """
        chosen = kept(candidates)
        parts = self._evidence(before, chosen.setting)
        evidence = Evidence.joined(parts)
        verdict = conclude(evidence, self.metrics)
        identities = self.model.identities()
        if len(parts) > 1 and before.is_identity(identities) and chosen.setting.is_identity(identities):
            tuned = verdict.comparisons[0]
            if change := tuned.change.value:
                self.notes.append(
                    "what was found without one of the parts changes their "
                    f"{tuned.metric.name} by {tuned.metric.format(change, signed=True)}; all images together "
                    "speak for none of it"
                )
            return (
                candidates,
                before,
                conclude(replace(evidence, after=evidence.before), self.metrics),
                len(parts),
            )
        if str(verdict) == "loss":
            self.notes.append(f"{chosen.name}: best in tuning, but a loss on held-out examples; not applied")
            return candidates, before, verdict, len(parts)
        bound = self.max_overhead is not None or self.seen is not self.examples  # by more than the score
        if not bound and (lower := self._better_global(candidates, evidence)):
            self.notes.append(
                f"{chosen.name} does worse than {lower.name} on held-out examples: not applied "
                f"(their verdict on {lower.name}, which they chose, flatters it a little)"
            )
            candidates = [replace(candidate, chosen=candidate is lower) for candidate in candidates]
            evidence = self._gathered(before, lower.setting, self.parts[0][1])
            return candidates, lower.setting, conclude(evidence, self.metrics), 1
        return candidates, chosen.setting, verdict, len(parts)

    def _thinned(self, chosen: Candidate, ladder: CandidateSearch) -> tuple[Candidate, list[Point]]:
        """As many of the norm layers as the limit on latency allows."""
        assert self.max_overhead is not None  # or nobody would ask
        assert isinstance(self.model, (TorchModel, OnnxModel))  # what can be measured
        seconds = LATENCY_SECONDS
        if self.plan.timeout is not None:
            seconds = min(seconds, max(1.0, self._left() / (1 + self._to_come)))
        points = trade_off(
            self.model, chosen.setting, ladder.selection.scores, self.goal.metric, seconds=seconds
        )
        best = choose(points, self.max_overhead)
        self.notes.append(f"--max-overhead: {best.reason}")
        if suggestion := knee(points):
            norm_layers, ratio = suggestion.num_norms, suggestion.latency.ratio
            self.notes.append(f"the gain flattens beyond {norm_layers} norm layers, at {ratio:.2f}x the time")
        setting = best.point.setting
        after, before = ladder.selection.scores(setting), ladder.selection.scores(points[0].setting)
        change = paired_difference(before, after)
        return Candidate(
            f"at most {self.max_overhead:g}x", setting, float(np.mean(after)), change, True
        ), points

    def _left(self) -> float:
        """Seconds, where there is a limit."""
        assert self.plan.timeout is not None  # or nobody would ask
        return max(0.0, self.plan.timeout - (time.monotonic() - self._started))

    @property
    def _to_come(self) -> int:
        """Ladders that are yet to be climbed."""
        return (1 if len(self.parts) == 1 else 1 + len(self.parts)) - len(self._ladders)

    def _ladder(self, tuning: Indices, plan: Plan, at_least: float = 0.0) -> CandidateSearch:
        """One to climb, in its share of the time or so many seconds."""
        if plan.timeout is not None:
            plan = replace(plan, timeout=max(at_least, self._left() / self._to_come))
        is_first = not self._ladders
        ladder = CandidateSearch(
            self.model,
            self.seen,
            self.seen.readable(tuning),
            self.judge,
            plan,
            targets_from=None if self.calib is None else (self.calib, None),
            count=self.progress.count,
            on_trial=self._report if is_first else lambda trial, is_best: None,
        )
        self.progress.expect(ladder.expected())
        self._ladders.append(ladder)
        return ladder

    def _report(self, trial: Trial, is_best: bool) -> None:
        if (
            trial.number == 0
            and trial.candidate == "alpha"
            and self.goal.classes
            and ACCURACY.name in trial.scores
        ):
            warn_at_chance(trial.scores[ACCURACY.name], self.examples)
        self.on_trial(trial, is_best)

    def _evidence(self, before: PatchWeights, chosen: PatchWeights) -> list[Evidence]:
        """Of each part held out; in a cross-fit, on what the same search finds without it."""
        if len(self.parts) == 1:
            return [self._gathered(before, chosen, self.parts[0][1])]
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
        turns = f"{len(judged)} of {len(self.parts)} parts took turns in being held out (cross-fitting)"
        note = f"few examples: {turns}"
        if len(judged) < len(self.parts):
            note += ", then the search was interrupted" if self._interrupted else ", then time was over"
        self.notes.append(note)
        return judged

    def _judged_by(self, fold: int, before: PatchWeights, chosen: PatchWeights) -> Evidence | None:
        """What a part says of what is found without it; None where time was over before that was as much.

        Raises:
            KeyboardInterrupt: what was found is not what the search would have.
        """
        tuning, held_out = self.parts[fold]
        whole = self._ladders[0]
        plan = replace(self.plan, study=f"{self.plan.study or 'bnpatch'}.fold{fold}", reach=whole.reached)
        # Without a part there is no verdict: the first has time enough for what was done before.
        ladder = self._ladder(tuning, plan, at_least=2 * self._climbed_in if fold == 0 else 0.0)
        setting = kept(self._climbed(ladder)).setting
        if ladder.interrupted:
            raise KeyboardInterrupt
        cut_shorter = ladder.cut and not (whole.cut and ladder.passes >= whole.passes)
        if fold > 0 and (ladder.reached < whole.reached or cut_shorter):
            return None
        if self.max_overhead is not None:
            setting = _thinned_like(chosen, setting, self.model.identities())
        return self._gathered(before, setting, held_out)

    def _gathered(self, before: PatchWeights, setting: PatchWeights, held_out: Indices) -> Evidence:
        self.progress.expect(2 * len(held_out))
        evidence = gather(
            self.model,
            self.test_examples,
            self.final_judge,
            before,
            setting,
            held_out,
            self.baseline_statistics,
        )
        self.progress.count("verdict on held-out examples", 2 * len(held_out))
        return evidence

    def _better_global(self, candidates: list[Candidate], evidence: Evidence) -> Candidate | None:
        """One weight for all, if it does better on the held-out examples than the richer setting chosen."""
        lower = [candidate for candidate in candidates if candidate.name in GLOBAL_RUNGS]
        if kept(candidates) in lower or len(self.parts) > 1:
            return None
        best = max(lower, key=lambda candidate: self.goal.metric.sign * candidate.mean)
        metric, held_out = self.metrics[0], self.parts[0][1]
        of_best = if_finite(
            partial(scores, self.model, self.test_examples, self.final_judge, best.setting, held_out)
        )
        if of_best is None:
            return None
        change = paired_difference(of_best[metric.name], evidence.after[metric.name])
        return best if metric.sign * change.value < 0 and change.excludes_zero else None

    def _fingerprint(self) -> dict[str, Any]:
        """What a study is of: with another model, other data or another metric its trials mean nothing."""
        norm_layers = json.dumps(self.model.fingerprints(), sort_keys=True)
        return {
            "model": hashlib.sha256(norm_layers.encode()).hexdigest()[:16],
            "preprocessing": None if self.examples.as_they_are else self.model.preprocessing.to_json(),
            "data": self.seen.fingerprint(),
            "calibration data": None if self.calib is None else self.calib.fingerprint(),
            "weigh single values": self.model.include_1x1,
            "metric": self.goal.metric.name,
            "class prior": str(self.goal.prior),
            "seed": self.plan.seed,
        }


def _thinned_like(
    chosen: PatchWeights, setting: PatchWeights, identities: Mapping[str, float]
) -> PatchWeights:
    """Leave at their identity the norm layers that were not worth their time."""
    return PatchWeights(
        {n: identities[n] if chosen.alphas[n] == identities[n] else a for n, a in setting.alphas.items()},
        setting.lambdas,
    )
