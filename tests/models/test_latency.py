"""Measuring in turns, by a clock that the test winds."""

import itertools
import math

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.models.latency import MIN_ROUNDS, Latency, interleaved, measure, median_interval, norm_costs


class Machine:
    """A clock, and runs that take their time by it; ``load`` slows whatever runs."""

    def __init__(self):
        self.now = 0.0
        self.log = []
        self.load = lambda now: 1.0

    def clock(self):
        return self.now

    def turn(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds * self.load(self.now)

        return lambda: run


def test_everything_takes_its_turn_forth_and_back():
    machine = Machine()
    turns = [machine.turn(name, 1.0) for name in "abc"]
    times = interleaved(turns, 0.0, machine.clock)
    assert times.shape == (MIN_ROUNDS, 3)
    runs = "".join(machine.log)
    order = "".join(name for name, before in zip(runs, " " + runs, strict=False) if name != before)
    # Between rounds the last runs again, which the comparison above swallows.
    assert order == "cbabcbabcbabcba"
    assert runs.count("a") == runs.count("b") == runs.count("c")


def test_the_time_is_used_and_not_much_more():
    machine = Machine()
    interleaved([machine.turn("a", 0.1), machine.turn("b", 0.2)], 60.0, machine.clock)
    assert 60 <= machine.now < 62


def test_short_runs_are_repeated_and_the_first_round_is_not_counted():
    machine = Machine()
    cold = [5.0]

    def run():
        machine.now += cold.pop() if cold else 1e-4
        machine.log.append("a")

    times = interleaved([lambda: run], 0.0, machine.clock)
    assert times.max() == pytest.approx(1e-4)
    assert len(machine.log) > 50 * MIN_ROUNDS


@pytest.mark.parametrize("burst", [0.02, 0.1, 1.0])
def test_a_loaded_machine_does_not_move_the_ratio(burst):
    """Other programs slow it threefold for half of the time, in bursts about as long as a run or a round."""
    machine = Machine()
    switches = np.random.default_rng(0).exponential(burst, size=10_000).cumsum()
    machine.load = lambda now: 3.0 if np.searchsorted(switches, now) % 2 else 1.0
    times = interleaved([machine.turn("a", 0.02), machine.turn("b", 0.03)], 60.0, machine.clock)
    latency = Latency.of_rounds(times[:, 1], times[:, 0], batch_size=4)
    assert latency.ratio == pytest.approx(1.5, rel=0.05)
    assert latency.low <= 1.5 <= latency.high


def test_noise_is_told():
    original = np.ones(20)
    assert not Latency.of_rounds(1.2 * original, original, 1).is_noisy
    restless = np.tile([0.8, 1.6], 10)
    latency = Latency.of_rounds(restless, original, 8)
    assert latency.is_noisy
    assert latency.images_per_second == pytest.approx(8 / 1.2)


@pytest.mark.parametrize("n", [6, 7, 9, 20, 101, 1000])
def test_the_interval_of_the_median_covers_it(n):
    """The ranks, against the binomial distribution of how many values lie under the median."""
    low, high = median_interval(np.random.default_rng(n).permutation(n).astype(float))
    below = [math.comb(n, k) / 2**n for k in range(n + 1)]
    coverage = sum(below[int(low) + 1 : int(high) + 1])
    assert 0.945 <= coverage <= 0.985


@pytest.fixture(params=["torch", "onnx"])
def model(request, checkpoint, exported):
    return bnpatch.load({"torch": checkpoint, "onnx": exported}[request.param])


def test_a_model_is_measured_and_left_as_it_was(model):
    model.set_alphas(0.03)
    if isinstance(model, bnpatch.TorchModel):
        model.module.train()
    names = list(model.alphas())
    threads = torch.get_num_threads()
    settings = [{}, dict.fromkeys(names, 0.1), {names[0]: 0.1}, dict.fromkeys(names, 0.0)]
    clock = itertools.count().__next__  # by which every run takes as long as any other
    latencies = measure(model, settings, batch_size=3, seconds=0.0, threads=1, clock=clock)
    original, full, one, again = latencies
    assert (original.ratio, original.low, original.high) == (1.0, 1.0, 1.0)
    assert again is original
    assert full is not one
    assert all(x.seconds > 0 and x.low <= x.ratio <= x.high and x.rounds >= MIN_ROUNDS for x in latencies)
    assert {x.batch_size for x in latencies} == {3}
    assert set(model.alphas().values()) == {0.03}
    assert torch.get_num_threads() == threads
    if isinstance(model, bnpatch.TorchModel):
        assert all(module.training for module in model.module.modules())


def test_what_runs_is_what_the_setting_says(model, monkeypatch):
    """Of each setting: the norm layers that weigh examples while it is timed."""
    from bnpatch.models import latency

    names = list(model.alphas())
    wanted = [{}, {names[1]: 0.2}, dict.fromkeys(names, 0.1)]
    outputs = []

    def once(turns, seconds, clock):
        outputs.extend(seen(turn()) for turn in turns)
        return np.ones((MIN_ROUNDS, len(turns)))

    def seen(run):
        if isinstance(model, bnpatch.OnnxModel):
            return torch.from_numpy(run()[0])
        kept = []
        handle = model.module.register_forward_hook(lambda module, args, y: kept.append(y.clone()))
        run()
        handle.remove()
        return kept[0]

    monkeypatch.setattr(latency, "interleaved", once)
    measure(model, wanted, batch_size=2)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for weights, got in zip(wanted, outputs, strict=True):
        with model.borrowed():
            model.set_alphas({**dict.fromkeys(names, 0.0), **weights})
            expected = model.predict(x)
            # Rounding of float32: baked alphas are arranged otherwise than those that are inputs.
            atol = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_mistakes(model):
    with pytest.raises(bnpatch.BnpatchError, match="no norm layer 'nope'"):
        measure(model, [{"nope": 0.1}])
    with pytest.raises(bnpatch.BnpatchError, match="alpha = 2"):
        measure(model, [dict.fromkeys(model.alphas(), 2.0)])
    model.preprocessing = model.preprocessing.override(channels=3)
    with pytest.raises(bnpatch.BnpatchError, match="does not take an input of shape"):
        measure(model, [{}])


def test_a_fixed_batch_size_is_honoured(exported):
    model = bnpatch.load(exported)
    model.signature = type(model.signature)(**{**vars(model.signature), "batch": 4})
    with pytest.raises(bnpatch.BnpatchError, match="takes 4 images at a time, not 1; set --batch-size 4"):
        measure(model, [{}])


def test_costs_follow_the_size_of_what_a_site_reads(model):
    costs = norm_costs(model)
    assert costs.keys() == model.alphas().keys()
    assert sum(costs.values()) == pytest.approx(1)
    assert all(cost > 0 for cost in costs.values())
    names = list(costs)
    assert costs[names[0]] > costs[names[-1]]
    # The more images, the less the part of a site's cost that comes once per batch.
    assert norm_costs(model, batch_size=64)[names[-1]] < costs[names[-1]]


def test_costs_of_a_graph_that_leaves_the_image_size_open(exported):
    model = bnpatch.load(exported)
    known = norm_costs(model)
    for size in model.graph.graph.inputs[0].shape[2:]:
        assert isinstance(size, int)
    model.graph.graph.inputs[0].shape = type(model.graph.graph.inputs[0].shape)(["batch", 1, "h", "w"])
    for value in (v for node in model.graph.graph for v in node.outputs):
        value.shape = None
    opened = bnpatch.OnnxModel(model.graph, model.signature, name="open", preprocessing=model.preprocessing)
    assert opened.norm_shapes() == model.norm_shapes()  # for the size that the preprocessing makes
    assert norm_costs(opened) == known
