"""Weaken a patch that was tuned on augmented examples until it does no harm to the original ones.

Weights that help augmented images may cost some accuracy on the original images. Halfway between the identity
and such weights, most of the gain remains and hardly any of the cost. So all candidates, and some points
between the identity and each, are considered.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Metric, Values, paired_difference
from bnpatch.search.config import Candidate

#: Points to consider, as fractions of the way from the identity to a candidate.
PARTS = (1.0, 0.75, 0.5, 0.25)


def without_harm(
    candidates: Sequence[Candidate],
    metric: Metric,
    shifted: Callable[[PatchWeights], Values],
    gains: Callable[[PatchWeights, PatchWeights], bool],
    clean: Callable[[PatchWeights], Values],
    groups: Indices | None = None,
) -> Candidate | None:
    """Choose the best weights between the identity and any candidate that do not harm clean examples.

    Args:
        candidates: candidates that were found on augmented examples, the identity first.
        metric: metric of the scores.
        shifted: scores of weights on augmented selection examples, always the same ones.
        gains: whether the second of two weights is significantly better on these examples.
        clean: scores of weights on clean examples, always the same ones.
        groups: the group of each augmented selection example; None if all are independent.

    Returns:
        The weights with the best mean on augmented examples, of those that are significantly better there
        than the identity and no worse than it on clean examples; None where there are none.
    """
    identity = candidates[0].weights
    before = shifted(identity)
    found = []
    for candidate in candidates[1:]:
        for part in PARTS:
            weights = toward(identity, candidate.weights, part)
            after = if_finite(partial(shifted, weights))
            if after is None:
                continue
            change = paired_difference(before, after, groups)
            if metric.sign * change.value > 0 and gains(identity, weights):
                name = candidate.name if part == 1 else f"{candidate.name} x {part:g}"
                found.append(Candidate(name, weights, float(np.mean(after)), change, True))
    unharmed = metric.sign * float(np.mean(clean(identity)))
    for candidate in sorted(found, key=lambda candidate: -metric.sign * candidate.mean):
        scores = if_finite(partial(clean, candidate.weights))
        if scores is not None and metric.sign * float(np.mean(scores)) >= unharmed:
            return candidate
    return None


def toward(start: PatchWeights, end: PatchWeights, part: float) -> PatchWeights:
    """Interpolate between two weights: ``part`` is 0 for ``start`` and 1 for ``end``."""

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a.get(name, 0.0) + part * (weight - a.get(name, 0.0)) for name, weight in b.items()}

    return PatchWeights(
        between(start.alphas, end.alphas), between(start.lambdas, end.lambdas), slopes=end.slopes
    )
