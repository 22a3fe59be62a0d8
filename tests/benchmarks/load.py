"""Time and memory of a search over many images: python -m tests.benchmarks.load --counts 2000 10000 50000

The files are hard links to some hundred small JPEG files, which bnpatch takes for different images. Compare
the seconds of processor, because the machine may be busy. The search runs in a child, so that
the memory is its own.
"""

import argparse
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, DISTINCT = 64, 300
MODEL = """
import sys, timm, torch
count, path = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
net = timm.create_model("test_resnet", num_classes=count)
args = {"img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
names = [f"{index:04}" for index in range(count)]
torch.save({"arch": "test_resnet", "state_dict": net.state_dict(), "args": args, "class_names": names}, path)
"""


@dataclass(frozen=True)
class Run:
    """What a command took: seconds to its first line, of wall time, of processor; peak of memory in MB."""

    first: float
    wall: float
    cpu: float
    peak: float
    code: int


def write_images(folder: Path, count: int, classes: int) -> None:
    """Write ``count`` image files in a folder per class."""
    rng = np.random.default_rng(0)
    for index in range(classes):
        (folder / f"{index:04}").mkdir(parents=True)
    written: list[Path] = []
    for index in range(count):
        path = folder / f"{index % classes:04}" / f"{index}.jpg"
        if index < DISTINCT:
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(small).resize((SIDE, SIDE)).save(path)
            written.append(path)
        else:
            os.link(written[index % DISTINCT], path)


def run(command: list[str]) -> Run:
    """Run a command and measure it; its output is read and dropped."""
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.select()
        first = time.monotonic() - start
        last = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - start
    if process.returncode:
        print(last.decode()[-2000:], file=sys.stderr)
    return Run(first, wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000, process.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 10_000, 50_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--cache-gb", type=float, default=0.05)
    given = parser.parse_args()
    print(
        "| images | classes | cache | first line | CPU | wall | peak memory |\n|---|---|---|---|---|---|---|"
    )
    for classes in given.classes:
        for count in given.counts:
            with tempfile.TemporaryDirectory() as folder:
                model, data = f"{folder}/model.pt", Path(folder) / "val"
                subprocess.run([sys.executable, "-c", MODEL, str(classes), model], check=True)
                write_images(data, count, classes)
                search = ["--granularity", "global", "--trials", "4", "--max-passes", "3", "--device", "cpu"]
                options = [*search, "--cache-gb", str(given.cache_gb), "-o", f"{folder}/out"]
                found = run(
                    [sys.executable, "-m", "bnpatch", "tune-alpha", model, "--data", str(data), *options]
                )
            cells = (
                f"{found.first:.1f} s",
                f"{found.cpu:.0f} s",
                f"{found.wall:.0f} s",
                f"{found.peak:,.0f} MB",
            )
            print(f"| {count:,} | {classes:,} | {given.cache_gb:g} GB | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
