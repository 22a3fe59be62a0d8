"""Selection of the candidate that is kept, by examples that its weights were not learned from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import CROSS_ENTROPY, Z95, Metric, Values, paired_difference
from bnpatch.search.config import GLOBAL_CANDIDATES, Candidate
from bnpatch.search.objective import FEW_SETS, Objective
from bnpatch.search.score_cache import ScoreCache

# Number of examples, roughly, by which steps of learning are compared.
_CHECKED = 300


class Selection:
    """Chooses between candidates on the selection examples, which are some blocks of the tuning examples.

    No weights were learned from these by gradient, though they decide when learning stops. The identity is
    kept unless a candidate with a better mean is significantly better. For a rate the cross-entropy may show
    that instead, because a rate says little on few examples. One weight for all norm layers hardly overfits,
    so it is tested on all tuning examples. If a candidate passes, the best mean is chosen. Rates within a
    standard error of the best are equal; then the first candidate whose cross-entropy is within a standard
    error of the best.
    Selection biases the score of the chosen candidate a little; the verdict comes from other examples.
    """

    def __init__(self, cache: ScoreCache, objective: Objective, blocks: range) -> None:
        """Select by some blocks.

        Args:
            cache: scores weights on all tuning examples, block by block.
            objective: has the tuned metric.
            blocks: numbers of the blocks to select by.
        """
        self._cache, self._objective, self._blocks = cache, objective, blocks
        ends = np.cumsum([len(cache.blocks[block]) for block in blocks])
        self._checked = blocks[: int(np.searchsorted(ends, _CHECKED)) + 1]

    @property
    def num_checked(self) -> int:
        """The number of examples that :meth:`cost` scores."""
        return sum(len(self._cache.blocks[block]) for block in self._checked)

    @property
    def guide(self) -> Metric:
        """The metric that compares small steps: the cross-entropy for classes, whatever metric is tuned.

        A rate is discrete: on a few hundred examples it can't tell whether a small step was an improvement.
        """
        metric = self._objective.metric
        return CROSS_ENTROPY if metric.of_classes else metric

    def scores(self, weights: PatchWeights) -> Values:
        """Scores of the selection examples, or of sets of them, by the tuned metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
        """
        return self._on(self._blocks, weights, self._objective.metric)

    @property
    def groups(self) -> Indices | None:
        """The group of each of :meth:`scores`; None where they are independent."""
        return self._cache.groups(self._blocks)

    def cost(self, weights: PatchWeights, label: str) -> float:
        """The mean that steps of learning are compared by: lower is better; inf if outputs are not finite.

        It is that of a few hundred selection examples, because learning asks often.
        """
        scores = if_finite(partial(self._on, self._checked, weights, self.guide, label))
        return math.inf if scores is None else -self.guide.sign * float(np.mean(scores))

    def gains(self, identity: PatchWeights, weights: PatchWeights) -> bool:
        """Are weights significantly better than the identity, by the metric or its guide?"""
        return self._gains(self._blocks, identity, weights)

    def choose(self, found: Mapping[str, PatchWeights]) -> list[Candidate]:
        """Score all candidates, and mark one as chosen.

        Args:
            found: weights by name of candidate, in the order in which they were found, the identity first.
                Candidates whose outputs are not finite are left out.

        Raises:
            OutputsNotFiniteError: the outputs of the identity are not finite.
        """
        identity, sign = found["identity"], self._objective.metric.sign
        before = self.scores(identity)
        candidates, better, supported = [], [], False
        for name, weights in found.items():
            after = if_finite(partial(self.scores, weights))
            if after is None:
                continue
            change = paired_difference(before, after, self.groups)
            candidates.append(candidate := Candidate(name, weights, float(np.mean(after)), change))
            if sign * change.value > 0:
                better.append(candidate)
                # One weight for all norm layers hardly overfits, so all blocks test it.
                blocks = range(len(self._cache.blocks)) if name in GLOBAL_CANDIDATES else self._blocks
                supported = supported or self._gains(blocks, identity, weights)
        best = self._best_of(better) if supported else candidates[0]
        return [replace(candidate, chosen=candidate is best) for candidate in candidates]

    def _best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the best mean; where it is a rate, the cross-entropy decides between equals.

        Rates within a standard error of their paired difference are equal. By the cross-entropy, the first
        candidate within a standard error of the best is taken, because later ones have more freedom and cost
        latency (the one-standard-error rule of Breiman et al., "Classification and Regression Trees").
        """
        metric, guide = self._objective.metric, self.guide
        if guide is metric:
            return max(candidates, key=lambda candidate: metric.sign * candidate.mean)
        return self._equals(self._equals(candidates, metric), guide)[0]

    def _equals(self, candidates: Sequence[Candidate], metric: Metric) -> Sequence[Candidate]:
        """The candidates within a standard error of the best mean, in their order."""
        scores = [self._on(self._blocks, candidate.weights, metric) for candidate in candidates]
        best = max(scores, key=lambda values: metric.sign * float(np.mean(values)))
        behind = [paired_difference(values, best, self.groups) for values in scores]
        return [
            candidate
            for candidate, change in zip(candidates, behind, strict=True)
            if metric.sign * change.value <= change.reach / Z95
        ]

    def _gains(self, blocks: range, identity: PatchWeights, weights: PatchWeights) -> bool:
        metrics = {metric.name: metric for metric in (self._objective.metric, self.guide)}
        return any(self._is_better(blocks, identity, weights, metric) for metric in metrics.values())

    def _is_better(
        self, blocks: range, identity: PatchWeights, weights: PatchWeights, metric: Metric
    ) -> bool:
        before, after = (if_finite(partial(self._on, blocks, s, metric)) for s in (identity, weights))
        if before is None or after is None:
            return False
        change = paired_difference(before, after, self._cache.groups(blocks))
        # With few sets there is no useful interval, so the mean decides.
        settled = change.excludes_zero or (self._objective.set_size > 1 and len(after) < FEW_SETS)
        return settled and metric.sign * change.value > 0

    def _on(self, blocks: range, weights: PatchWeights, metric: Metric, label: str = "choosing") -> Values:
        return self._cache.on(blocks, weights, label, metric.name)
