"""What each of two processes does for ``test_processes.py``.

``torchrun --nproc-per-node 2 -m tests.search.process_worker CHECKPOINT DATA OUT`` writes to the folder OUT
what the searches of each process returned.
"""

import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta

import numpy as np
from torch.distributed import distributed_c10d

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.evaluation.metrics import ACCURACY


def settled(model, data):
    """What a search finds, as plain values."""
    result = bnpatch.tune_alpha(model, data, granularity="global", recalibrate=True)
    return {
        "alphas": dict(result.weights.alphas),
        "lambdas": dict(result.weights.lambdas),
        "held": result.num_held_out,
        "after": result.comparisons[0].after.value,
        "trials": len(result.trials),
    }


class OddError(Exception):
    """An error that can't be pickled."""

    def __init__(self):
        super().__init__("at odds", lambda: None)

    def __str__(self):
        return "at odds"


def fail():
    raise OddError


def stop():
    raise KeyboardInterrupt


def interrupt():
    signal.raise_signal(signal.SIGINT)


def wait(trial, is_best):
    if trial.number == 0:
        time.sleep(4)  # in the first process, longer than the others wait by default


def troubles(model, data, rank):
    """One search after the other, each with a metric that does something else at one of its calls."""
    x, y = data

    def found(do=None, at=0, ranks=(0, 1), **options):
        calls = []

        def metric(outputs, targets):  # made in a function, it can't be pickled
            calls.append(1)
            if len(calls) == at and rank in ranks:
                do()
            return ACCURACY.score(outputs, targets)

        options = {"metric": metric, "granularity": "global", "trials": 4, **options}
        try:
            result = bnpatch.tune_alpha(model, (x[:120], y[:120]), test_data=(x[120:], y[120:]), **options)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        metrics = [result.metric, *(c.metric for c in result.comparisons)]
        own = all(m.of_classes or m.score is metric for m in metrics)
        return {"alpha": result.alpha, "interrupted": result.interrupted, "own metrics": own}

    content = {
        "failed in the first": found(fail, 5, {0}),
        "failed in the second": found(fail, 5, {1}),
        "stopped in the first": found(stop, 5, {0}),
        "interrupted": found(interrupt, 5),
        "waited": found(metric="accuracy", on_trial=wait),
        "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    }
    if rank == 0:
        model.moments_by_batch = None  # it fails between two scorings
    return {**content, "failed alone": found(recalibrate=True)}


def main(checkpoint, path, out):
    warnings.simplefilter("ignore", BnpatchWarning)
    distributed_c10d.default_pg_timeout = timedelta(seconds=3)
    rank, arrays = int(os.environ["RANK"]), np.load(path)
    model, data = bnpatch.load(checkpoint), (arrays["x"], arrays["y"])
    content = {"settled": settled(model, data), **troubles(model, data, rank)}
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(content, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
