"""How much insurance costs nothing: a patch tuned on shifted views of the data, thinned until it is harmless.

What helps shifted images may cost some accuracy on those at hand. Halfway between the identity and such a
patch most of the help is left and next to none of the cost, so that all rungs and some points on the way
to each are candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from bnpatch.core.patch import Setting
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Metric, Values, paired_difference
from bnpatch.search.config import Rung

#: How far from the identity toward a rung.
PARTS = (1.0, 0.75, 0.5, 0.25)


def harmless(
    rungs: Sequence[Rung],
    metric: Metric,
    shifted: Callable[[Setting], Values],
    gains: Callable[[Setting, Setting], bool],
    clean: Callable[[Setting], Values],
) -> Rung | None:
    """The best that is found on the way to any rung without harm to clean examples.

    Args:
        rungs: of a ladder climbed on shifted views, the identity first.
        metric: that the scores are of.
        shifted: scores of a setting on shifted views of selection examples, always the same.
        gains: whether the second of two settings is better beyond doubt on these views.
        clean: scores on clean examples, always the same.

    Returns:
        The setting that does best on shifted views, of those that are better than the identity there beyond
        doubt, and no worse on clean examples; None where there is none.
    """
    identity = rungs[0].setting
    before = shifted(identity)
    found = []
    for rung in rungs[1:]:
        for part in PARTS:
            setting = toward(identity, rung.setting, part)
            after = if_finite(partial(shifted, setting))
            if after is None:
                continue
            change = paired_difference(before, after)
            if metric.sign * change.value > 0 and gains(identity, setting):
                name = rung.name if part == 1 else f"{rung.name} x {part:g}"
                found.append(Rung(name, setting, float(np.mean(after)), change, True))
    unharmed = metric.sign * float(np.mean(clean(identity)))
    for rung in sorted(found, key=lambda rung: -metric.sign * rung.mean):
        scores = if_finite(partial(clean, rung.setting))
        if scores is not None and metric.sign * float(np.mean(scores)) >= unharmed:
            return rung
    return None


def toward(start: Setting, end: Setting, part: float) -> Setting:
    """A setting between two, part of the way."""

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a.get(name, 0.0) + part * (weight - a.get(name, 0.0)) for name, weight in b.items()}

    return Setting(between(start.alphas, end.alphas), between(start.lambdas, end.lambdas))
