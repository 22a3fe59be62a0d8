"""Runs that are ended from outside, and runs that meet in one folder."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bnpatch.core import leftovers
from bnpatch.core.errors import BnpatchError
from bnpatch.core.leftovers import is_alive
from bnpatch.core.recipe import Recipe
from bnpatch.search import cross_fit
from bnpatch_cli import main
from bnpatch_cli import options as opt
from tests.command_line import QUICK, one_line
from tests.other_processes import SECONDS, names, start_of, wait_for

RESULTS = {"recipe.json", "patched.pt", "alpha-curve.png", "trials.csv", "report.html"}


@pytest.mark.parametrize("command", ["tune-alpha", "fine-tune"])
def test_a_second_run_in_a_folder_is_refused_before_the_model_is_loaded(
    cli,
    tmp_path,
    living,
    monkeypatch,
    command,
):
    mark = tmp_path / "bnpatch-out" / f"{start_of(living)}{leftovers.RUNNING}"
    mark.parent.mkdir()
    mark.touch()
    arguments = (command, "no-such.pt", "--data", "nowhere")
    if command == "fine-tune":
        arguments = (*arguments, "--val", "nowhere")
    code, _, err = cli(*arguments)
    assert code == 2
    assert f"another run of bnpatch (process {living}) writes to bnpatch-out; wait" in one_line(err)
    monkeypatch.setenv("RANK", "1")  # one of several processes of a run
    assert "cannot read no-such.pt" in one_line(cli(*arguments)[2])
    monkeypatch.delenv("RANK")
    mark.unlink()
    assert "cannot read no-such.pt" in one_line(cli(*arguments)[2])
    assert not names("bnpatch-out")


@pytest.mark.slow
def test_an_ended_search_stays_whole_until_the_next_one_ends(cli, checkpoint, folder, monkeypatch):
    command = ("tune-alpha", checkpoint, "--data", folder, *QUICK)
    assert cli(*command)[0] == 0
    assert names("bnpatch-out") == RESULTS
    before = {path.name: path.read_bytes() for path in Path("bnpatch-out").iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cross_fit, "gather", interrupt)  # after the search, before the verdict
        assert cli(*command, "--seed", 1)[0] not in (0, 2)
    assert names("bnpatch-out") == RESULTS | {"recipe.partial.json", "trials.partial.csv"}
    assert {name: Path("bnpatch-out", name).read_bytes() for name in RESULTS} == before

    partial, whole = (("--recipe", f"bnpatch-out/{name}.json") for name in ("recipe.partial", "recipe"))
    evaluate, export = ("evaluate", checkpoint, "--data", folder), ("export", checkpoint, "-o", "a.onnx")
    for asked in (evaluate, export):
        code, _, err = cli(*asked, *partial)
        assert code == 0
        assert "verdict of its search: none: the search has not ended" in err
        assert "warning: the search that wrote bnpatch-out/recipe.partial.json has not ended" in err
        _, _, err = cli(*asked, *whole)
        assert f"verdict of its search: {json.loads(before['recipe.json'])['provenance']['verdict']}" in err
        assert "warning" not in err

    with monkeypatch.context() as patch:
        patch.setattr("bnpatch.report.files.report_page", interrupt)  # the verdict is known
        assert cli(*command, "--seed", 1)[0] not in (0, 2)
    assert {name: Path("bnpatch-out", name).read_bytes() for name in RESULTS} == before
    assert "not ended" not in Recipe.load(partial[1]).provenance["verdict"]
    assert cli(*command, "--seed", 1)[0] == 0
    assert names("bnpatch-out") == RESULTS
    assert Recipe.load(whole[1]).provenance["seed"] == 1


def test_results_have_no_curve_of_an_earlier_search(cli, checkpoint, folder):
    Path("bnpatch-out").mkdir()
    Path("bnpatch-out", "alpha-curve.png").touch()
    Path("bnpatch-out", "mine.txt").touch()
    assert cli("tune-alpha", checkpoint, "--data", folder, "--timeout", 0, *QUICK)[0] == 0
    assert names("bnpatch-out") == RESULTS - {"alpha-curve.png"} | {"mine.txt"}


# SIGTERM, as the command line takes it.


def terminate(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS)
    pytest.fail("nothing happened")


@pytest.fixture
def handlers():
    """The handlers that a program has, put back when the test is over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("interrupts", ["as usual", "ignored"])
