"""bnpatch beside other methods for single images, on five networks and the fifteen standard corruptions.

    PYTHONPATH=.:SITE python -m tests.benchmarks.rivals --crops CROPS.npz --fashion DIR --out rivals.jsonl
    python -m tests.benchmarks.rivals --table rivals.jsonl

The first command trains and fine-tunes what ``--work`` does not have, corrupts the images, and writes a line
per result as soon as there is one; the second prints the tables of docs/rivals.md. SITE and CROPS.npz are
those of :mod:`tests.benchmarks.photographs`, DIR has the four files of Fashion-MNIST. Every method sees the
same images: it is tuned, if it is, on images of a condition, and judged by others of the same condition.
"""

import argparse
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.models.distances import shifts
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.models.torch_model import TorchModel
from tests.benchmarks import fashion_mnist, rival_data, rival_tables
from tests.benchmarks import rival_methods as methods
from tests.benchmarks.rival_data import CLEAN, KINDS, MIXTURE, NETWORKS

#: Rivals with a free number, which is chosen on the images to tune on: by accuracy, then by cross-entropy.
SHRINKAGES, WEIGHTS = (4.0, 16.0, 64.0), (0.1, 0.3, 1.0)
BATCH = 64

#: Rivals that may be left out, because they cost the most.
LEFT_OUT = (INTENT, CHOSEN_INTENT, CHOSEN_AUGBN) = ("InTEnt, 0 to 1", "InTEnt, chosen", "AugBN, chosen")

RIVALS, LABELS, NO_LABELS = "rivals", "search", "unlabelled-search"


@dataclass(frozen=True)
class Job:
    """A piece of work for one process: a network under a condition, by the rivals or by a search.

    Attributes:
        network: name of the network.
        condition: name of the condition.
        task: by what.
        device: name of the device.
        work: folder of images and networks.
        choose_by: number of images that choose a rival's free number.
        timeout: seconds for a search.
        without: rivals that are left out.
    """

    network: str
    condition: str
    task: str
    device: str
    work: str
    choose_by: int
    timeout: float | None = None
    without: tuple[str, ...] = ()


class Images:
    """The images of a condition, and the same images as they are."""

    def __init__(self, job: Job) -> None:
        data = next(network for network in NETWORKS if network.name == job.network).data
        folder = Path(job.work) / data.name
        with np.load(folder / "about.npz") as about:
            self.y, count = about["y"], int(about["tuning"])
        self.tuning, self.held_out = slice(0, count), slice(count, None)
        self.x, self.clean = (np.load(folder / f"{name}.npy") for name in (job.condition, CLEAN))

    def pair(self, part: slice, clean: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return a part as (N, H, W, C) or (N, H, W) bytes, and labels."""
        x = (self.clean if clean else self.x)[part]
        return (x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)), self.y[part]


def run(job: Job) -> dict[str, Any]:
    """Do a job; what goes wrong is a part of the result."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", BnpatchWarning)
    started = time.monotonic()
    try:
        model = rival_data.loaded(job.network, Path(job.work), job.device)
        found = (by_rivals if job.task == RIVALS else by_search)(job, model, Images(job))
    except Exception:  # the other results count all the same
        found = {"error": traceback.format_exc()}
    return {**asdict(job), **found, "seconds": round(time.monotonic() - started, 1)}


def by_rivals(job: Job, model: TorchModel, images: Images) -> dict[str, Any]:
    """Score the rivals, and measure how far the images are from those of training at each norm layer."""
    judged = ["held-out"] if job.condition != MIXTURE else ["held-out", "clean"]
    scores = cache(partial(_scores, model, images, job.choose_by))

    def scored(name: str, predict: methods.Predict, passes: float, **about: Any) -> dict[str, Any]:
        rows = [scores(part, predict) for part in judged]
        clean = {} if len(rows) == 1 else {"clean_right": _hex(rows[1][0])}
        row = {"name": name, "right": _hex(rows[0][0]), "cross_entropy": float(rows[0][1].mean())}
        return {**row, **clean, "passes": passes, **about}

    def chosen(name: str, ways: dict[float, methods.Predict], passes: float) -> Iterator[dict[str, Any]]:
        if name in job.without:
            return
        found = {value: scores("choosing", way) for value, way in ways.items()}
        best = max(found, key=lambda value: (found[value][0].mean(), -found[value][1].mean()))
        yield scored(name, ways[best], passes, value=best)

    shrunk = {k: methods.by_rule(methods.soft_shrinkage(k)) for k in SHRINKAGES}
    averaged = {top: methods.intent(top) for top in WEIGHTS}
    rows = [
        scored("source", methods.probabilities, 1),
        scored("alpha-BN, 0.1", methods.by_rule(methods.alpha_bn(0.1)), 1),
        scored("soft shrinkage, 4", shrunk[4.0], 1),
        *chosen("soft shrinkage, chosen", shrunk, 1),
        *([] if INTENT in job.without else [scored(INTENT, averaged[1.0], 6)]),
        *chosen(CHOSEN_INTENT, averaged, 6),
        *chosen(CHOSEN_AUGBN, {weight: methods.augmented(weight) for weight in WEIGHTS}, 8),
    ]
    examples = bnpatch.open_examples(images.pair(images.tuning), model)
    statistics = re_estimate_statistics(model, examples)
    every = PatchWeights(lambdas=dict.fromkeys(statistics, 1.0))
    re_estimated = model.baseline().with_re_estimated(statistics).with_weights(every)

    def adapted(model: TorchModel, x: torch.Tensor) -> torch.Tensor:
        with model.in_state(re_estimated):
            return methods.probabilities(model, x)

    rows.append(scored("AdaBN", adapted, 1))
    seen = torch.from_numpy(np.ascontiguousarray(images.x[images.tuning][:BATCH]))
    return {
        "methods": rows,
        "shifts": [[round(s.distance, 5), round(s.common_share, 4)] for s in shifts(model, seen)],
    }


