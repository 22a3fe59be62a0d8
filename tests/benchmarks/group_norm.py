"""Group Norm between its two ends on Fashion-MNIST, in torch and in ONNX; a table of docs/results.md.

The network is trained as in tests/benchmarks/fashion_mnist.py, its Group Norm gets running statistics from
training images, and alpha goes down from 1, where the network is what it was (the paper's Fig. 2):
``python -m tests.benchmarks.group_norm [--data DIR] [--train 20000] [--epochs 4]``.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from tests.benchmarks.fashion_mnist import SHIFTS, SIDE, read, train

ALPHAS = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.0)
VALUES = {"img_size": SIDE, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--calibrate", type=int, default=2000)
    args = parser.parse_args()
    images, labels = read(args.data, "train")
    test_images, test_labels = (a[:3000] for a in read(args.data, "t10k"))
    module = train("timm test_efficientnet_gn", images[: args.train], labels[: args.train], args.epochs)
    in_torch = bnpatch.load(module, preprocessing=VALUES)
    names = bnpatch.calibrate(in_torch, images[: args.calibrate])
    with tempfile.TemporaryDirectory() as folder:
        done = bnpatch.export_onnx(in_torch, Path(folder) / "model.onnx")  # at alpha = 1: as it was
        in_onnx = bnpatch.load(Path(folder) / "model.onnx")
    in_onnx.apply(in_torch.recipe())
    data = {
        shift: bnpatch.open_examples(
            (apply(test_images.astype(float)).round().astype(np.uint8), test_labels), in_torch
        )
        for shift, apply in SHIFTS.items()
    }
    print(f"<!-- {len(names)} Group Norm layers; the export deviates by {done.max_deviation:.1e} -->")
    print("| alpha | " + " | ".join(f"{shift}: accuracy | cross-entropy" for shift in SHIFTS) + " |")
    print("| --- " * (1 + 2 * len(SHIFTS)) + "|")
    apart = 0.0
    for alpha in ALPHAS:
        cells = []
        for examples in data.values():
            means = []
            for model in (in_torch, in_onnx):
                model.set_alphas(alpha)
                scores = bnpatch.evaluate(model, examples, (ACCURACY, CROSS_ENTROPY))
                means.append([scores.mean(metric) for metric in (ACCURACY, CROSS_ENTROPY)])
            apart = max(apart, abs(means[0][1] - means[1][1]))
            cells += [f"{means[0][0]:.1%}", f"{means[0][1]:.4f}"]
        print(f"| {alpha:g} | " + " | ".join(cells) + " |", flush=True)
    print(f"<!-- largest difference of a cross-entropy between torch and ONNX: {apart:.1e} -->")


if __name__ == "__main__":
    main()
