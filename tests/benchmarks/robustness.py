"""What ``--augment`` insures against, and what it costs: tuned on clean images, judged on shifted ones.

``python -m tests.benchmarks.robustness [--checkpoints DIR]``: Fashion-MNIST, two networks, 2,000 clean images
to tune on, 4,000 others clean and shifted to judge by; prints the table of docs/results.md.
"""

import argparse
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY
from tests.benchmarks import fashion_mnist
from tests.benchmarks.candidates import HELD_OUT, TUNING, VALUES, shifted, trained

KINDS = ("none", "contrast x 0.4", "brightness x 0.35", "noise 0.25", "mixed")


KINDS_OF_SHIFTS = "contrast,brightness,noise,blur"


def rows(architecture, args):
    """What each patch of one model does to each kind of held-out images."""
    images, labels = fashion_mnist.read(args.data, "t10k")
    model = bnpatch.load(trained(architecture, args.data, args.checkpoints), preprocessing=VALUES)
    part = slice(TUNING, TUNING + HELD_OUT)
    held_out = {
        kind: bnpatch.open_examples(
            (shifted(kind, images[part], np.random.default_rng(1)), labels[part]), model
        )
        for kind in KINDS
    }

    def row(name):
        scores = (f"{100 * evaluate(model, held_out[kind]).mean(ACCURACY):.1f}" for kind in KINDS)
        print(f"| {architecture} | {name} | " + " | ".join(scores) + " |", flush=True)

    row("as it is")
    clean = images[:TUNING], labels[:TUNING]
    for metric in ("accuracy", "cross-entropy"):
        result = bnpatch.tune_alpha(model, clean, metric=metric, augment=KINDS_OF_SHIFTS)
        with model.borrowed():
            model.apply(result.recipe)
            row(f"{metric}: {result.chosen.name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    print("| model | tuned for | " + " | ".join(KINDS) + " |")
    print("| --- | --- |" + " --- |" * len(KINDS))
    for architecture in ("test_efficientnet", "test_resnet"):
        rows(architecture, args)


if __name__ == "__main__":
    main()
