"""Measure what docs/results.md says, and write the page from the measurements.

    python -m tests.benchmarks.results [--only NAME ...] [--workers 2]     # measures, then writes the page
    python -m tests.benchmarks.results --page                             # writes the page alone

Each benchmark writes docs/results/NAME.json as its parts finish; a run that was cut off goes on where it
was. The tables, the pictures and the figures of the page are made of these files, its text is
results.md.j2 beside this file, and claims.py has its claims. The exit code is 1 where a claim does not
hold, or a part could not be measured. ``--tuning 200 --held-out 200 --train 1280 --output DIR`` is a fast
trial. The photographs and the text classifier need files: see :mod:`tests.benchmarks.photographs` and
:mod:`tests.benchmarks.text_orientation`.
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from bnpatch.core.errors import BnpatchWarning
from tests.benchmarks import (
    augment,
    candidates,
    corruptions,
    group_norm,
    one_alpha,
    paper_directions,
    photographs,
    strength,
    text_orientation,
)
from tests.benchmarks.fashion_mnist import Setup
from tests.benchmarks.results_page import FOLDER, failing, read_results, write_page

BENCHMARKS = {
    "candidates": (candidates.parts, candidates.measure),
    "further_networks": (candidates.parts_further, candidates.measure),
    "onnx_files": (candidates.parts_onnx, candidates.measure_onnx),
    "strength": (strength.parts, strength.measure),
    "one_alpha": (one_alpha.parts, one_alpha.measure),
    "augment": (augment.parts, augment.measure),
    "group_norm": (group_norm.parts, group_norm.measure),
    "corruptions": (corruptions.parts, corruptions.measure),
    "text_orientation": (text_orientation.parts, text_orientation.measure),
    "photographs": (photographs.parts, photographs.measure),
    "paper_directions": (paper_directions.parts, paper_directions.measure),
}


def main():
    args = parsed()
    complete = args.page or measured(args)
    results = read_results(args.output)
    if args.output == FOLDER:
        write_page(results)
    broken = failing(results)
    for name in broken:
        print(f"no longer true: {name}", file=sys.stderr)
    return 1 if broken or not complete else 0


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the json files")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--commit", help="what is measured; asked of git by default")
    for name, value in Setup.__dataclass_fields__.items():
        kind = int if value.type is int else Path
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value.default)
    return parser.parse_args()


def measured(args):
    """Measure in several processes; whether all parts could be measured."""
    setup = Setup(**{name: getattr(args, name) for name in Setup.__dataclass_fields__})
    setup.networks.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {name: list(BENCHMARKS[name][0]()) for name in args.only}
    about = {"date": str(datetime.date.today()), "commit": args.commit or commit(), "machine": machine()}
    about |= {"tuning": args.tuning, "held_out": args.held_out}
    rows = {name: known(args.output / f"{name}.json", about, parts[name]) for name in args.only}
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, initializer=one_thread) as pool:
        for made in [pool.submit(setup.network, *pair) for pair in networks(parts)]:
            made.result()
        for network in {part["network"] for part in parts.get("corruptions", ())}:
            pool.submit(corruptions.recipe_for_all, setup, network)  # ready before the parts that use it
        work = {
            pool.submit(BENCHMARKS[name][1], setup, **part): (name, index)
            for name in args.only
            for index, part in enumerate(parts[name])
            if not rows[name][index]
        }
        for number, done in enumerate(as_completed(work), 1):
            name, index = work[done]
            if done.exception():
                traceback.print_exception(done.exception())
                print(f"not measured: {name}, {parts[name][index]}", file=sys.stderr)
                failed += 1
            else:
                rows[name][index] = [{**parts[name][index], **row} for row in done.result()]
                written(args.output / f"{name}.json", about, rows[name])
            print(f"{number} of {len(work)}: {name}, {parts[name][index]}", flush=True)
    return not failed


def known(path, about, parts):
    """The rows of each part that an earlier run of the same commit on the same machine measured."""
    stored = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if any(stored.get(key) != about[key] for key in about if key != "date"):
        return [None] * len(parts)
    return [[row for row in stored["rows"] if part.items() <= row.items()] for part in parts]


def networks(parts):
    """The networks that parts need, as (name, seed)."""
    named = {(p["network"], p.get("seed", 0)) for of in parts.values() for p in of if "network" in p}
    return sorted(pair for pair in named if pair[0] != "digits")


def one_thread():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", BnpatchWarning)  # that some models guess is what this is about


def written(path, about, parts):
    """Write what was measured, one row per line."""
    rows = [json.dumps(rounded(row)) for part in parts if part for row in part]
    head = json.dumps(about)[:-1]
    path.write_text(f'{head}, "rows": [\n' + ",\n".join(rows) + "\n]}\n")


def rounded(value):
    """Floats to six digits, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.6g}") if isinstance(value, float) else value


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine():
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"torch {torch.__version__.split('+')[0]}, {device}"


if __name__ == "__main__":
    sys.exit(main())
