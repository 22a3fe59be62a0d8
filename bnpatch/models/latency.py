"""How long a model takes as it is and at other alphas, measured side by side.

Another program on the machine slows everything for a while, often by more than a patch costs. So all
settings take turns within one process, each round gives one ratio to the original, and the median over
the rounds is reported with an interval that needs no assumption about the noise.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel
from bnpatch.onnx.runtime import open_session

Seconds = npt.NDArray[np.float64]

#: Makes a setting ready, untimed, and returns what is timed.
Turn = Callable[[], Callable[[], object]]

Clock = Callable[[], float]

#: Fewer rounds can't give a 95% interval of a median: 2 * 0.5^5 is more than 5%.
MIN_ROUNDS = 6

#: A turn has at least so many runs and takes at least so long.
_TURN_RUNS, _TURN_SECONDS = 3, 0.01

#: What a norm layer costs per batch besides its reads, in elements that could be read in that time: see
#: site_costs.
_FIXED_COST = {"torch": 400_000, "onnx": 40_000}

#: An interval wider than this share of its ratio is called noisy.
_NOISY = 0.1


@dataclass(frozen=True)
class Latency:
    """Time of one batch, and its ratio to the time of the original in the same rounds.

    Attributes:
        seconds: median time of a batch.
        ratio: median over rounds of the time divided by the original's; 1 is the original.
        low: lower end of the 95% interval of the median ratio.
        high: upper end.
        batch_size: images in a batch.
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
        """From the times of a setting and of the original, each of shape (rounds,)."""
        ratios = seconds / original
        low, high = median_interval(ratios)
        median = float(np.median(ratios))
        return cls(float(np.median(seconds)), median, low, high, batch_size, len(ratios))

    @property
    def images_per_second(self) -> float:
        """At the median time."""
        return self.batch_size / self.seconds

    @property
    def is_noisy(self) -> bool:
        """Is the interval wider than a tenth of the ratio?"""
        return self.high - self.low > _NOISY * self.ratio


def measure(
    model: TorchModel | OnnxModel,
    settings: Sequence[Mapping[str, float]],
    *,
    batch_size: int = 1,
    seconds: float = 10.0,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
) -> list[Latency]:
    """Measure a model at several settings, in turns with the original.

    A torch model runs eagerly, on its device and in its memory layout; its original is itself at alpha = 0,
    which costs some 3 microseconds per norm layer more than the layers before any patch. Of an ONNX model
    each setting is what :func:`bnpatch.export_onnx` would write: alphas as constants, norm layers at alpha =
    0 as they were, so that the runtime fuses them. Inputs are random, of the size that the preprocessing
    makes.

    Args:
        model: left as it was.
        settings: alphas by name of norm layer; a norm layer that isn't named is at its identity. A setting
            with all norm layers there is the original itself.
        batch_size: images at a time.
        seconds: time to measure for, all settings together. At least seven rounds are run, however long
            they take.
        threads: of torch or onnxruntime on the CPU; None for their default.
        clock: in seconds. ``time.process_time`` does not run while other programs do. On a CPU with more
            to do than cores the time on the wall misleads: a run that is longer than the scheduler's time
            slice is interrupted, a shorter one is not. There, measure one thread by this clock.

    Returns:
        One latency per setting, in their order.

    Raises:
        BnpatchError: the model has no norm layer, or none of a name; or does not take such a batch.
    """
    as_it_is = model.identities()
    complete = [as_it_is | dict(setting) for setting in settings]
    different = [setting for setting in complete if setting != as_it_is]
    with model.borrowed(), _torch_threads(threads):
        model.set_alphas(as_it_is)
        if isinstance(model, OnnxModel):
            turns = _onnx_turns(model, [as_it_is, *different], batch_size, threads)
        else:
            turns = _torch_turns(model, [as_it_is, *different], batch_size)
        times = interleaved(turns, seconds, clock)
    original, *others = (Latency.of_rounds(column, times[:, 0], batch_size) for column in times.T)
    measured = iter(others)
    return [original if setting == as_it_is else next(measured) for setting in complete]


