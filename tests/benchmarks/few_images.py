"""The list of candidates on few images: what is found from 50, and what from 200, in several draws."""

import numpy as np

import bnpatch
from tests.benchmarks.candidates import judged
from tests.benchmarks.fashion_mnist import NETWORKS, load

NUMBERS, DRAWS, KINDS = (50, 200), 3, ("mixed", "contrast x 0.4")


def parts():
    for number in reversed(NUMBERS):
        for network in NETWORKS:
            for shift in KINDS:
                for draw in range(DRAWS):
                    yield {"network": network, "shift": shift, "images": number, "draw": draw}


def measure(setup, network, shift, images, draw):
    """What a search finds on images drawn at random."""
    tuning, held_out = setup.parts(*setup.images(shift))
    drawn = np.random.default_rng(draw).permutation(len(tuning[1]))[:images]
    few = tuple(part[drawn] for part in tuning)
    result = bnpatch.tune_alpha(load(setup.network(network)), few, test_data=held_out)
    return [judged(result)]
