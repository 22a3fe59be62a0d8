"""The searches of a task: one on all tuning examples and, in a cross-fit, one more without each part."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite, warn_at_chance
from bnpatch.evaluation.metrics import ACCURACY
from bnpatch.models.doctor import warn_of_preprocessing
from bnpatch.search.candidates import CandidateSearch
from bnpatch.search.config import Candidate, Plan, Trial, chosen_of
from bnpatch.search.held_out import PairedScores, gather
from bnpatch.search.keep import KeepSet
from bnpatch.search.objective import Objective
from bnpatch.search.progress import Progress
from bnpatch.search.selection import without_harm
from bnpatch.search.task import Task


class Searches:
    """The searches of a task.

    In a cross-fit, further searches each leave out one part of the examples, which then judges what was
    found. These searches share the time that is left, and try as many ways to find candidates as the first
    search did. If time runs out or the user interrupts, the parts judged so far give the verdict; one is
    judged in any case. Two things are found once, from all examples: the running statistics of norms that
    have none, and which norm layers a latency limit leaves unpatched.

    Attributes:
        task: what to search.
        keep: images on which a patch must do no harm; None for none.
        whole: the search on all tuning examples, once it has begun.
        notes: notes for the user.
        interrupted: whether the user interrupted a search.
        refused: where all that gains does harm, the state that the first search would have chosen otherwise,
            and why it did not.
    """

    def __init__(
        self,
        task: Task,
        objective: Objective,
        unshared: Objective,
        progress: Progress,
        on_trial: Callable[[Trial, bool], None],
        started: float,
        keep: KeepSet | None = None,
    ) -> None:
        """Prepare the searches.

        Args:
            task: what to search.
            objective: scores the examples, in several processes where there are several.
            unshared: the same objective in this process alone.
            progress: counts the examples.
            on_trial: called after each trial of the first search.
            started: time at which the task began, by ``time.monotonic``.
            keep: images on which a patch must do no harm.
        """
        self.task, self.keep, self._objective, self._unshared = task, keep, objective, unshared
        self._progress, self._on_trial, self._started = progress, on_trial, started
        self._begun: list[CandidateSearch] = []
        self._seconds_of_whole = 0.0
        self._expected = 0.0  # examples that the first search was expected to score
        self._clean_examples = 0  # scored to see whether a patch harms images that are not augmented
        self.notes: list[str] = []
        self.interrupted = False
        self.refused: tuple[PatchState, str] | None = None

    @property
    def whole(self) -> CandidateSearch:
        """The search on all tuning examples."""
        return self._begun[0]

    @property
    def passes(self) -> float:
        """The cost of all searches so far, in passes over the tuning examples."""
        scored = sum(search.budget.spent for search in self._begun) + self._clean_examples
        if self.keep is not None:
            scored += self.keep.scored
        return scored / len(self.whole.tuning)

    @property
    def resumed(self) -> int:
        """Number of trials that the storage had from an earlier run."""
        return sum(search.resumed for search in self._begun)

    def share_of_time(self, others: int = 0) -> float | None:
        """Divide the time left by the searches that have not begun and ``others``; None without a limit."""
        if self.task.plan.timeout is None:
            return None
        left = max(0.0, self.task.plan.timeout - (time.monotonic() - self._started))
        return left / (self.task.num_searches - len(self._begun) + others)

    def search_all(self) -> list[Candidate]:
        """Search on all tuning examples."""
        search = self._begin(self.task.tuning, self.task.plan)
        candidates = self._find(search)
        self._seconds_of_whole = time.monotonic() - self._started
        return candidates

    def paired_scores(
        self, objective: Objective, unshared: Objective, baseline: PatchState, chosen: PatchWeights
    ) -> tuple[PairedScores, PairedScores | None, int]:
        """Score held-out parts without and with the patch; in a cross-fit, what a search without each found.

        Args:
            objective: scores the held-out examples.
            unshared: the same objective in this process alone.
            baseline: the state of the model before the search.
            chosen: the weights that the search on all tuning examples chose.

        Returns:
            The scores of the examples as they are, those of the augmented examples where there are any, and
            the number of parts that judged.

        Raises:
            KeyboardInterrupt: the user interrupted before any part had judged.
        """
        task = self.task
        plain: list[PairedScores] = []
        shifted: list[PairedScores] = []

        def judge(after: PatchState, held_out: Indices) -> None:
            plain.append(self._judged(objective, baseline, after, held_out))
            if task.is_augmented:
                shifted.append(gather(task.model, task.test_seen, unshared, baseline, after, held_out))

        if len(task.parts) == 1:
            judge(self.whole.base.with_weights(chosen), task.held_out)
        else:
            self._in_turns(chosen, judge, plain)
        return PairedScores.joined(plain), PairedScores.joined(shifted) if shifted else None, len(plain)

    def _in_turns(
        self, chosen: PatchWeights, judge: Callable[[PatchState, Indices], None], judged: list[PairedScores]
    ) -> None:
        """Search without each part, and judge what was found on that part."""
        parts = self.task.parts
        for fold, (_, held_out) in enumerate(parts):
            try:
                after = self._without(fold, chosen)
                if after is None:
                    break
                judge(after, held_out)
            except KeyboardInterrupt:  # the parts that were judged so far say something, too
                if not judged:
                    raise
                self.interrupted = True
                break
        note = (
            f"few examples: {len(judged)} of {len(parts)} parts took turns in being held out (cross-fitting)"
        )
        if len(judged) < len(parts):
            note += ", then the search was interrupted" if self.interrupted else ", then time was over"
        self.notes.append(note)

    def _without(self, fold: int, chosen: PatchWeights) -> PatchState | None:
        """Return what a search without one part finds; None if time ran out before the search was done.

        Raises:
            KeyboardInterrupt: the user interrupted the search, so that its result is incomplete.
        """
        plan = self.task.plan
        plan = replace(plan, study=f"{plan.study or 'bnpatch'}.fold{fold}", reach=self.whole.num_tried)
        # One part must be judged, so the first search gets time enough to repeat the one on all examples.
        at_least = 2 * self._seconds_of_whole if fold == 0 else 0.0
        search = self._begin(self.task.parts[fold][0], plan, at_least)
        weights = chosen_of(self._find(search)).weights
        if search.interrupted:
            raise KeyboardInterrupt
        whole = self.whole
        ended_sooner = search.cut_short and not (whole.cut_short and search.passes >= whole.passes)
        if fold > 0 and (search.num_tried < whole.num_tried or ended_sooner):
            return None
        if self.task.plan.max_overhead is not None:
            weights = _limited_like(chosen, weights, self.task.model.baseline_alphas())
        return search.base.with_weights(weights)

    def _begin(self, tuning: Indices, plan: Plan, at_least: float = 0.0) -> CandidateSearch:
        """Make a search, with its share of the time left or with ``at_least`` seconds."""
        is_first = not self._begun
        if (share := self.share_of_time()) is not None:
            plan = replace(plan, timeout=max(at_least, share))
        task = replace(self.task, plan=plan)
        readable = task.seen.readable(tuning)
        if is_first:
            doubts = (
                task.examples.warn_of_near_copies(),
                warn_of_preprocessing(task.model, task.examples, readable),
            )
            self.notes += [says for says in doubts if says]
        search = CandidateSearch(
            task,
            readable,
            self._objective,
            keep=self.keep,
            progress=self._progress,
            on_trial=self._report if is_first else lambda trial, is_best: None,
        )
        if is_first:
            num_judging = sum(len(held_out) for _, held_out in task.parts)
            self._progress.expect(task.num_searches * search.expected() + 2 * num_judging)
            self._expected = search.expected()
        else:
            self._progress.expect(search.expected() - self._expected)  # of fewer examples than the first
        self._begun.append(search)
        return search

    def _find(self, search: CandidateSearch) -> list[Candidate]:
        """Find the candidates. If there are images that a patch must not harm, choose one that does not."""
        candidates = search.find()
        if search.interrupted and search is self.whole:  # the held-out evaluation still takes a while
            self.interrupted = True
            warnings.warn(
                "interrupted: what was found so far is judged now (interrupt again to end sooner)",
                BnpatchWarning,
                stacklevel=2,
            )
        if not self.task.is_augmented and self.keep is None:
            return candidates
        with self._progress.part(0):
            return self._harmless(search, candidates)

    def _harmless(self, search: CandidateSearch, candidates: list[Candidate]) -> list[Candidate]:
        """Choose a candidate that does no harm to the original images, nor to the images to keep."""
        unharmed = self._clean_score(search, candidates[0].weights)

        def is_harmless(weights: PatchWeights) -> bool:
            if self._clean_score(search, weights) < unharmed:
                return False
            if self.keep is None:
                return True
            kept_images = self.keep.on_choosing(search.base.with_weights(weights))
            return kept_images is not None and kept_images.is_within

        best = without_harm(candidates, search.selection.choose, is_harmless)
        if search is self.whole and best.name == candidates[0].name != chosen_of(candidates).name:
            self.refused = self._refused(search, chosen_of(candidates))
        is_new = best.name not in (candidate.name for candidate in candidates)
        marked = [replace(candidate, chosen=candidate.name == best.name) for candidate in candidates]
        return [*marked, *([best] if is_new else [])]

    def _refused(self, search: CandidateSearch, candidate: Candidate) -> tuple[PatchState, str]:
        state = search.base.with_weights(candidate.weights)
        kept_images = None if self.keep is None else self.keep.on_choosing(state)
        harm = "it does harm to the images at hand"
        if kept_images is not None and not kept_images.is_within:
            harm = str(kept_images)
        return (
            state,
            f"{candidate.name}: best in tuning, but {harm}; nothing weaker both gains and does no harm",
        )

    def _clean_score(self, search: CandidateSearch, weights: PatchWeights) -> float:
        """Return the mean score of the original images, higher is better; 0 if no others are scored."""
        if not self.task.is_augmented:
            return 0.0
        self.task.model.set_state(search.base.with_weights(weights))
        self._clean_examples += len(search.tuning)
        self._progress.count("images that are not augmented", len(search.tuning))
        metric = self.task.spec.metric
        scores = if_finite(lambda: self._unshared.scores(self.task.model, self.task.examples, search.tuning))
        return -math.inf if scores is None else metric.sign * float(np.mean(scores[metric.name]))

    def _judged(
        self, objective: Objective, baseline: PatchState, after: PatchState, held_out: Indices
    ) -> PairedScores:
        task = self.task
        with self._progress.part(2 * len(held_out)):
            paired = gather(task.model, task.test_examples, objective, baseline, after, held_out)
            self._progress.count("held-out evaluation", 2 * len(held_out))
        return paired

    def _report(self, trial: Trial, is_best: bool) -> None:
        is_baseline = trial.number == 0 and trial.candidate == "alpha"
        if is_baseline and self.task.spec.classes and ACCURACY.name in trial.scores:
            warn_at_chance(trial.scores[ACCURACY.name], self.task.examples)
        self._on_trial(trial, is_best)


def _limited_like(
    chosen: PatchWeights, weights: PatchWeights, baseline_alphas: Mapping[str, float]
) -> PatchWeights:
    """Set the norm layers that the latency limit left out of ``chosen`` to their baseline alpha."""
    left_out = {name: alpha for name, alpha in baseline_alphas.items() if chosen.alphas[name] == alpha}
    return replace(weights, alphas={**weights.alphas, **left_out})
