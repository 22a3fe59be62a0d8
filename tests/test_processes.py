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
broken = json.loads(os.environ.get("BROKEN", "false"))
if broken and os.environ.get("RANK") == "0":
    model.moments_by_batch = None  # the first process fails in the middle of its search
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


@pytest.fixture
def run(checkpoint, foggy, tmp_path):
    np.savez(tmp_path / "data.npz", x=foggy[0][:240], y=foggy[1][:240])
    (tmp_path / "tune.py").write_text(SCRIPT)
    arguments = [tmp_path / "tune.py", checkpoint, tmp_path / "data.npz", tmp_path]

    def launch(*before):
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


def test_where_the_first_process_fails_the_others_do_not_wait(run, monkeypatch, tmp_path):
    monkeypatch.setenv("BROKEN", "true")
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert done.returncode != 0
    assert "'NoneType' object is not callable" in done.stderr  # the reason, not a timeout of the other
    assert not list(tmp_path.glob("*.json"))
