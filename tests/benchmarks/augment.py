"""What ``--augment`` insures against, and what it costs: tuned on clean images, judged on shifted ones."""

import bnpatch
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY
from tests.benchmarks.fashion_mnist import KINDS, NETWORKS, load

SHIFTS = "contrast,brightness,noise,blur"


def parts():
    for network in NETWORKS:
        for metric in ("accuracy", "cross-entropy"):
            yield {"network": network, "metric": metric}


def measure(setup, network, metric):
    """Accuracy on each kind of held-out images, as it is and patched."""
    model = load(setup.network(network))
    clean, _ = setup.parts(*setup.images())
    result = bnpatch.tune_alpha(model, clean, metric=metric, augment=SHIFTS)
    rows = []
    for kind in KINDS:
        _, held_out = setup.parts(*setup.images(kind, seed=1))
        examples = bnpatch.open_examples(held_out, model)
        before = evaluate(model, examples).mean(ACCURACY)
        with model.borrowed():
            model.apply(result.recipe)
            after = evaluate(model, examples).mean(ACCURACY)
        rows.append({"shift": kind, "before": before, "after": after, "chosen": result.chosen.name})
    return rows
