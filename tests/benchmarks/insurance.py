"""What ``--augment`` insures against, and what it costs: tuned on clean images, judged on shifted ones.

``python -m tests.benchmarks.insurance [--checkpoints DIR]``: Fashion-MNIST, test_resnet, 2,000 clean images
to tune on, 4,000 others clean and shifted to judge by; prints the table of docs/results.md.
"""

import argparse
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.evaluation import evaluate
from bnpatch.metrics import ACCURACY
from tests.benchmarks import fashion_mnist
from tests.benchmarks.ladder import HELD_OUT, TUNING, VALUES, shifted, trained

KINDS = ("none", "contrast x 0.4", "brightness x 0.35", "noise 0.25", "mixed")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    images, labels = fashion_mnist.read(args.data, "t10k")
    model = bnpatch.load(trained("test_resnet", args.data, args.checkpoints), preprocessing=VALUES)
    part = slice(TUNING, TUNING + HELD_OUT)
    held_out = {
        kind: bnpatch.open_examples(
            (shifted(kind, images[part], np.random.default_rng(1)), labels[part]), model
        )
        for kind in KINDS
    }

    def row(name):
        scores = (f"{100 * evaluate(model, held_out[kind]).mean(ACCURACY):.1f}" for kind in KINDS)
        print(f"| {name} | " + " | ".join(scores) + " |", flush=True)

    print("| tuned on | " + " | ".join(KINDS) + " |")
    print("| --- |" + " --- |" * len(KINDS))
    row("nothing: as it is")
    clean = images[:TUNING], labels[:TUNING]
    for metric in ("accuracy", "cross-entropy"):
        for augment in ("contrast,brightness", "contrast,brightness,noise,blur"):
            result = bnpatch.tune_alpha(model, clean, metric=metric, augment=augment)
            model.apply(result.recipe)
            row(f"{augment} for {metric}: {result.chosen.name}")
            model.module = bnpatch.unpatch(model.module)


if __name__ == "__main__":
    main()
