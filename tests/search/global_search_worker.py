"""One process of a global search, for the tests to kill.

Each block that it scores becomes a line of its log; the result is written when the global search is over. It
begins when its peers are there, logs of other processes that begin at the same moment, and leaves those
something to do once the baseline is scored.
"""

import json
import os
import time

import numpy as np
import scipy.optimize
import scipy.stats  # noqa: F401

from bnpatch.evaluation.metrics import CROSS_ENTROPY
from bnpatch.search.global_search import global_search
from bnpatch.search.storages import Storage
from bnpatch.search.studies import open_study
from bnpatch.search.trials import GlobalSearchConfig

SIZES = [64] * 12  # a batch each, so that each is a line of its own
GRACE_SECONDS = 3
FINGERPRINT = {"model": "a", "data": "b"}


def evaluate_block(params, block):
    """Examples whose best weights lie around 0.4."""
    rng = np.random.default_rng(block)
    best, steepness = rng.normal(0.4, 0.1, SIZES[block]), rng.uniform(1, 2, SIZES[block])
    score = 1 + steepness * (params["x"] - best) ** 2
    return {"cross-entropy": score, "twice": 2 * score}


def run(storage, log=None, seconds_a_block=0.0, peers=(), on_line=lambda count: None):
    if isinstance(storage, str):
        storage = Storage(storage, heartbeat_seconds=1, grace_seconds=GRACE_SECONDS)
    count = 0

    def scored(params, blocks):
        return [score(params, block) for block in blocks]

    def score(params, block):
        nonlocal count
        time.sleep(seconds_a_block)
        count += 1
        on_line(count)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{params['x']} {block}\n")
        if params["x"]:
            wait(lambda: all(peer.read_text() for peer in peers))
        return evaluate_block(params, block)

    result = global_search(
        open_study(storage, "test", direction="minimize", fingerprint=FINGERPRINT),
        scored,
        GlobalSearchConfig(
            SIZES, CROSS_ENTROPY, {"x": (0.0, 1.0)}, {"x": 0.0}, [{"x": x} for x in (0.2, 0.6, 1.0)]
        ),
    )
    return {
        "best": result.best.params,
        "best value": result.mean(result.best),
        "passes": result.passes,
        "trials": summaries(result),
    }


def summaries(result):
    """Every trial of a global search with the means of its metrics."""
    return [
        [t.params, t.num_blocks, t.state.name, {name: result.mean(t, name) for name in t.blocks.get(0, ())}]
        for t in result.trials
    ]


def wait(ready):
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.001)


def main(storage, log, result, *peers):
    log.touch()
    os.dup2(os.open(log.with_suffix(".stderr"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    wait(lambda: all(peer.exists() for peer in peers))
    result.write_text(json.dumps(run(storage, log, 0.02, peers)))
