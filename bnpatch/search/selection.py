"""Which of the settings that a list of candidates finds is kept: what examples support that it did not learn
from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import CROSS_ENTROPY, Z95, Metric, Values, paired_difference
from bnpatch.search.config import GLOBAL_RUNGS, Candidate
from bnpatch.search.objective import FEW_SETS, Judge
from bnpatch.search.score_cache import ScoreCache


class Selection:
    """Chooses between settings on selection examples: some blocks of those that there are to tune on.

    Nothing was learned from them by gradient, though learning was stopped by them. Does any setting with a
    better mean beat the identity beyond doubt? The cross-entropy may say so in place of a rate, which few
    examples tell little about. One weight for all norm layers can hardly fit itself to the examples that it
    was raced on, so that its doubt is settled by all tuning examples. If so, the best mean wins; of rates
    that a single answer tells apart, the lowest candidate whose cross-entropy is within a standard error of
    the best. Being chosen flatters a setting a little; the verdict is of other examples.
    """

    def __init__(self, board: ScoreCache, judge: Judge, blocks: range) -> None:
        """Choose by some blocks.

        Args:
            board: scores settings on all tuning examples, block by block.
            judge: whose metric is tuned.
            blocks: numbers of those that select.
        """
        self._board, self._judge, self._blocks = board, judge, blocks

    @property
    def guide(self) -> Metric:
        """What single steps go by: of classes the cross-entropy, whatever is counted of them in the end.

        A rate changes by leaps; a few hundred examples can't tell by it whether a small step was a good one.
        """
        metric = self._judge.metric
        return CROSS_ENTROPY if metric.of_classes else metric

    def scores(self, setting: PatchWeights) -> Values:
        """Scores of the selection examples, or of sets of them, by the tuned metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for one.
        """
        return self._on(self._blocks, setting, self._judge.metric)

    def cost(self, setting: PatchWeights, label: str) -> float:
        """What a step of learning is judged by; less is better, infinity where outputs are not finite."""
        scores = if_finite(partial(self._on, self._blocks, setting, self.guide, label))
        return math.inf if scores is None else -self.guide.sign * float(np.mean(scores))

    def gains(self, identity: PatchWeights, setting: PatchWeights) -> bool:
        """Is a setting better beyond doubt than the identity, by the metric or its guide?"""
        return self._gains(self._blocks, identity, setting)

    def choose(self, found: Mapping[str, PatchWeights]) -> list[Candidate]:
        """All settings with their scores, and one of them chosen.

        Args:
            found: the identity and what else there is, from the lowest candidate to the highest, by name.
                Settings whose outputs are not finite are left out.

        Raises:
            OutputsNotFiniteError: by the identity.
        """
        identity, sign = found["identity"], self._judge.metric.sign
        before = self.scores(identity)
        candidates, better, supported = [], [], False
        for name, setting in found.items():
            after = if_finite(partial(self.scores, setting))
            if after is None:
                continue
            change = paired_difference(before, after)
            candidates.append(candidate := Candidate(name, setting, float(np.mean(after)), change))
            if sign * change.value > 0:
                better.append(candidate)
                # One weight for all hardly fits itself to the examples: all may say so.
                blocks = range(len(self._board.blocks)) if name in GLOBAL_RUNGS else self._blocks
                supported = supported or self._gains(blocks, identity, setting)
        best = self._best_of(better, len(before)) if supported else candidates[0]
        return [replace(candidate, chosen=candidate is best) for candidate in candidates]

    def _best_of(self, candidates: Sequence[Candidate], num_examples: int) -> Candidate:
        """The best mean; of rates that a single answer tells apart, by the cross-entropy.

        By that the lowest candidate within a standard error of the best, as weights that cost latency should
        be worth it (the rule of one standard error of Breiman et al., "Classification and Regression Trees").
        """
        metric, guide = self._judge.metric, self.guide
        lead = max(metric.sign * candidate.mean for candidate in candidates)
        answer = 0.0 if guide is metric else 1 / num_examples
        equals = [
            candidate
            for candidate in candidates
            if metric.sign * candidate.mean >= lead - answer * (1 + 1e-9)
        ]
        scores = [self._on(self._blocks, candidate.setting, guide) for candidate in equals]
        best = max(scores, key=lambda values: guide.sign * float(np.mean(values)))
        behind = (paired_difference(values, best) for values in scores)
        return next(
            candidate
            for candidate, change in zip(equals, behind, strict=True)
            if guide.sign * change.value <= change.reach / Z95
        )

    def _gains(self, blocks: range, identity: PatchWeights, setting: PatchWeights) -> bool:
        metrics = {metric.name: metric for metric in (self._judge.metric, self.guide)}
        return any(self._is_better(blocks, identity, setting, metric) for metric in metrics.values())

    def _is_better(
        self, blocks: range, identity: PatchWeights, setting: PatchWeights, metric: Metric
    ) -> bool:
        before, after = (if_finite(partial(self._on, blocks, s, metric)) for s in (identity, setting))
        if before is None or after is None:
            return False
        change = paired_difference(before, after)
        # A few sets leave nothing but their mean to go by.
        settled = change.excludes_zero or (self._judge.set_size > 1 and len(after) < FEW_SETS)
        return settled and metric.sign * change.value > 0

    def _on(self, blocks: range, setting: PatchWeights, metric: Metric, label: str = "choosing") -> Values:
        return self._board.on(blocks, setting, label, metric.name)
