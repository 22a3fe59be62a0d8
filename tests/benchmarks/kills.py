"""End searches at random moments: python -m tests.benchmarks.kills --count 40

Each search runs in a process that is forked from this one. It gets SIGTERM, SIGINT or SIGKILL at a moment
that the seed says. Then every file under its final name must be whole, no process may be left, and the same
command must give the recipe of a search that nobody ended.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import bnpatch
from bnpatch.core.leftovers import is_alive
from bnpatch_cli import main as command_line

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
PATIENCE = 600  # seconds of wall time until a search counts as hung


def write_inputs(folder: Path) -> list[str]:
    """Write a small model and images; return the command that searches."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    args = {"img_size": 16, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
    torch.save({"arch": "test_resnet", "state_dict": net.state_dict(), "args": args}, folder / "model.pt")
    rng = np.random.default_rng(0)
    for index in range(60):
        path = folder / "val" / str(index % 10) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path)
    search = ["--granularity", "global", "--trials", "6", "--holdout", "0.5", "-j", "2", "--cache-gb", "0"]
    return ["tune-alpha", str(folder / "model.pt"), "--data", str(folder / "val"), *search]


def start(command: list[str]) -> int:
    """Begin a command in a process of its own, the leader of a group; return its id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.argv = ["bnpatch", *command]
    code = 1
    try:
        command_line()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(code)


def wait(process: int) -> int | None:
    """Wait for the end of a process; return its exit code, or None if it hangs and had to be killed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def orphans(leader: int) -> list[int]:
    """Return the processes that are left of a group."""
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            group = int(path.read_text().rpartition(") ")[2].split()[2])
        except OSError:
            continue
        if group == leader and is_alive(int(path.parent.name)):
            left.append(int(path.parent.name))
    return left


def broken(folder: Path) -> list[str]:
    """Name the files under final names that are not whole."""
    found = []
    for path in folder.glob("**/*"):
        if path.name.startswith(".bnpatch-") or path.is_dir():
            continue
        try:
            if path.suffix == ".json":
                bnpatch.Recipe.load(path)
            elif path.suffix == ".pt":
                with zipfile.ZipFile(path) as archive:
                    assert archive.testzip() is None
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".csv":
                with path.open(newline="") as file:
                    assert len({len(row) for row in csv.reader(file)}) == 1
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
        except Exception as error:
            found.append(f"{path.name}: {error!r}")
    return found


def weights(folder: Path) -> str:
    """Return what a recipe does, as text."""
    return json.dumps(bnpatch.Recipe.load(folder / "recipe.json").to_json()["sites"], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        command = write_inputs(Path(folder))
        begun = time.monotonic()
        assert wait(start([*command, "-o", f"{folder}/whole"])) == 0
        lasts = time.monotonic() - begun
        for seed in range(given.first, given.first + given.count):
            rng = random.Random(seed)
            number, moment = SIGNALS[seed % 3], rng.uniform(0, lasts)
            output = Path(folder) / f"out{seed}"
            asked = [*command, "-o", str(output)]
            if rng.random() < 0.5:
                asked += ["--storage", f"sqlite:///{folder}/{seed}.db"]
            process = start(asked)
            time.sleep(moment)
            os.kill(process, number)
            code = wait(process)
            counts[f"{number.name}: exit code {code}"] += 1
            counts["hung"] += code is None
            counts["orphans"] += len(orphans(process))
            half = broken(output) if output.exists() else []
            counts["half-written files"] += len(half)
            again = wait(start(asked))
            same = again == 0 and weights(output) == weights(Path(folder) / "whole")
            counts["same recipe after a restart" if same else "ANOTHER RECIPE"] += 1
            counts["leftovers after a restart"] += sum(
                p.name.startswith(".bnpatch-") for p in output.glob("*")
            )
            if half or not same:
                print(f"seed {seed}, {number.name} after {moment:.1f} s: {half}, restart ended with {again}")
            print(f"{seed + 1 - given.first} of {given.count}", end="\r", file=sys.stderr)
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")


if __name__ == "__main__":
    main()