def test_sigterm_ends_a_command_with_143(cli, monkeypatch, handlers, interrupts):
    if interrupts == "ignored":  # as in a background job of a script
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    assert handlers[signal.SIGTERM] is signal.SIG_DFL
    monkeypatch.setattr(opt.Loading, "open", terminate)
    code, _, err = cli("tune-alpha", "model.pt", "--data", "val")
    assert code == 143
    assert "Traceback" not in err
    assert not names("bnpatch-out")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_in_a_destructor_is_not_lost(cli, monkeypatch):
    class Loader:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def end(*args, **kwargs):
        loader = Loader()
        del loader
        time.sleep(SECONDS)
        pytest.fail("nothing happened")

    before = sys.unraisablehook
    monkeypatch.setattr(opt.Loading, "open", end)
    assert cli("inspect", "model.pt")[0] in (1, 130)  # as Typer has it
    assert sys.unraisablehook is before


def test_plans_of_the_program_around_for_sigterm_stand(cli, monkeypatch, handlers):
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise BnpatchError("went on")

    monkeypatch.setattr(opt.Loading, "open", kill)
    assert cli("inspect", "model.pt")[0] == 2
    assert came == [signal.SIGTERM]


def test_a_thread_leaves_signals_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bnpatch", "inspect", "no-such.pt"])
    codes = []

    def run():
        try:
            main()
        except SystemExit as ended:
            codes.append(ended.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [2]
    assert "cannot read no-such.pt" in capsys.readouterr().err


# Processes.

LOADING = """
import multiprocessing, time
from bnpatch.finetune.workers import loaded

batches = loaded({"dataset": range(10_000), "batch_size": 1000}, 2)
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_loading_processes_end_with_the_main_process(number, tmp_path):
    """The script has no ``if __name__ == "__main__"``: a process that ran it again would start others."""
    script = tmp_path / "script.py"
    script.write_text(LOADING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as main_process:
        workers = [int(word) for word in main_process.stdout.readline().split()]
        time.sleep(1)  # they fill the pipes that nobody empties
        assert len(workers) == 2
        assert all(map(is_alive, workers))
        main_process.send_signal(number)
    wait_for(lambda: not any(map(is_alive, workers)), 20)


@pytest.fixture
def search(checkpoint, folder, tmp_path, monkeypatch):
    """A search that would take hours, begun: it has scored something, with two decoding threads."""
    monkeypatch.chdir(tmp_path)
    endless = ("--granularity", "global", "--max-passes", "1e9", "--trials", "1000000", "--holdout", "0.5")
    decoding = ("-j", "2", "--cache-gb", "0")
    command = ("tune-alpha", checkpoint, "--data", folder, *endless, *decoding, "--storage", "sqlite:///s.db")
    process = subprocess.Popen(
        [sys.executable, "-m", "bnpatch", *map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: process.poll() is not None or Path("bnpatch-out/recipe.partial.json").exists())
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def group_is_gone(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    members = (path.parent for path in Path("/proc").glob("[0-9]*/stat") if _group(path) == leader)
    return not any(is_alive(int(path.name)) for path in members)


def _group(path):
    try:
        return int(path.read_text().rpartition(") ")[2].split()[2])
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_sigterm_ends_a_search_as_an_interrupt_does(search, cli, send):
    code, _, err = cli("tune-alpha", "no-such.pt", "--data", "nowhere")
    assert code == 2
    assert f"another run of bnpatch (process {search.pid}) writes to bnpatch-out" in one_line(err)
    send(search.pid, signal.SIGTERM)
    out, err = search.communicate(timeout=SECONDS)
    assert search.returncode == 143, err
    assert "interrupted: what was found so far is judged now" in err
    assert "Traceback" not in err
    assert "held-out" in out
    assert names("bnpatch-out") == RESULTS
    assert Recipe.load("bnpatch-out/recipe.json").provenance["interrupted"]
    wait_for(lambda: group_is_gone(search.pid))


@pytest.mark.slow
def test_a_killed_search_goes_on_in_its_folder(search, cli, checkpoint, folder):
    search.kill()
    search.communicate()
    wait_for(lambda: group_is_gone(search.pid), 20)
    assert {"recipe.partial.json", "trials.partial.csv"} <= names("bnpatch-out")
    options = (*QUICK, "--trials", 5, "--storage", "sqlite:///s.db")
    code, out, err = cli("tune-alpha", checkpoint, "--data", folder, *options)
    assert code == 0, err
    assert re.search(r"the storage had \d trials? already", out)
    assert names("bnpatch-out") == RESULTS


@pytest.mark.slow
def test_the_package_runs_as_the_command_does():
    said = [
        subprocess.run([sys.executable, "-m", name, "evaluate"], capture_output=True, text=True, check=False)
        for name in ("bnpatch", "bnpatch_cli")
    ]
    assert [run.returncode for run in said] == [2, 2]
    assert said[0].stderr == said[1].stderr
    assert "bnpatch evaluate" in said[0].stderr
