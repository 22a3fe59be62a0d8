"""The list of candidates on few images: what is found from 50, and what from 200.

``python -m tests.benchmarks.few_images [--checkpoints DIR] [--draws 4]``: Fashion-MNIST, two networks;
images drawn at random to tune on, judged by 4,000 others; prints the table of docs/results.md.
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from tests.benchmarks import fashion_mnist
from tests.benchmarks.candidates import HELD_OUT, TUNING, VALUES, shifted, trained


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "test_efficientnet"])
    args = parser.parse_args()
    warnings.simplefilter("ignore", BnpatchWarning)
    images, labels = (part[: TUNING + HELD_OUT] for part in fashion_mnist.read(args.data, "t10k"))
    print("| model | shift | images | as it is | patched: mean | worst | best | chosen |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        path = trained(name, args.data, args.checkpoints)
        for kind in ("none", "contrast x 0.4", "noise 0.25", "mixed"):
            x = shifted(kind, images, np.random.default_rng(0))
            for number in (50, 200):
                found, chosen = [], Counter()
                for draw in range(args.draws):
                    drawn = np.random.default_rng(draw).permutation(TUNING)[:number]
                    result = bnpatch.tune_alpha(
                        bnpatch.load(path, preprocessing=VALUES),
                        (x[drawn], labels[drawn]),
                        test_data=(x[TUNING:], labels[TUNING:]),
                    )
                    found.append(100 * result.comparisons[0].after.value)
                    chosen[result.chosen.name] += 1
                before = 100 * result.comparisons[0].before.value
                values = (before, np.mean(found), min(found), max(found))
                names = "; ".join(f"{candidate} {count}" for candidate, count in chosen.most_common())
                cells = [name, kind, str(number), *(f"{value:.1f}" for value in values), names]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
