"""How much robustness costs nothing: a patch tuned on shifted views of the data, thinned until it is
harmless.

What helps shifted images may cost some accuracy on those at hand. Halfway between the identity and such a
patch most of the help is left and next to none of the cost, so that all candidates and some points on the way
to each are candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Metric, Values, paired_difference
from bnpatch.search.config import Candidate

#: How far from the identity toward a candidate.
PARTS = (1.0, 0.75, 0.5, 0.25)


def without_harm(
    candidates: Sequence[Candidate],
    metric: Metric,
    shifted: Callable[[PatchWeights], Values],
    gains: Callable[[PatchWeights, PatchWeights], bool],
    clean: Callable[[PatchWeights], Values],
) -> Candidate | None:
    """The best that is found on the way to any candidate without harm to clean examples.

    Args:
        candidates: of a list of candidates climbed on shifted views, the identity first.
        metric: that the scores are of.
        shifted: scores of a setting on shifted views of selection examples, always the same.
        gains: whether the second of two settings is better beyond doubt on these views.
        clean: scores on clean examples, always the same.

    Returns:
        The setting that does best on shifted views, of those that are better than the identity there beyond
        doubt, and no worse on clean examples; None where there is none.
    """
    identity = candidates[0].setting
    before = shifted(identity)
    found = []
    for candidate in candidates[1:]:
        for part in PARTS:
            setting = toward(identity, candidate.setting, part)
            after = if_finite(partial(shifted, setting))
            if after is None:
                continue
            change = paired_difference(before, after)
            if metric.sign * change.value > 0 and gains(identity, setting):
                name = candidate.name if part == 1 else f"{candidate.name} x {part:g}"
                found.append(Candidate(name, setting, float(np.mean(after)), change, True))
    unharmed = metric.sign * float(np.mean(clean(identity)))
    for candidate in sorted(found, key=lambda candidate: -metric.sign * candidate.mean):
        scores = if_finite(partial(clean, candidate.setting))
        if scores is not None and metric.sign * float(np.mean(scores)) >= unharmed:
            return candidate
    return None


def toward(start: PatchWeights, end: PatchWeights, part: float) -> PatchWeights:
    """A setting between two, part of the way."""

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a.get(name, 0.0) + part * (weight - a.get(name, 0.0)) for name, weight in b.items()}

    return PatchWeights(between(start.alphas, end.alphas), between(start.lambdas, end.lambdas))
