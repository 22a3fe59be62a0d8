"""The tables of docs/rivals.md, from the results that :mod:`tests.benchmarks.rivals` wrote."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from bnpatch.evaluation.metrics import paired_difference
from tests.benchmarks.rival_data import CLEAN, KINDS, MIXTURE, NETWORKS

# Row of a table: the task that found it, and its name there; a name of None is what the search chose.
ROWS: Mapping[str, tuple[str, str | None]] = {
    "source": ("rivals", "source"),
    "AdaBN (lambda = 1)": ("rivals", "AdaBN"),
    "one alpha, labels": ("search", "alpha"),
    "one alpha, no labels": ("unlabelled-search", "alpha"),
    "alpha-BN, 0.1": ("rivals", "alpha-BN, 0.1"),
    "soft shrinkage, 4": ("rivals", "soft shrinkage, 4"),
    "soft shrinkage, chosen by labels": ("rivals", "soft shrinkage, chosen"),
    "InTEnt, 0 to 1": ("rivals", "InTEnt, 0 to 1"),
    "InTEnt, chosen by labels": ("rivals", "InTEnt, chosen"),
    "AugBN, chosen by labels": ("rivals", "AugBN, chosen"),
    "lambda": ("search", "lambda"),
    "lambda, alpha": ("search", "lambda, alpha"),
    "alpha per layer": ("search", "alpha per layer"),
    "alpha and slope per layer": ("search", "alpha and slope per layer"),
    "lambda and alpha per layer": ("search", "lambda and alpha per layer"),
    "lambda, alpha and slope per layer": ("search", "lambda, alpha and slope per layer"),
    "**bnpatch, labels**": ("search", None),
    "**bnpatch, no labels**": ("unlabelled-search", None),
}
# The same for lines of text, where a record has a number per name.
LINES: Mapping[str, str] = {
    "source": "source",
    "AdaBN (lambda = 1)": "AdaBN",
    "one alpha, labels": "alpha",
    "alpha-BN, 0.1": "alpha-BN, 0.1",
    "soft shrinkage, 4": "soft shrinkage, 4",
    "lambda": "lambda",
    "lambda, alpha": "lambda, alpha",
    "**bnpatch, labels**": "chosen",
}
SEARCHED = "**bnpatch, labels**"  # the mean is of the kinds for which this row is there
GAINS = {
    "AdaBN": "AdaBN (lambda = 1)",
    "labels": "**bnpatch, labels**",
    "no labels": "**bnpatch, no labels**",
}


class Results:
    """What a benchmark wrote; of two results of the same job, the later one counts."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, dict[str, Any]] = {}
        self.jobs: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.trained: dict[str, float] = {}
        for record in map(json.loads, path.read_text().splitlines()):
            if "data" in record:
                self.data[record["data"]] = record
            elif "fine_tuned" in record:
                self.trained[record["fine_tuned"]] = record["accuracy"]
            elif "methods" in record:
                self.jobs[record["network"], record["condition"], record["task"]] = record

    def methods(self, network: str, condition: str, row: str) -> dict[str, Any] | None:
        """Return what a row of a table says of a condition; None if it is not there."""
        task, name = ROWS[row]
        found = self.jobs.get((network, condition, task), {}).get("methods", [])
        return next((m for m in found if (m.get("chosen") if name is None else m["name"] == name)), None)

    def right(self, network: str, condition: str, row: str, key: str = "right") -> np.ndarray | None:
        """Return who of the held-out images is answered right, (N,); None if it is not there."""
        about = self.data[next(n.data.name for n in NETWORKS if n.name == network)]
        found = self.methods(network, condition, row)
        if found is None or key not in found:
            return None
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(found[key]), np.uint8))
        return bits[: len(about["y"]) - about["tuning"]].astype(float)

    def groups(self, network: str) -> np.ndarray:
        """Return the group of each held-out image."""
        about = self.data[next(n.data.name for n in NETWORKS if n.name == network)]
        return np.array(about["groups"])[about["tuning"] :]


def tables(path: Path) -> str:
    """Return all tables as Markdown."""
    results = Results(path)
    names = [n.name for n in NETWORKS if any(network == n.name for network, _, _ in results.jobs)]
    parts = [f"### {name}\n\n" + "\n".join(_accuracies(results, name)) for name in names]
    parts += ["### What predicts a gain\n\n" + "\n".join(_predictors(results, names))]
    return "\n\n".join(parts)


