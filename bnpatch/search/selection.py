"""Selection of the candidate that is kept, by examples that its weights were not learned from.

Weights that help shifted images may cost some accuracy on images without the shift. Halfway between the
baseline and such weights, most of the gain remains and hardly any of the cost. So where a candidate does
harm, :func:`without_harm` lets some points between the baseline and it take its place.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import CROSS_ENTROPY, Z95, Metric, Values, paired_difference
from bnpatch.search.config import GLOBAL_CANDIDATES, Candidate, chosen_of
from bnpatch.search.objective import FEW_SETS
from bnpatch.search.score_cache import ScoreCache
from bnpatch.search.temperature import guide_of

# Number of examples, roughly, by which steps of learning are compared.
_CHECKED = 300

#: Points that take the place of a candidate that does harm, as fractions of the way from the baseline to it.
PARTS = (0.75, 0.5, 0.25, 0.1)


class Selection:
    """Chooses between candidates on the selection examples, which are some blocks of the tuning examples.

    Weights are not learned from the selection examples, but these decide when learning stops.

    The baseline is kept unless a candidate has a better mean and is significantly better. If the metric is a
    rate, it is enough to be significantly better by the guide, a cross-entropy, because a rate says little on
    few examples. One weight for all norm layers hardly overfits, so it is tested on all tuning examples.

    If a candidate passes this test, the one with the best mean is chosen. Rates within a standard error of
    the best count as equal. Of these, the first candidate is chosen that is within a standard error of the
    best by the guide.

    Selection biases the score of the chosen candidate a little; the verdict comes from other examples.
    """

    def __init__(self, cache: ScoreCache, blocks: range) -> None:
        """Select by some blocks.

        Args:
            cache: scores weights on all tuning examples, block by block.
            blocks: numbers of the blocks to select by.
        """
        self._cache, self._objective, self._blocks = cache, cache.objective, blocks
        ends = np.cumsum([len(cache.blocks[block]) for block in blocks])
        self._checked = blocks[: int(np.searchsorted(ends, _CHECKED)) + 1]

    @property
    def num_checked(self) -> int:
        """The number of examples that :meth:`cost` scores."""
        return sum(len(self._cache.blocks[block]) for block in self._checked)

    @property
    def step_metric(self) -> Metric:
        """The metric that compares starts and steps of learning: for classes the loss, the cross-entropy.

        A rate is discrete: on a few hundred examples it can't tell whether a small step was an improvement.
        """
        metric = self._objective.metric
        return CROSS_ENTROPY if metric.of_classes else metric

    @property
    def guide(self) -> Metric:
        """The metric that decides where rates don't, see :func:`bnpatch.search.temperature.guide_of`."""
        return guide_of(self._objective.metric)

    def scores(self, weights: PatchWeights) -> Values:
        """Return scores of the selection examples, or of sets of them, by the tuned metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
        """
        return self._on(self._blocks, weights, self._objective.metric)

    @property
    def groups(self) -> Indices | None:
        """The group of each of :meth:`scores`; None where they are independent."""
        return self._cache.groups(self._blocks)

    def cost(self, weights: PatchWeights, label: str) -> float:
        """Return the cost by which steps of learning are compared; lower is better, inf if not finite.

        It is a mean over a few hundred selection examples only, because learning needs it often.
        """
        scores = if_finite(partial(self._on, self._checked, weights, self.step_metric, label))
        return math.inf if scores is None else -self.step_metric.sign * float(np.mean(scores))

    def at_once_worse(self, weights: PatchWeights, than: PatchWeights) -> bool:
        """Whether the first block of examples is enough to show that weights are worse than others."""
        return self._is_better(self._checked[:1], weights, than, self.step_metric)

    def choose(self, found: Mapping[str, PatchWeights]) -> list[Candidate]:
        """Score all candidates, and mark one as chosen.

        Args:
            found: weights by name of candidate, in the order in which they were found, the baseline first.
                Candidates whose outputs are not finite are left out.

        Raises:
            OutputsNotFiniteError: the outputs of the baseline are not finite.
        """
        baseline, sign = found["baseline"], self._objective.metric.sign
        before = self.scores(baseline)
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
                supported = supported or self._gains(blocks, baseline, weights)
        best = self._best_of(better) if supported else candidates[0]
        return [replace(candidate, chosen=candidate is best) for candidate in candidates]

    def _best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the candidate with the best mean; where it is a rate, the guide decides between equals.

        Rates within a standard error of their paired difference are equal. By the guide, the first candidate
        within a standard error of the best is taken, because later ones have more freedom and cost latency
        (the one-standard-error rule of Breiman et al., "Classification and Regression Trees").
        """
        metric, guide = self._objective.metric, self.guide
        if guide is metric:
            return max(candidates, key=lambda candidate: metric.sign * candidate.mean)
        return self._equals(self._equals(candidates, metric), guide)[0]

    def _equals(self, candidates: Sequence[Candidate], metric: Metric) -> Sequence[Candidate]:
        """Return the candidates within a standard error of the best mean, in their order."""
        scores = [self._on(self._blocks, candidate.weights, metric) for candidate in candidates]
        best = max(scores, key=lambda values: metric.sign * float(np.mean(values)))
        behind = [paired_difference(values, best, self.groups) for values in scores]
        return [
            candidate
            for candidate, change in zip(candidates, behind, strict=True)
            if metric.sign * change.value <= change.reach / Z95
        ]

    def _gains(self, blocks: range, baseline: PatchWeights, weights: PatchWeights) -> bool:
        metrics = {metric.name: metric for metric in (self._objective.metric, self.guide)}
        return any(self._is_better(blocks, baseline, weights, metric) for metric in metrics.values())

    def _is_better(
        self, blocks: range, baseline: PatchWeights, weights: PatchWeights, metric: Metric
    ) -> bool:
        before, after = (if_finite(partial(self._on, blocks, s, metric)) for s in (baseline, weights))
        if before is None or after is None:
            return False
        change = paired_difference(before, after, self._cache.groups(blocks))
        # With few sets there is no useful interval, so the mean decides.
        settled = change.excludes_zero or (self._objective.set_size > 1 and len(after) < FEW_SETS)
        return settled and metric.sign * change.value > 0

    def _on(self, blocks: range, weights: PatchWeights, metric: Metric, label: str = "choosing") -> Values:
        return self._cache.on(blocks, weights, label, metric.name)


def without_harm(
    candidates: Sequence[Candidate],
    choose: Callable[[Mapping[str, PatchWeights]], Sequence[Candidate]],
    is_harmless: Callable[[PatchWeights], bool],
) -> Candidate:
    """Choose the best candidate, or the best point between the baseline and one, that does no harm.

    Args:
        candidates: what a search found, the baseline first; one of them is chosen.
        choose: chooses between weights by name, the baseline first.
        is_harmless: whether weights do no harm.

    Returns:
        The first choice that does no harm; the baseline where there is none.
    """
    weights = {candidate.name: candidate.weights for candidate in candidates}
    baseline, found = candidates[0], set(weights)
    best = chosen_of(candidates)
    while best.name != baseline.name and not is_harmless(best.weights):
        del weights[best.name]
        if best.name in found:
            weights |= {
                f"{best.name} x {part:g}": toward(baseline.weights, best.weights, part) for part in PARTS
            }
        best = chosen_of(choose(weights))
    return best


def toward(start: PatchWeights, end: PatchWeights, part: float) -> PatchWeights:
    """Interpolate between two weights: ``part`` is 0 for ``start`` and 1 for ``end``."""

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a.get(name, 0.0) + part * (weight - a.get(name, 0.0)) for name, weight in b.items()}

    return replace(end, alphas=between(start.alphas, end.alphas), lambdas=between(start.lambdas, end.lambdas))