def _scores(
    model: TorchModel, images: Images, choose_by: int, part: str, predict: methods.Predict
) -> tuple[np.ndarray, np.ndarray]:
    """Return who is right, and the cross-entropies: of held-out images, or of those that choose a number."""
    x = images.clean if part == "clean" else images.x
    rows = slice(0, min(choose_by, images.held_out.start)) if part == "choosing" else images.held_out
    inputs, targets = torch.from_numpy(np.ascontiguousarray(x[rows])), images.y[rows]
    size = model.efficient_batch(BATCH, inputs)
    with torch.inference_mode(), model.evaluating():
        found = torch.cat([predict(model, rows).cpu() for rows in inputs.split(size)]).double().numpy()
    losses = -np.log(np.maximum(found[np.arange(len(targets)), targets], 1e-12))
    return found.argmax(1) == targets, losses


def by_search(job: Job, model: TorchModel, images: Images) -> dict[str, Any]:
    """Tune bnpatch as it comes, and score each of its candidates."""
    states = []  # of trials; the last has the re-estimated statistics
    result = bnpatch.tune_alpha(
        model,
        images.pair(images.tuning),
        test_data=images.pair(images.held_out),
        metric="accuracy" if job.task == LABELS else "unlabeled",
        timeout=job.timeout,
        on_trial=lambda trial, is_best: states.append(trial.state),
    )
    judged = {"": bnpatch.open_examples(images.pair(images.held_out), model)}
    if job.condition == MIXTURE:
        judged["clean_"] = bnpatch.open_examples(images.pair(images.held_out, clean=True), model)
    scored: dict[str, dict[str, Any]] = {}  # by weights, which two candidates may share
    rows = []
    for candidate in result.candidates:
        if not (candidate.chosen or any(candidate.name == name for _, name in rival_tables.ROWS.values())):
            continue
        if (weights := repr(candidate.weights)) not in scored:
            with model.in_state(states[-1].with_weights(candidate.weights)):
                scored[weights] = _by_prefix(model, judged)
        patched = sum(alpha > 0 for alpha in candidate.weights.alphas.values())
        about = {"name": candidate.name, "chosen": candidate.chosen, "passes": 1, "patched": patched}
        rows.append({**about, **scored[weights]})
    return {
        "methods": rows,
        "search_passes": round(result.passes, 1),
        "search_seconds": round(result.seconds, 1),
        "is_recommended": result.is_recommended,
    }


def _by_prefix(model: TorchModel, judged: dict[str, Examples]) -> dict[str, Any]:
    """Return who is right, and the mean cross-entropy, of each of several sets of images."""
    found: dict[str, Any] = {}
    for prefix, examples in judged.items():
        scores = evaluate(model, examples).values
        found[f"{prefix}right"] = _hex(scores["accuracy"] > 0.5)
        found[f"{prefix}cross_entropy"] = float(scores["cross-entropy"].mean())
    return found


def _hex(right: np.ndarray) -> str:
    return np.packbits(right).tobytes().hex()


class Results:
    """A file that gets a line as soon as there is a result; what an earlier run wrote is not done again."""

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self.known = {(r["network"], r["condition"], r["task"]) for r in records if "methods" in r}

    def add(self, record: dict[str, Any]) -> None:
        """Write a line, and say on the terminal what it is of."""
        at = round(time.monotonic() - self._started, 1)
        with self._path.open("a") as file:
            file.write(json.dumps({**record, "at": at}) + "\n")
        about = [str(record[key]) for key in ("network", "condition", "task", "seconds") if key in record]
        print(f"{at:6.1f} s", *about, str(record.get("error", ""))[-300:], flush=True)

    def of(self, future: "Future[dict[str, Any]]") -> None:
        """Add the result of a job that ended."""
        if not future.cancelled():
            self.add(future.result() if future.exception() is None else {"error": repr(future.exception())})


