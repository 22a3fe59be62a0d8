"""Patches that cost little: which sites are worth their time, measured."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bnpatch.bench import measure, site_costs
from bnpatch.metrics import Metric, Values, paired_difference
from bnpatch.model import TorchModel
from bnpatch.onnx_model import OnnxModel
from bnpatch.search.trade_off import Point, nested_sites
from bnpatch.setting import Setting

#: z of a 95% interval, to get a standard error from it.
_Z95 = 1.96


def trade_off(
    model: TorchModel | OnnxModel,
    setting: Setting,
    scores: Callable[[Setting], Values],
    metric: Metric,
    *,
    seconds: float = 10.0,
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
    identities, sign = model.identities(), 1 if metric.higher_is_better else -1
    identity = Setting(identities, dict.fromkeys(identities, 0.0))
    weighed = [name for name, alpha in setting.alphas.items() if alpha != identities[name]]
    whole, costs = scores(setting), site_costs(model)

    def without(name: str) -> Setting:
        return replace(setting, alphas={**setting.alphas, name: identities[name]})

    lost = {name: sign * float(np.mean(whole) - np.mean(scores(without(name)))) for name in weighed}
    family = [
        replace(setting, alphas={n: a if n in sites else identities[n] for n, a in setting.alphas.items()})
        for sites in nested_sites({name: lost[name] / costs[name] for name in weighed})
    ]
    family = [member for member in family if member != identity]
    latencies = measure(model, [{}, *(member.alphas for member in family)], seconds=seconds)
    before = scores(identity)
    points = []
    for member, latency in zip([identity, *family], latencies, strict=True):
        change = paired_difference(before, scores(member))
        count = sum(alpha != identities[name] for name, alpha in member.alphas.items())
        error = (change.high - change.low) / (2 * _Z95) if member != identity else 0.0
        points.append(Point(member, count, sign * change.value, error, latency))
    return points
