"""The whole search on shifted Fashion-MNIST: one alpha, the list of candidates with labels, the list of
candidates without.

``python -m tests.benchmarks.candidates [--data DIR] [--models NAME ...] [--shifts NAME ...]`` trains what it
needs and prints the table of docs/results.md. Tuned on 2,000 images, judged on 4,000 others. With
``--onnx`` it is the models' ONNX files that are tuned, which have no gradients.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import timm
import torch

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from tests.benchmarks import fashion_mnist

TUNING, HELD_OUT = 2000, 4000
VALUES = {"img_size": 32, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}
SEARCHES = {
    "one alpha": {"granularity": "global", "recalibrate": False},
    "alpha per layer": {"recalibrate": False},
    "candidates": {},
    "candidates, no labels": {"metric": "unlabeled"},
}


def shifted(kind, images, rng):
    """Images as bytes, seen otherwise."""
    x = images.astype(float)
    if kind == "mixed":  # each image by one of the others at random
        which, kinds = (
            rng.integers(0, 4, len(x)),
            ("none", "contrast x 0.4", "brightness x 0.35", "noise 0.25"),
        )
        for index, one in enumerate(kinds):
            x[which == index] = shifted(one, x[which == index], rng)
    elif kind == "contrast x 0.4":
        x = 127.5 + 0.4 * (x - 127.5)
    elif kind == "brightness x 0.35":
        x = 0.35 * x
    elif kind == "noise 0.25":
        x = x + rng.normal(0, 0.25 * 255, x.shape)
    return x.round().clip(0, 255).astype(np.uint8)


def trained(name, folder, checkpoints, seed=0):
    """The network, from a checkpoint or trained on 20,000 images, others for each seed."""
    stored = checkpoints / f"{name}.pt" if checkpoints else None
    if stored and stored.exists():
        return stored
    fashion_mnist.make = lambda name: timm.create_model(name, num_classes=10, in_chans=1)
    images, labels = fashion_mnist.read(folder, "train")
    path = Path(f"{name}.pt")
    part = slice(20000 * seed, 20000 * (seed + 1))
    torch.save(fashion_mnist.train(name, images[part], labels[part], 4, seed).state_dict(), path)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoints", type=Path, help="folder with NAME.pt of an earlier run")
    parser.add_argument("--models", nargs="+", default=["test_resnet", "test_efficientnet"])
    kinds = ["none", "contrast x 0.4", "brightness x 0.35", "noise 0.25", "mixed"]
    parser.add_argument("--shifts", nargs="+", default=kinds)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--seed", type=int, default=0, choices=range(3), help="of what is trained")
    args = parser.parse_args()
    warnings.simplefilter("ignore", BnpatchWarning)  # that some models guess is what this is about
    images, labels = fashion_mnist.read(args.data, "t10k")
    print("| model | shift | search | chosen | top-1 | change | cross-entropy | flips | passes | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        path = trained(name, args.data, args.checkpoints, args.seed)
        if args.onnx:
            model = bnpatch.load(path, preprocessing=VALUES)
            bnpatch.export_onnx(model, path := Path(f"{name}.onnx"))
        for kind in args.shifts:
            x = shifted(kind, images[: TUNING + HELD_OUT], np.random.default_rng(0))
            y = labels[: TUNING + HELD_OUT]
            for search in args.searches:
                result = bnpatch.tune_alpha(
                    bnpatch.load(path, preprocessing=VALUES),
                    (x[:TUNING], y[:TUNING]),
                    test_data=(x[TUNING:], y[TUNING:]),
                    **SEARCHES[search],
                )
                by_name = {c.metric.name: c for c in result.comparisons}
                accuracy, entropy = by_name["accuracy"], by_name["cross-entropy"]
                change = accuracy.change
                cells = [
                    name,
                    kind,
                    search,
                    result.chosen.name,
                    f"{100 * accuracy.before.value:.1f} → {100 * accuracy.after.value:.1f}",
                    f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
                    f"{entropy.before.value:.3f} → {entropy.after.value:.3f}",
                    f"+{result.held_out.flips.gained} -{result.held_out.flips.lost}",
                    f"{result.passes:.0f}",
                    f"{result.seconds:.0f} s",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
