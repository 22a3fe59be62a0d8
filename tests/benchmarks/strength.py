"""Accuracy against how strong a shift is: as it is, with one alpha, and with what the whole search finds."""

import bnpatch
from tests.benchmarks.candidates import SEARCHES, judged
from tests.benchmarks.fashion_mnist import NETWORKS, load

STRENGTHS = {
    "contrast x": (1, 0.8, 0.6, 0.4, 0.2),
    "brightness x": (0.7, 0.5, 0.35, 0.2),
    "noise": (0.05, 0.1, 0.25, 0.4),
}


def parts():
    for shift, strengths in STRENGTHS.items():
        for strength in reversed(strengths):
            for search in ("one alpha", "candidates"):
                yield {"network": NETWORKS[1], "shift": shift, "strength": strength, "search": search}


def measure(setup, network, shift, strength, search):
    """What a search finds at one strength."""
    tuning, held_out = setup.parts(*setup.images(f"{shift} {strength}"))
    model = load(setup.network(network))
    return [judged(bnpatch.tune_alpha(model, tuning, test_data=held_out, **SEARCHES[search]))]
