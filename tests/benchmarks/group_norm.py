"""Group Norm between its two ends.

The network is that of :mod:`tests.benchmarks.fashion_mnist`, its Group Norm gets running statistics from
training images, and alpha goes down from 1, where the network is what it was (the paper's Fig. 2).
"""

import bnpatch
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from tests.benchmarks.fashion_mnist import load, read

NETWORK, KINDS = "test_efficientnet_gn", ("none", "contrast x 0.4", "brightness x 0.35")
ALPHAS = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.0)


def parts():
    for shift in KINDS:
        yield {"network": NETWORK, "shift": shift}


def measure(setup, network, shift):
    """Accuracy and cross-entropy by alpha."""
    model, rows = load(setup.network(network)), []
    bnpatch.calibrate(model, read(setup.data, "train")[0][: setup.tuning])
    _, held_out = setup.parts(*setup.images(shift))
    examples = bnpatch.open_examples(held_out, model)
    for alpha in ALPHAS:
        model.set_alphas(alpha)
        scores = bnpatch.evaluate(model, examples, (ACCURACY, CROSS_ENTROPY))
        means = {"accuracy": scores.mean(ACCURACY), "cross_entropy": scores.mean(CROSS_ENTROPY)}
        rows.append({"alpha": alpha, **means})
    return rows
