"""One process of a race, for the tests to kill.

``python -m tests.search.race_worker STORAGE LOG RESULT [PEER]``

Each block that it scores becomes a line of LOG; RESULT is written when the race is over. It begins when
PEER is there, the log of another process that begins at the same moment.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from bnpatch.metrics import CROSS_ENTROPY
from bnpatch.search.race import race
from bnpatch.search.studies import open_study

SIZES = [20] * 12
FINGERPRINT = {"model": "a", "data": "b"}


def evaluate_block(params, block):
    """Examples whose best weights lie around 0.4."""
    rng = np.random.default_rng(block)
    best, steepness = rng.normal(0.4, 0.1, SIZES[block]), rng.uniform(1, 2, SIZES[block])
    return {"cross-entropy": 1 + steepness * (params["x"] - best) ** 2}


def run(storage, log=None, seconds_a_block=0.0):
    def scored(params, block):
        time.sleep(seconds_a_block)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{params['x']} {block}\n")
        return evaluate_block(params, block)

    result = race(
        open_study(storage, "test", direction="minimize", fingerprint=FINGERPRINT),
        scored,
        SIZES,
        metric=CROSS_ENTROPY,
        space={"x": (0.0, 1.0)},
        identity={"x": 0.0},
        first=[{"x": x} for x in (0.2, 0.6, 1.0)],
    )
    return {
        "best": result.best.params,
        "passes": result.passes,
        "runners": [[r.params, r.blocks, r.state.name, dict(r.means)] for r in result.runners],
    }


if __name__ == "__main__":
    storage, *paths = sys.argv[1:]
    log, result, *peers = map(Path, paths)
    log.touch()
    while not all(peer.exists() for peer in peers):
        time.sleep(0.001)
    result.write_text(json.dumps(run(storage, log, seconds_a_block=0.02)))