def prepare(args: argparse.Namespace, results: Results, pool: ProcessPoolExecutor) -> None:
    """Corrupt the images, and train the small networks if there are none."""
    for name in ("test_resnet", "test_efficientnet"):
        if name in args.networks:
            fashion_mnist.trained(name, args.fashion, args.work)
    for data in {n.data.name: n.data for n in NETWORKS if n.name in args.networks}.values():
        folder = args.work / data.name
        arrays = rival_data.images_of(data, args.fashion, args.crops, args.limit)
        rival_data.write_conditions(data, arrays.pop("x"), folder, args.conditions, pool)
        np.savez(folder / "about.npz", **arrays)
        about = {key: arrays[key].tolist() for key in ("groups", "y", "tuning")}
        results.add({"data": data.name, "severity": data.severity, **about})


def jobs_of(args: argparse.Namespace, networks: Sequence[str], tasks: Sequence[str]) -> Iterator[Job]:
    """List jobs, in the order of the conditions."""
    for task in tasks:
        for condition in args.conditions:
            for name in networks:
                if name in args.networks:
                    device = "cpu" if name.startswith("test_") else args.device
                    options = (str(args.work), args.choose_by, args.timeout, tuple(args.without))
                    yield Job(name, condition, task, device, *options)


def measure(args: argparse.Namespace) -> None:
    """Do all jobs, until they are done or the time is over."""
    args.work.mkdir(parents=True, exist_ok=True)
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    results = Results(args.out)
    large, cpus = (ProcessPoolExecutor(count, context) for count in args.workers)
    tuned = {}
    for name, network in (("plain", NETWORKS[1].name), ("techniques", NETWORKS[2].name)):
        if network in args.networks and not (args.work / f"{name}.pt").exists():
            options = (name, args.work, args.fashion, args.device, args.epochs, args.train)
            tuned[network] = large.submit(rival_data.fine_tune, *options)
    prepare(args, results, cpus)
    small, first, others = [n.name for n in NETWORKS[3:]], NETWORKS[0].name, [n.name for n in NETWORKS[1:3]]
    futures = []

    def submit(pool: ProcessPoolExecutor, networks: Sequence[str], tasks: Sequence[str]) -> None:
        for job in jobs_of(args, networks, tasks):
            if (job.network, job.condition, job.task) in results.known:
                continue
            futures.append(pool.submit(run, job))
            futures[-1].add_done_callback(results.of)

    submit(cpus, small, args.tasks)
    submit(large, [first], args.tasks[:2])
    for network, future in tuned.items():
        if (error := future.exception()) is not None:  # the other results count all the same
            results.add({"network": network, "error": repr(error)})
            others.remove(network)
        else:
            results.add({"fine_tuned": network, "accuracy": future.result()})
    submit(large, others, args.tasks[:2])
    submit(large, [first, *others], args.tasks[2:])
    while not all(future.done() for future in futures):
        if time.monotonic() - started > args.seconds:
            print(f"{sum(not future.done() for future in futures)} jobs were not done in time", flush=True)
            break
        time.sleep(0.5)
    for pool in (large, cpus):
        for process in list((pool._processes or {}).values()):
            process.terminate()
    os._exit(0)  # the pools would wait for jobs that were ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", type=Path, help="print the tables of these results")
    parser.add_argument("--out", type=Path, default=Path("rivals.jsonl"))
    parser.add_argument(
        "--work", type=Path, default=Path("rivals-work"), help="folder for images and networks"
    )
    parser.add_argument("--crops", type=Path, default=Path("crops.npz"))
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    names = [network.name for network in NETWORKS]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    conditions = [MIXTURE, CLEAN, *KINDS]
    parser.add_argument("--conditions", nargs="+", default=conditions, choices=conditions)
    tasks = [RIVALS, LABELS, NO_LABELS]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument(
        "--limit", type=int, nargs=2, help="use at most so many images to tune on, to judge by"
    )
    parser.add_argument("--choose-by", type=int, default=128, help="images that choose a rival's free number")
    parser.add_argument("--without", nargs="+", default=(), choices=LEFT_OUT, help="rivals to leave out")
    parser.add_argument("--timeout", type=float, help="seconds for a search")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--train", type=int, default=rival_data.TRANSFERRED, help="images to fine-tune on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, nargs=2, default=(1, 1), help="for large and for small networks"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start and end nothing after them"
    )
    args = parser.parse_args()
    if args.table:
        print(rival_tables.tables(args.table))
    else:
        measure(args)


if __name__ == "__main__":
    main()
