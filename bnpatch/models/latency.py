"""Measure how long a model takes as it is and at other alphas, and estimate the cost of each norm layer.

Other programs on the machine often slow a measurement by more than a patch costs. All settings therefore take
turns within one process. Each round gives one ratio of each setting to the original, and the result is the
median over the rounds, with an interval that assumes no distribution of the noise.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bnpatch.models.base import Model

Seconds = npt.NDArray[np.float64]

#: Prepares a setting, which is not timed, and returns the function to time.
Turn = Callable[[], Callable[[], object]]

Clock = Callable[[], float]

#: With fewer rounds there is no 95% interval of a median, because 2 * 0.5^5 is more than 5%.
MIN_ROUNDS = 6

#: The least number of runs of a turn, and the least time that it takes.
_TURN_RUNS, _TURN_SECONDS = 3, 0.01

#: A measurement is noisy if its interval is wider than this share of its ratio.
_NOISY = 0.1


@dataclass(frozen=True)
class Latency:
    """Time of one batch, and its ratio to the time of the original in the same rounds.

    Attributes:
        seconds: median time of a batch.
        ratio: median over rounds of the time divided by that of the original.
        low: lower end of the 95% interval of the median ratio.
        high: upper end of the interval.
        batch_size: number of images in a batch.
        rounds: number of rounds.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    batch_size: int
    rounds: int

    @classmethod
    def of_rounds(cls, seconds: Seconds, original: Seconds, batch_size: int) -> "Latency":
        """Summarize the times of a setting and of the original, each of shape (rounds,)."""
        ratios = seconds / original
        low, high = median_interval(ratios)
        median = float(np.median(ratios))
        return cls(float(np.median(seconds)), median, low, high, batch_size, len(ratios))

    @property
    def images_per_second(self) -> float:
        """Number of images per second at the median time."""
        return self.batch_size / self.seconds

    @property
    def is_noisy(self) -> bool:
        """Whether the interval is wider than a tenth of the ratio."""
        return self.high - self.low > _NOISY * self.ratio


def measure(
    model: Model[Any],
    settings: Sequence[Mapping[str, float]],
    *,
    batch_size: int = 1,
    seconds: float = 10.0,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
) -> list[Latency]:
    """Measure the latency of a model at several settings, in turns with the original.

    A torch model runs eagerly, on its device and in its memory layout. Its original is the patched module
    with the alphas of the baseline, which costs about 3 microseconds per norm layer more than the unpatched
    module. For an ONNX model, each setting is the graph that :func:`bnpatch.export_onnx` would write: alphas
    are constants, and norm layers whose alpha is that of the baseline are unchanged, so that the runtime
    fuses them. Inputs are random, of the size of the preprocessing.

    Args:
        model: the model; it is left as it was.
        settings: alphas by name of norm layer; a norm layer that isn't named has that of the baseline. A
            setting with all alphas of the baseline is the original.
        batch_size: number of images in a batch.
        seconds: time to measure for all settings together. At least seven rounds are run, however long they
            take.
        threads: number of CPU threads of torch or onnxruntime; None for their default.
        clock: a clock in seconds. On a CPU with more running programs than cores, use one thread and
            ``time.process_time``, which does not count the time of other programs. Wall time misleads there:
            the scheduler interrupts a run that is longer than its time slice, but not a shorter one.

    Returns:
        One latency per setting, in their order.

    Raises:
        BnpatchError: the model has no norm layer, or none of a name, or does not take such a batch.
    """
    baseline = model.baseline_alphas()
    complete = [baseline | dict(weights) for weights in settings]
    different = [weights for weights in complete if weights != baseline]
    with model.borrowed(), _torch_threads(threads):
        turns = [_turn(model, alphas, batch_size, threads) for alphas in [baseline, *different]]
        times = interleaved(turns, seconds, clock)
    original, *others = (Latency.of_rounds(column, times[:, 0], batch_size) for column in times.T)
    measured = iter(others)
    return [original if weights == baseline else next(measured) for weights in complete]


