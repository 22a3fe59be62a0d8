"""The whole search on shifted images: one alpha, the list of candidates with labels, the list without.

Small networks on Fashion-MNIST, as checkpoints and as ONNX files; see :mod:`tests.benchmarks.results`.
"""

import tempfile
from pathlib import Path

import bnpatch
from tests.benchmarks.fashion_mnist import KINDS, NETWORKS, load

SEARCHES = {
    "one alpha": {"granularity": "global", "recalibrate": False},
    "alpha per layer": {"recalibrate": False},
    "candidates": {},
    "candidates, no labels": {"metric": "unlabeled"},
}
TWO = ("candidates", "candidates, no labels")
FURTHER = (("resnet10t", 0), *((name, 1) for name in NETWORKS))


def parts():
    for network in NETWORKS:
        for shift in reversed(KINDS):
            for search in reversed(SEARCHES):
                yield {"network": network, "shift": shift, "search": search}


def measure(setup, network, shift, search, seed=0):
    """What one search finds; shares are of the held-out images."""
    tuning, held_out = setup.parts(*setup.images(shift))
    model = load(setup.network(network, seed))
    return [judged(bnpatch.tune_alpha(model, tuning, test_data=held_out, **SEARCHES[search]))]


def parts_further():
    """Further networks, and the same ones trained from another seed."""
    for network, seed in FURTHER:
        for search in TWO:
            yield {"network": network, "seed": seed, "shift": "mixed", "search": search}


def parts_onnx():
    for shift in ("mixed", "noise 0.25"):
        yield {"network": NETWORKS[0], "shift": shift}


def measure_onnx(setup, network, shift):
    """What the search finds for the network's ONNX file."""
    tuning, held_out = setup.parts(*setup.images(shift))
    with tempfile.TemporaryDirectory() as folder:
        bnpatch.export_onnx(load(setup.network(network)), path := Path(folder) / "model.onnx")
        return [judged(bnpatch.tune_alpha(load(path), tuning, test_data=held_out))]


def judged(result):
    """A verdict as numbers."""
    accuracy, entropy = (
        next(c for c in result.comparisons if c.metric.name == name) for name in ("accuracy", "cross-entropy")
    )
    change = accuracy.change
    return {
        "before": accuracy.before.value,
        "after": accuracy.after.value,
        "change": [change.value, change.low, change.high],
        "cross_entropy": [entropy.before.value, entropy.after.value],
        "chosen": result.chosen.name,
        "recommended": result.is_recommended,
        "passes": result.passes,
    }
