"""Decoding in threads, as bnpatch does, in the processes of a data loader, and where the images are needed.

``python -m tests.benchmarks.decoding [--images 1024] [--size 500x375] [--workers 2] [--rounds 5]`` decodes
JPEG files that it makes, for an input of at most 224 x 224. Medians over the rounds, all ways in each.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import bnpatch


class Arrays(Dataset):
    """Decoded images as arrays, which a process sends faster than tensors."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return np.asarray(self.examples.transform(self.examples.source.read(index)))


def timed(run):
    """Seconds by the clock on the wall, and of the main process."""
    wall, own = time.perf_counter(), time.process_time()
    for _ in run():
        pass
    return time.perf_counter() - wall, time.process_time() - own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", default="500x375")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.images):
            path = Path(folder) / str(index % 4) / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        side = min(224, width, height)
        model = bnpatch.load(
            timm.create_model("test_resnet", num_classes=4), preprocessing={"img_size": side}
        )

        def threads(number):
            return bnpatch.open_examples(folder, model, num_workers=number).batches(64)

        def processes():
            examples = Arrays(bnpatch.open_examples(folder, model))
            return DataLoader(examples, 8, num_workers=args.workers, collate_fn=list, prefetch_factor=4)

        ways = {
            "where they are needed": lambda: threads(0),
            f"{args.workers} threads": lambda: threads(args.workers),
            f"{args.workers} processes": processes,
        }
        found = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                found[way].append(timed(run))
    print("| way | wall clock | main process, per image |")
    print("| --- | --- | --- |")
    for way, seconds in found.items():
        wall, own = (statistics.median(values) for values in zip(*seconds, strict=True))
        print(f"| {way} | {wall:.2f} s | {1e3 * own / args.images:.2f} ms |")


if __name__ == "__main__":
    main()
