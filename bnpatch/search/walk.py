"""Weights per site without gradients: for models that can only be run, as ONNX files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnpatch.metrics import Values, paired_difference
from bnpatch.setting import Setting

#: What a weight is set to when it is tried: from hardly anything to everything, denser where it matters.
TRIED = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Knob:
    """Something that can be turned: one weight of the sites of a group.

    Attributes:
        kind: "alpha" or "lambda".
        sites: names of the sites that have it in common.
    """

    kind: str
    sites: tuple[str, ...]

    def turned(self, setting: Setting, value: float) -> Setting:
        """The setting with this weight changed."""
        values = dict.fromkeys(self.sites, value)
        if self.kind == "alpha":
            return Setting({**setting.alphas, **values}, setting.lambdas)
        return Setting(setting.alphas, {**setting.lambdas, **values})

    def value(self, setting: Setting) -> float:
        """What it is now."""
        values: Mapping[str, float] = setting.alphas if self.kind == "alpha" else setting.lambdas
        return values.get(self.sites[0], 0.0)


def walk(
    scores: Callable[[Setting], Values],
    start: Setting,
    knobs: Sequence[Knob],
    *,
    higher_is_better: bool,
    most: int = 16,
    rounds: int = 2,
    stop: Callable[[], bool] = lambda: False,
) -> Setting:
    """Find weights by turning one at a time: those that matter most alone come first.

    Each knob is turned alone, once up and, where it isn't at the end, once down; the ``most`` knobs whose
    better turn scores best, better than the start at all, are then walked through in this order, each
    tried at the values of :data:`TRIED`, and left where the score is best so far. A second round sees
    whether they still want to be there.

    Args:
        scores: of a setting, one per example or set, always of the same ones.
        start: where to begin.
        knobs: what may be turned.
        higher_is_better: which way is better.
        most: how many knobs to walk through.
        rounds: how often.
        stop: asked before each evaluation whether to end.

    Returns:
        The best setting found. A step that can't be told from chance isn't taken.
    """
    sign = 1.0 if higher_is_better else -1.0

    def gain(setting: Setting, over: Values) -> tuple[float, float, Values]:
        found = sign * scores(setting)
        change = paired_difference(over, found)
        return change.value, (change.value - change.low) / 2 if len(found) > 1 else 0.0, found

    here, values = start, sign * scores(start)
    ranked: list[tuple[float, Knob]] = []
    for knob in knobs:
        best = -np.inf
        now = knob.value(start)
        for turned in {min(1.0, 0.1 + 2 * now), now / 3} - {now}:
            if stop():
                return here
            best = max(best, gain(knob.turned(start, turned), values)[0])
        ranked.append((best, knob))
    ranked.sort(key=lambda pair: -pair[0])
    chosen = [knob for best, knob in ranked[:most] if best > 0]
    for _ in range(rounds):
        before = here
        for knob in chosen:
            base, base_values = here, values
            best_gain = 0.0
            for value in TRIED:
                if value == knob.value(base):
                    continue
                if stop():
                    return here
                candidate = knob.turned(base, value)
                found_gain, error, found = gain(candidate, base_values)
                if found_gain > max(best_gain, error):
                    here, values, best_gain = candidate, found, found_gain
        if here == before:
            break
    return here
