"""The main job on Fashion-MNIST: train, shift, tune, judge; prints the tables of docs/results.md.

The data set is Debian's package dataset-fashion-mnist, or any folder with its four idx files:
``python -m tests.benchmarks.fashion_mnist [--data DIR] [--train 20000] [--epochs 4]``.
"""

import argparse
import gzip
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision

import bnpatch

SIDE = 32
SHIFTS = {
    "none": lambda x: x,
    "contrast x 0.4": lambda x: 127.5 + 0.4 * (x - 127.5),
    "brightness x 0.35": lambda x: 0.35 * x,
}


def read(folder, part):
    """Images (N, 28, 28) as bytes, and classes."""
    images, labels = (
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
        for path, offset in (
            (folder / f"{part}-images-idx3-ubyte.gz", 16),
            (folder / f"{part}-labels-idx1-ubyte.gz", 8),
        )
    )
    return images.reshape(-1, 28, 28), labels.astype(np.int64)


def make(name):
    if name.startswith("timm "):
        return timm.create_model(name.removeprefix("timm "), num_classes=10, in_chans=1)
    return torchvision.models.resnet18(num_classes=10)


def train(name, images, labels, epochs, seed=0):
    torch.manual_seed(seed)
    model = make(name).train()
    channels = next(model.parameters()).shape[1]
    x = (
        F.interpolate(torch.from_numpy(images.copy())[:, None].float(), size=SIDE, mode="bilinear") / 127.5
        - 1
    )
    y = torch.from_numpy(labels)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].view(-1, 128):
            xb = x[batch].expand(-1, channels, -1, -1)
            loss = F.cross_entropy(model(xb.flip(-1) if torch.rand(()) < 0.5 else xb), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    images, labels = read(args.data, "train")
    test_images, test_labels = (a[:6000] for a in read(args.data, "t10k"))
    print("| model | shift | tuned | alpha | accuracy | change | cross-entropy | change | verdict | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("timm test_resnet", "torchvision resnet18"):
        started = time.monotonic()
        model = train(name, images[: args.train], labels[: args.train], args.epochs)
        trained = time.monotonic() - started
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            torch.save(model.state_dict(), path)
            values = {
                "img_size": SIDE,
                "mean": (0.5,),
                "std": (0.5,),
                "crop_pct": 1.0,
                "interpolation": "bilinear",
            }
            loaded = bnpatch.load(path, preprocessing=values)
        for shift, apply in SHIFTS.items():
            shifted = apply(test_images.astype(float)).round().astype(np.uint8)
            for metric in ("accuracy", "cross-entropy"):
                result = bnpatch.tune_alpha(
                    loaded, (shifted, test_labels), metric=metric, granularity="global"
                )
                by_name = {c.metric.name: c for c in result.comparisons}
                cells = []
                for key in ("accuracy", "cross-entropy"):
                    c, fmt = by_name[key], by_name[key].metric.format
                    cells += [
                        f"{fmt(c.before.value)} → {fmt(c.after.value)}",
                        f"{fmt(c.change.value, signed=True)} "
                        f"[{fmt(c.change.low, signed=True)}, {fmt(c.change.high, signed=True)}]",
                    ]
                row = [
                    name,
                    shift,
                    metric,
                    f"{result.alpha:.4f}",
                    *cells,
                    result.verdict,
                    f"{result.seconds:.0f} s",
                ]
                print("| " + " | ".join(row) + " |", flush=True)
        print(f"<!-- {name} trained in {trained:.0f} s on {args.train} images -->", flush=True)


if __name__ == "__main__":
    main()