def interleaved(turns: Sequence[Turn], seconds: float, clock: Clock = time.perf_counter) -> Seconds:
    """Time several functions in rounds, one turn of each per round, until the time is used up.

    A turn has several runs and counts the fastest, because other programs can only add to the time, and the
    caches still hold another setting's data in the first run. Every second round goes in reverse order, so
    that a steady drift affects all alike. The first round is a warm-up and does not count.

    Args:
        turns: what to time.
        seconds: time for all rounds together.
        clock: a clock in seconds.

    Returns:
        Time of the fastest run of each turn, of shape (rounds, turns).
    """
    rounds: list[Seconds] = []
    started = clock()
    while len(rounds) <= MIN_ROUNDS or clock() - started < seconds:
        row = np.empty(len(turns))
        order = range(len(turns))
        for index in order if len(rounds) % 2 else reversed(order):
            row[index] = _time_turn(turns[index], clock)
        rounds.append(row)
    return np.array(rounds[1:])


def _time_turn(turn: Turn, clock: Clock) -> float:
    run = turn()
    times: list[float] = []
    while len(times) < _TURN_RUNS or sum(times) < _TURN_SECONDS:
        started = clock()
        run()
        times.append(clock() - started)
    return min(times)


def median_interval(values: Seconds) -> tuple[float, float]:
    """Return a 95% interval of the median of the distribution of ``values``, of shape (n,).

    The ends are two of the values. The number of values below the true median is binomial, and lies between
    the ranks of the ends with a probability of 95%. The ranks come from the normal approximation, which gives
    the exact ranks or wider ones. The interval assumes that rounds are independent, and nothing else.
    """
    n = len(values)
    rank = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    ordered = np.sort(values)
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def _turn(model: Model[Any], alphas: Mapping[str, float], batch_size: int, threads: int | None) -> Turn:
    """Return a turn of a model at other alphas."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *model.preprocessing.input_size, generator=noise)
    model.set_alphas(alphas)
    run = model.ready_to_run(x, threads)

    def turn() -> Callable[[], object]:
        model.set_alphas(alphas)
        return run

    return turn


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def norm_costs(model: Model[Any], batch_size: int = 1) -> dict[str, float]:
    """Estimate the cost of patching each norm layer, as a share of the cost of patching all of them.

    The costs are not measured, because that of a single norm layer is smaller than the noise. The estimate is
    the number of elements that the layer reads, ``N * C * S``, plus a fixed part for the operators on (N, C),
    which is ten times larger in eager torch than in onnxruntime. On subsets of the norm layers of
    test_resnet, MobileNetV2 and ResNet-50 (``tests/benchmarks/norm_costs.py``, batch 1, one thread), the
    shares explain 0.99, 0.98 and 0.70 of the variance of the overhead in onnxruntime. In torch they explain
    0.79, 0.37 and 0.24, and are only a rough guide: most of the cost is fixed there, and the noise of the
    measurement is as large as the overhead. The fixed parts were chosen on these three models.

    Args:
        model: the model. For a norm layer whose shape is not known, or that is not reached, only the fixed
            part counts.
        batch_size: N, the number of images in a batch.

    Returns:
        Shares by name of norm layer; their sum is 1.

    Raises:
        BnpatchError: the model does not take an image of its preprocessing's size.
    """
    elements = _norm_elements(model)
    costs = {name: model.norm_cost + batch_size * elements.get(name, 0) for name in model.alphas()}
    total = sum(costs.values())
    return {name: cost / total for name, cost in costs.items()}


def _norm_elements(model: Model[Any]) -> dict[str, int]:
    """Return the elements of one image's activation at each norm layer: C times the spatial size."""
    shapes = model.norm_shapes()
    channels_of = {norm_layer.name: norm_layer.num_channels for norm_layer in model.inventory().norm_layers}
    return {name: channels_of[name] * math.prod(shape) for name, shape in shapes.items()}