def interleaved(turns: Sequence[Turn], seconds: float, clock: Clock = time.perf_counter) -> Seconds:
    """Time several things in rounds, each taking its turn in each round, until the time is used up.

    A turn is several runs, of which the fastest counts: what else the machine does can only add to the
    time, and the first run still finds the caches full of another setting's data. Every second round goes
    backwards, so that a steady drift hits all alike. The first round is warm-up.

    Args:
        turns: what to time.
        seconds: for all rounds together.
        clock: in seconds.

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
    """A 95% interval of the median of what ``values``, of shape (n,), are drawn from.

    Its ends are two of the values: their ranks are those between which the number of values under the
    true median lies with 95% probability (binomial, by its normal approximation, which gives the
    exact ranks or wider ones). It assumes independent rounds, nothing else.
    """
    n = len(values)
    rank = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    ordered = np.sort(values)
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def _torch_turns(model: TorchModel, settings: Sequence[Mapping[str, float]], batch_size: int) -> list[Turn]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *model.preprocessing.input_size, generator=generator).to(model.device)

    def run() -> None:
        model.predict(x)
        if model.device.type != "cpu":  # kernels are only queued when predict returns
            torch.accelerator.synchronize(model.device)

    def turn(setting: Mapping[str, float]) -> Callable[[], object]:
        model.set_alphas(setting)
        return run

    return [partial(turn, setting) for setting in settings]


def _onnx_turns(
    model: OnnxModel, settings: Sequence[Mapping[str, float]], batch_size: int, threads: int | None
) -> list[Turn]:
    signature = model.signature
    if signature.batch not in (None, batch_size):
        raise BnpatchError(
            f"{model.name} takes {signature.batch} images at a time, not {batch_size}",
            f"set --batch-size {signature.batch}",
        )
    x = np.random.default_rng(0).normal(size=(batch_size, *model.preprocessing.input_size))
    if signature.dtype == np.uint8:
        x = np.clip(128 + 64 * x, 0, 255)
    if signature.channels_last:
        x = np.moveaxis(x, 1, -1)
    feeds = {signature.input: np.ascontiguousarray(x.astype(signature.dtype))}

    def open_run(setting: Mapping[str, float]) -> Callable[[], object]:
        model.set_alphas(setting)
        session = open_session(model.rewritten()[0], model.device, threads)
        run = partial(session.run, [signature.output], feeds)
        try:
            run()
        except Exception as error:  # onnxruntime's exceptions have no common class that is public
            raise BnpatchError(
                f"{model.name} does not take an input of shape {feeds[signature.input].shape}: "
                f"{first_line(error)}",
                "set --img-size or --batch-size",
            ) from error
        return run

    runs = [open_run(setting) for setting in settings]
    return [partial(lambda run: run, run) for run in runs]


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def norm_costs(model: TorchModel | OnnxModel, batch_size: int = 1) -> dict[str, float]:
    """What each site's patch costs, as shares of the cost of patching all norm layers.

    To measure each norm layer alone would take too long: its cost drowns in the noise. A site's cost is taken
    as
    proportional to what it reads, ``N * C * S`` elements, plus a fixed part for the operators on (N, C),
    which weighs ten times more in eager torch than in onnxruntime. Measured on subsets of the norm layers of
    test_resnet, MobileNetV2 and ResNet-50 (``tests/benchmarks/norm_costs.py``, batch 1, one thread), the
    shares explain 0.99, 0.98 and 0.70 of the variance of the overhead in onnxruntime. In torch it is 0.79,
    0.37 and 0.24: most of the cost is fixed there, and the scatter of the measurement as large as the
    overhead, so the shares are a rough guide. The fixed parts were chosen on these three models.

    Args:
        model: a norm layer of it whose shape is not known, or that is not reached, counts by its fixed part.
        batch_size: N.

    Returns:
        Shares by name of norm layer; their sum is 1.

    Raises:
        BnpatchError: the model does not take an image of its preprocessing's size.
    """
    elements = _norm_elements(model)
    fixed = _FIXED_COST["onnx" if isinstance(model, OnnxModel) else "torch"]
    costs = {name: fixed + batch_size * elements.get(name, 0) for name in model.alphas()}
    total = sum(costs.values())
    return {name: cost / total for name, cost in costs.items()}


def _norm_elements(model: TorchModel | OnnxModel) -> dict[str, int]:
    """Elements of one image's activation at each norm layer, C times its spatial size."""
    shapes = model.norm_shapes()
    if isinstance(model, OnnxModel) and len(shapes) < len(model.alphas()):
        # The graph leaves the image size open: infer the shapes again for the size that images will have.
        graph = model.graph.clone()
        channels, height, width = model.preprocessing.input_size
        size = (height, width, channels) if model.signature.channels_last else (channels, height, width)
        (images,) = (value for value in graph.graph.inputs if value.name == model.signature.input)
        images.shape = ir.Shape([model.signature.batch, *size])
        shapes = replace(model, graph=graph).norm_shapes()
    channels_of = {norm_layer.name: norm_layer.num_channels for norm_layer in model.inventory().norm_layers}
    return {name: channels_of[name] * math.prod(shape) for name, shape in shapes.items()}
