"""Patches that cost little: which sites are worth their time, measured."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from bnpatch.bench import measure, site_costs
from bnpatch.evaluation import if_finite
from bnpatch.metrics import Z95, Metric, Values, paired_difference
from bnpatch.model import TorchModel
from bnpatch.onnx_model import OnnxModel
from bnpatch.search.trade_off import Point, nested_sites
from bnpatch.setting import Setting


def trade_off(
    model: TorchModel | OnnxModel,
    setting: Setting,
    scores: Callable[[Setting], Values],
    metric: Metric,
    *,
    seconds: float,
) -> list[Point]:
    """Measure gain and latency of ever more of the sites of a setting, the important ones first.

    A site is important if the score suffers where it alone goes back to its identity, for the time that it is
    expected to take. Lambdas cost nothing and stay as they are in all but the first point.

    Args:
        model: left with any weights.
        setting: what to thin out.
        scores: of a setting, one per example, always of the same ones.
        metric: that these are of.
        seconds: to measure latencies for, one image at a time.

    Returns:
        The points, that of the original first.
    """
    identities, sign = model.identities(), metric.sign
    identity = Setting(identities, dict.fromkeys(identities, 0.0))
    weighed = [name for name, alpha in setting.alphas.items() if alpha != identities[name]]
    whole, costs = scores(setting), site_costs(model)

    def without(name: str) -> Setting:
        return replace(setting, alphas={**setting.alphas, name: identities[name]})

    def lost(name: str) -> float:
        rest = if_finite(lambda: scores(without(name)))
        return math.inf if rest is None else sign * float(np.mean(whole) - np.mean(rest))

    family = [
        replace(setting, alphas={n: a if n in sites else identities[n] for n, a in setting.alphas.items()})
        for sites in nested_sites({name: lost(name) / costs[name] for name in weighed})
    ]
    scored = [(member, if_finite(partial(scores, member))) for member in family if member != identity]
    usable = [(member, after) for member, after in scored if after is not None]
    latencies = measure(model, [{}, *(member.alphas for member, _ in usable)], seconds=seconds)
    before = scores(identity)
    points = [Point(identity, 0, 0.0, 0.0, latencies[0])]
    for (member, after), latency in zip(usable, latencies[1:], strict=True):
        change = paired_difference(before, after)
        count = sum(alpha != identities[name] for name, alpha in member.alphas.items())
        points.append(Point(member, count, sign * change.value, change.reach / Z95, latency))
    return points
