"""Two processes on the CPU find what one finds."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("accelerate")

SCRIPT = """
import json, os, sys, warnings
import numpy as np
import bnpatch
warnings.simplefilter("ignore")
checkpoint, data, out = sys.argv[1:]
arrays = np.load(data)
model = bnpatch.load(checkpoint)
data = arrays["x"], arrays["y"]
result = bnpatch.tune_alpha(model, data, granularity="global", recalibrate=True)
found = {
    "alphas": dict(result.setting.alphas),
    "lambdas": dict(result.setting.lambdas),
    "held": result.num_held_out,
    "after": result.comparisons[0].after.value,
    "trials": len(result.trials),
}
with open(f"{out}/{os.environ.get('RANK', 'alone')}.json", "w") as file:
    json.dump(found, file)
"""

# One search after the other, each with a metric that at one of its calls does something else, in one process
# or in both. A metric that is made in a function can't be pickled, and neither can this error.
TROUBLE = """
import json, os, signal, sys, time, warnings
from datetime import timedelta
import numpy as np
from torch.distributed import distributed_c10d
import bnpatch
from bnpatch.metrics import ACCURACY
warnings.simplefilter("ignore")
distributed_c10d.default_pg_timeout = timedelta(seconds=3)
checkpoint, data, out = sys.argv[1:]
arrays = np.load(data)
model = bnpatch.load(checkpoint)
x, y, rank = arrays["x"], arrays["y"], int(os.environ["RANK"])


class Odd(Exception):
    def __init__(self):
        super().__init__("at odds", lambda: None)

    def __str__(self):
        return "at odds"


def fail():
    raise Odd


def stop():
    raise KeyboardInterrupt


def found(do=None, at=0, ranks=(0, 1), **options):
    calls = []

    def metric(outputs, targets):
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


def wait(trial, is_best):
    if trial.number == 0:
        time.sleep(4)  # in the first process, longer than the others wait by default


content = {
    "failed in the first": found(fail, 5, {0}),
    "failed in the second": found(fail, 5, {1}),
    "stopped in the first": found(stop, 5, {0}),
    "interrupted": found(lambda: signal.raise_signal(signal.SIGINT), 5),
    "waited": found(metric="accuracy", on_trial=wait),
    "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}
if rank == 0:
    model.moments_by_batch = None  # it fails between two scorings
content["failed alone"] = found(recalibrate=True)
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(content, file)
"""


@pytest.fixture
def run(checkpoint, foggy, tmp_path):
    np.savez(tmp_path / "data.npz", x=foggy[0][:240], y=foggy[1][:240])
    arguments = [tmp_path / "tune.py", checkpoint, tmp_path / "data.npz", tmp_path]

    def launch(*before, script=SCRIPT):
        (tmp_path / "tune.py").write_text(script)
        return subprocess.run(
            [sys.executable, *map(str, before), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
        )

    return launch


def test_two_processes_find_what_one_finds(run, tmp_path):
    assert run().returncode == 0
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("alone", "0", "1"))
    assert first == second
    assert first["held"] == alone["held"]
    assert first["trials"] == alone["trials"]
    assert first["after"] == pytest.approx(alone["after"], rel=1e-3)  # batches differ, so rounding does
    assert first["alphas"] == pytest.approx(alone["alphas"], abs=1e-6)
    assert first["lambdas"] == pytest.approx(alone["lambdas"], abs=1e-6)
    assert any(first["lambdas"].values())  # the second process was told the moments that these weigh


def test_failures_and_interruptions_reach_all_processes(run, tmp_path):
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script=TROUBLE)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["failed in the first"] == "Odd: at odds"
    assert first["failed in the second"] == "BnpatchError: process 1 of 2 failed: Odd: at odds"
    assert first["failed alone"] == "TypeError: 'NoneType' object is not callable"
    for name in ("failed in the first", "failed in the second", "failed alone"):
        assert second[name] == "BnpatchError: the first process failed; see what it says"
    for name in ("stopped in the first", "interrupted", "waited"):
        assert first[name] == second[name]
        assert first[name]["interrupted"] == (name != "waited")
        assert first[name]["own metrics"]
    assert first["interrupts"]
    assert second["interrupts"]
