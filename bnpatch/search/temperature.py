"""The guide of a search: the cross-entropy, for a rate of right answers that at the best temperature.

A rate does not change where all logits are divided by a temperature, but the cross-entropy does. So where a
network is far too sure of wrong answers, weights that make it doubt lower the cross-entropy without better
answers. At the temperature that suits each best, cross-entropies compare what the logits tell of the classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bnpatch.evaluation.metrics import CROSS_ENTROPY, Metric, Values, no_scores

#: Logits are multiplied by these, the inverses of temperatures. The mean cross-entropy is convex in them and
#: flat about its minimum, so the best of these is near enough to it.
INVERSES = tuple(2 ** (n / 2) for n in range(-8, 5))


@dataclass(frozen=True)
class _Scaled(Metric):
    """The cross-entropy of scaled logits."""

    @property
    def reads_classes(self) -> bool:
        """Return true: it takes logits (N, K)."""
        return True


def _scaled(inverse: float) -> Metric:
    def score(logits: Tensor, targets: Tensor) -> Tensor:
        return CROSS_ENTROPY.score(inverse * logits, targets)

    return _Scaled(f"cross-entropy x {inverse:.4g}", score, higher_is_better=False, is_positive=True)


#: The cross-entropy of logits times each of :data:`INVERSES`.
SCALED = tuple(_scaled(inverse) for inverse in INVERSES)
_NAMES = [metric.name for metric in SCALED]

#: The cross-entropy at the best temperature: only a set of examples has one.
TEMPERED = Metric(
    "cross-entropy at the best temperature", no_scores, higher_is_better=False, is_positive=True
)


def values_of(metric: str, scores: Mapping[str, Values]) -> Values:
    """Return one score per example by the metric of this name, which may be that of :data:`TEMPERED`.

    Args:
        metric: name of the metric.
        scores: scores (N,) of the same examples by name of metric.
    """
    if metric != TEMPERED.name:
        return scores[metric]
    return min((scores[name] for name in _NAMES), key=lambda values: float(np.mean(values)))


def without_scaled(scores: Mapping[str, Values]) -> dict[str, Values]:
    """Return the scores that people read."""
    return {name: values for name, values in scores.items() if name not in _NAMES}


def guide_of(metric: Metric) -> Metric:
    """Return the metric that decides among candidates: for classes a cross-entropy, whatever metric is tuned.

    A rate is discrete: on a few hundred examples it says little. It does not depend on the temperature, and
    its guide doesn't either.
    """
    if not metric.of_classes:
        return metric
    return TEMPERED if metric.is_rate else CROSS_ENTROPY
