"""What each of two processes does for ``test_processes.py``: it searches with metrics that fail.

``torchrun --nproc-per-node 2 -m tests.remedies.process_worker CHECKPOINT DATA OUT`` writes to the folder OUT
the message and the remedy of what failed in each process, and what became of following them.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.metrics import ACCURACY
from bnpatch.search.distributed import Processes


def without_a_number(outputs, targets):
    return ACCURACY.score(outputs, targets) * float("nan")


def of_one_shape_here(rank):
    """A metric that returns one number per example in the first process alone."""

    def score(outputs, targets):
        scores = ACCURACY.score(outputs, targets)
        return scores if rank == 0 else scores[:, None]

    return score


def searched(model, data, metric):
    try:
        result = bnpatch.tune_alpha(model, data, metric=metric, granularity="global", trials=2, holdout=0.5)
    except BnpatchError as error:
        return [error.problem, error.remedy]
    return result.alpha


def main(checkpoint, path, out):
    warnings.simplefilter("ignore")
    rank, arrays = int(os.environ["RANK"]), np.load(path)
    model, data = bnpatch.load(checkpoint), (arrays["x"], arrays["y"])
    metrics = {"no number": without_a_number, "two shapes": of_one_shape_here(rank), "right": "accuracy"}
    content = {name: searched(model, data, metric) for name, metric in metrics.items()}
    content["processes"] = Processes().count
    Path(out, f"{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