def of_lines(path: Path) -> str:
    """Return the table of what :mod:`tests.benchmarks.rival_text` wrote, in percent of lines."""
    records = {record["condition"]: record for record in map(json.loads, path.read_text().splitlines())}
    conditions = sorted(records, key=[CLEAN, *KINDS, MIXTURE].index)
    rows = (
        [row, *(f"{100 * records[condition][name]:.1f}" for condition in conditions)]
        for row, name in LINES.items()
    )
    return "\n".join(_table(["method", *(condition.replace("_", " ") for condition in conditions)], rows))


def _table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    for row in [head, ["---"] * len(head), *rows]:
        yield f"| {' | '.join(row)} |"


def _accuracies(results: Results, network: str) -> Iterator[str]:
    kinds = [kind for kind in KINDS if (network, kind, "rivals") in results.jobs]
    names = [kind.replace("_", " ") for kind in kinds]
    head = ["method", CLEAN, *names, "mean", "change of the mean", MIXTURE, "clean after it", "passes"]
    yield from _table(head, _rows(results, network, kinds))


def _rows(results: Results, network: str, kinds: list[str]) -> Iterator[list[str]]:
    searched = [kind for kind in kinds if results.right(network, kind, SEARCHED) is not None]
    for row in ROWS:
        known = [m for c in (CLEAN, MIXTURE, *kinds) if (m := results.methods(network, c, row))]
        done = sum((network, c, ROWS[row][0]) in results.jobs for c in (CLEAN, MIXTURE, *kinds))
        if not known or (ROWS[row][0] != "rivals" and 2 * len(known) < done):  # one that searches seldom have
            continue
        cells = [_percent(results.right(network, condition, row)) for condition in (CLEAN, *kinds)]
        mixture = _percent(results.right(network, MIXTURE, row), 1)
        after = _percent(results.right(network, MIXTURE, row, "clean_right"))
        yield [row, *cells, *_mean(results, network, searched, row), mixture, after, str(known[0]["passes"])]


def _mean(results: Results, network: str, kinds: list[str], row: str) -> tuple[str, str]:
    """Return the mean accuracy over kinds, and its change by a method; "-" where a kind is not there."""
    source, found = ([results.right(network, kind, name) for kind in kinds] for name in ("source", row))
    if not kinds or any(right is None for right in found):
        return "-", "-"
    before, after = np.mean(source, axis=0), np.mean(found, axis=0)
    change = paired_difference(before, after, results.groups(network))
    value, low, high = (100 * part for part in (change.value, change.low, change.high))
    return f"{100 * after.mean():.1f}", f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _percent(right: np.ndarray | None, digits: int = 0) -> str:
    return "-" if right is None else f"{100 * right.mean():.{digits}f}"


def facts(results: Results, names: list[str]) -> list[dict[str, Any]]:
    """Return distances, shares, and points lost and gained, for each network and condition."""
    found = []
    for network in names:
        clean = results.right(network, CLEAN, "source")
        if clean is None:
            clean = results.right(network, MIXTURE, "source", "clean_right")
        for condition in (CLEAN, *KINDS, MIXTURE):
            record = results.jobs.get((network, condition, "rivals"))
            source = results.right(network, condition, "source")
            if record is None or source is None or clean is None:
                continue
            distances, shares = np.array(record["shifts"]).T
            row = {
                "D, first": distances[0],
                "D, median": np.median(distances),
                "D, largest": distances.max(),
                "share, first": shares[0],
                "share, median": np.median(shares),
                "lost": 100 * (clean.mean() - source.mean()),
            }
            for key, name in GAINS.items():
                if (after := results.right(network, condition, name)) is not None:
                    row[f"gain, {key}"] = 100 * (after.mean() - source.mean())
            found.append({"network": network, "condition": condition, **row})
    return found


def _predictors(results: Results, names: list[str]) -> Iterator[str]:
    found = facts(results, names)
    predictors = [key for key in found[0] if key[0] in "Ds"] + ["lost"] if found else []
    gains = [f"gain, {key}" for key in GAINS]
    cells = (
        [f["network"], f["condition"], *(_number(f.get(k), k) for k in (*predictors, *gains))] for f in found
    )
    yield from _table(["network", "condition", *predictors, *gains], cells)
    yield ""
    rows = []
    for gain in gains:
        for name in (*names, "all"):
            mine = [f for f in found if name in (f["network"], "all") and gain in f]
            if len(mine) > 2:
                ranks = (spearmanr([f[k] for f in mine], [f[gain] for f in mine])[0] for k in predictors)
                rows.append([gain, name, str(len(mine)), *(f"{rank:+.2f}" for rank in ranks)])
    yield from _table(["rank correlation with", "network", "conditions", *predictors], iter(rows))


def _number(value: float | None, key: str) -> str:
    return "-" if value is None else f"{value:.1f}" if key[0] in "gl" else f"{value:.2f}"
