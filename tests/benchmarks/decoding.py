"""What it costs a process to be sent decoded images by others: as tensors one by one, or as bnpatch does.

``python -m tests.benchmarks.decoding [--images 1024] [--workers 2] [--rounds 5]``: JPEG files of 500 x 375
pixels, made on the spot, decoded for an input of 224 x 224. Medians over the rounds, both ways in each.
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


class OneByOne(Dataset):
    """Images as tensors, as most data sets return them."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        image = self.examples.transform(self.examples.source.read(index))
        return torch.from_numpy(np.asarray(image).copy())


def timed(run):
    """Seconds by the clock on the wall, and of the main process."""
    wall, own = time.perf_counter(), time.process_time()
    for _ in run():
        pass
    return time.perf_counter() - wall, time.process_time() - own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.images):
            path = Path(folder) / str(index % 4) / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        model = bnpatch.load(timm.create_model("test_resnet", num_classes=4), preprocessing={"img_size": 224})
        found = {"tensors, one by one": [], "bnpatch": []}
        for _ in range(args.rounds):
            examples = bnpatch.open_examples(folder, model, num_workers=args.workers)
            loader = DataLoader(OneByOne(examples), batch_size=None, num_workers=args.workers)
            found["tensors, one by one"].append(timed(lambda loader=loader: loader))
            found["bnpatch"].append(timed(lambda examples=examples: examples.batches(64)))
    print("| way | wall clock | main process, per image |")
    print("| --- | --- | --- |")
    for way, seconds in found.items():
        wall, own = (statistics.median(values) for values in zip(*seconds, strict=True))
        print(f"| {way} | {wall:.2f} s | {1e3 * own / args.images:.2f} ms |")


if __name__ == "__main__":
    main()
