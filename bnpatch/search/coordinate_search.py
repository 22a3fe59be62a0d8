"""Weights per norm layer without gradients: for models that can only be run, as ONNX files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import Z95, Values, paired_difference

#: What a weight is set to when it is tried: from hardly anything to everything, denser where it matters.
TRIED = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Coordinate:
    """Something that can be turned: one weight of the norm layers of a group.

    Attributes:
        kind: "alpha" or "lambda".
        norm_layers: names of the norm layers that have it in common.
    """

    kind: str
    norm_layers: tuple[str, ...]

    def turned(self, setting: PatchWeights, value: float) -> PatchWeights:
        """The setting with this weight changed."""
        values = dict.fromkeys(self.norm_layers, value)
        if self.kind == "alpha":
            return PatchWeights({**setting.alphas, **values}, setting.lambdas)
        return PatchWeights(setting.alphas, {**setting.lambdas, **values})

    def value(self, setting: PatchWeights) -> float:
        """What it is now."""
        values: Mapping[str, float] = setting.alphas if self.kind == "alpha" else setting.lambdas
        return values.get(self.norm_layers[0], 0.0)


@dataclass(frozen=True)
class _Gain:
    """What a setting gains over another: the mean, its standard error, and the scores that it is from."""

    mean: float
    error: float
    values: Values

    @classmethod
    def over(cls, base: Values, values: Values | None, sign: float) -> "_Gain":
        """Of scores of the same examples; no finite outputs are the worst."""
        if values is None:
            return cls(-math.inf, 0.0, base)
        change = paired_difference(sign * base, sign * values)
        return cls(change.value, change.reach / Z95 if len(values) > 1 else 0.0, values)


def coordinate_search(
    scores: Callable[[PatchWeights], Values | None],
    start: PatchWeights,
    coordinates: Sequence[Coordinate],
    *,
    higher_is_better: bool,
    glance: Callable[[PatchWeights], Values | None] | None = None,
    most: int = 16,
    rounds: int = 2,
    stop: Callable[[], bool] = lambda: False,
) -> PatchWeights:
    """Find weights by turning one at a time: those that matter most alone come first.

    Each coordinate is turned alone, once up and, where it isn't at the end, once down; the ``most``
    coordinates whose better turn scores best, better than the start at all, are then walked through in this
    order. Each is tried at the values of :data:`TRIED`, and left where the score is best so far; a second
    round sees whether it still wants to be there. A glance at some of the examples tells which turn is the
    most promising, and only that one is looked at on all of them.

    Args:
        scores: of a setting, one per example or set, always of the same ones; None where the model has no
            finite outputs with it.
        start: where to begin.
        coordinates: what may be turned.
        higher_is_better: which way is better.
        glance: as ``scores``, of some of the examples; by default of all.
        most: how many coordinates to walk through.
        rounds: how often.
        stop: asked before each evaluation whether to end.

    Returns:
        The best setting found. A step that gains no more than its standard error isn't taken.
    """
    sign = 1.0 if higher_is_better else -1.0
    glance = glance or scores
    base, seen = scores(start), glance(start)
    if base is None or seen is None:
        return start
    ranked: list[tuple[float, Coordinate]] = []
    for coordinate in coordinates:
        now, best = coordinate.value(start), -math.inf
        for value in {min(1.0, 0.1 + 2 * now), now / 3} - {now}:
            if stop():
                return start
            best = max(best, _Gain.over(seen, glance(coordinate.turned(start, value)), sign).mean)
        ranked.append((best, coordinate))
    ranked.sort(key=lambda pair: -pair[0])
    chosen = [coordinate for best, coordinate in ranked[:most] if best > 0]
    here = start
    for _ in range(rounds):
        before = here
        for coordinate in chosen:
            turns = [coordinate.turned(here, value) for value in TRIED if value != coordinate.value(here)]
            glances = []
            for turned in turns:
                if stop():
                    return here
                glances.append(_Gain.over(seen, glance(turned), sign))
            promising, turned = max(zip(glances, turns, strict=True), key=lambda pair: pair[0].mean)
            if promising.mean <= 0:
                continue
            if stop():
                return here
            gain = _Gain.over(base, scores(turned), sign)
            if gain.mean > gain.error:
                here, base, seen = turned, gain.values, promising.values
        if here == before:
            break
    return here
