import json
import multiprocessing
import os
import random
import time

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from bnpatch.core.errors import BnpatchError
from bnpatch.search import studies
from bnpatch.search.studies import as_stored, open_study, this_process
from tests.search import global_search_worker

SPACE = {"x": (0.0, 1.0)}


@pytest.fixture(params=["sqlite", "journal"])
def storage(request, tmp_path):
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else str(tmp_path / "study.journal")


@pytest.fixture(scope="module")
def uninterrupted():
    return json.loads(json.dumps(global_search_worker.run(None)))


# Copies of one process that has imported everything: what is tested is how they end, not how they begin.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.search.global_search_worker"])


def start(storage, log, result, *peers):
    process = PROCESSES.Process(target=global_search_worker.main, args=(storage, log, result, *peers))
    process.start()
    return process


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def finish(process, log):
    process.join(120)
    said = log.with_suffix(".stderr").read_text()
    assert process.exitcode == 0, said
    assert said == ""  # Optuna's chatter is none of the user's business


def states(storage, name="test"):
    return [t.state for t in open_study(storage, name, fingerprint=global_search_worker.FINGERPRINT).trials()]


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_as_if_it_had_not_been(storage, tmp_path, uninterrupted):
    log, result = tmp_path / "log", tmp_path / "result"
    chance = random.Random(storage.startswith("sqlite"))
    for kill_at in (chance.randint(1, 12), chance.randint(13, 24)):
        process = start(storage, log, result)
        while len(lines(log)) < kill_at and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.01))  # anywhere in the block, or in what is written after it
        assert process.is_alive(), "it was over before it was killed"
        process.kill()
        process.join()
    finish(start(storage, log, result), log)
    assert json.loads(result.read_text()) == uninterrupted
    assert TrialState.RUNNING not in states(storage)
    # Only the block that was being scored at each kill is scored again.
    assert 0 <= len(lines(log)) - len(set(lines(log))) <= 2


def test_running_it_again_scores_nothing(storage, tmp_path, uninterrupted):
    assert global_search_worker.run(storage) == uninterrupted
    log = tmp_path / "log"
    assert global_search_worker.run(storage, log) == uninterrupted
    assert lines(log) == []


@pytest.mark.slow
def test_two_processes_share_a_study(storage, tmp_path):
    logs, results = [tmp_path / "log1", tmp_path / "log2"], [tmp_path / "r1", tmp_path / "r2"]
    processes = [start(storage, logs[i], results[i], logs[1 - i]) for i in (0, 1)]
    for process, log in zip(processes, logs, strict=True):
        finish(process, log)
    found = [json.loads(path.read_text()) for path in results]
    assert found[0]["best"] == found[1]["best"]
    assert found[0]["best"]["x"] == pytest.approx(0.4, abs=0.05)
    assert found[0]["passes"] <= 3.5  # both may begin what the budget has room for only once
    assert all(map(lines, logs))  # both worked
    everything = lines(logs[0]) + lines(logs[1])
    identity = [line for line in everything if line.startswith("0.0 ")]
    assert len(identity) <= len(global_search_worker.SIZES) + 1
    assert set(states(storage)) <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}


def test_optuna_reads_the_study_like_any_other(storage):
    found = global_search_worker.run(storage)
    where = optuna.storages.get_storage(storage) if "://" in storage else studies.connect(storage)
    study = optuna.load_study(study_name="test", storage=where)
    assert study.best_params == found["best"]
    assert study.trials[0].params == {"x": 0.0}
    assert len(study.trials[0].intermediate_values) == len(global_search_worker.SIZES)
    last = max(study.trials[0].intermediate_values)
    assert study.trials[0].value == pytest.approx(study.trials[0].intermediate_values[last])
    assert study.trials[0].user_attrs["cross-entropy"] == study.trials[0].value


def test_scores_come_back_as_they_were_stored(storage):
    scores = {"a": as_stored(np.random.default_rng(0).normal(size=100)), "b": np.ones(1), "c": np.ones(0)}
    study = open_study(storage)
    study.add({"x": 0.25}, SPACE, 1)
    study.record(0, 3, scores, 0.5)
    (trial,) = open_study(storage).trials()
    assert trial.params == {"x": 0.25}
    assert (trial.number, trial.rung, trial.state, trial.owner) == (0, 1, TrialState.RUNNING, this_process())
    assert list(trial.blocks) == [3]
    for name, values in scores.items():
        np.testing.assert_array_equal(trial.blocks[3][name], values)


def owned_by(storage, owner, at):
    study = open_study(storage)
    study.add({"x": 0.5}, SPACE, 0)
    study._set(0, "bnpatch:owner", [owner, at])
    return study.trials()[0]


@pytest.mark.slow
def test_a_trial_is_left_to_whoever_lives(storage):
    host, pid, began = this_process().rsplit(":", 2)
    now = time.time()
    assert not owned_by(storage, this_process(), now).busy
    assert not owned_by(storage, "", now).busy
    assert owned_by(storage, f"{host}:{os.getppid()}:{studies._start(os.getppid())}", 0.0).busy
    assert not owned_by(storage, f"{host}:{os.getppid()}:another start", now).busy
    assert owned_by(storage, f"elsewhere:{pid}:{began}", now - studies.STALE_SECONDS / 2).busy
    assert not owned_by(storage, f"elsewhere:{pid}:{began}", now - studies.STALE_SECONDS * 2).busy
    gone = PROCESSES.Process(target=int)
    gone.start()
    gone.join()
    assert not owned_by(storage, f"{host}:{gone.pid}:", now).busy


def test_what_another_tool_left_running_fails(storage):
    study = open_study(storage)
    study.storage.create_new_trial(study._id)
    open_study(storage)
    assert [t.state for t in study.storage.get_all_trials(study._id)] == [TrialState.FAIL]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "c"}, 'another model ("a", now "c")'),
        ({"range": [0, 1]}, "another range (null, now [0, 1])"),
    ],
)
def test_another_question_needs_another_study(storage, changed, named):
    open_study(storage, fingerprint={"model": "a", "data": 1.5})
    open_study(storage, fingerprint={"data": 1.5, "model": "a"})
    with pytest.raises(BnpatchError) as error:
        open_study(storage, fingerprint={"model": "a", "data": 1.5, **changed})
    assert named in str(error.value)
    open_study(storage, "other", fingerprint=changed)


def test_another_direction_is_refused(storage):
    open_study(storage, direction="minimize")
    with pytest.raises(BnpatchError, match="has the direction minimize, not maximize"):
        open_study(storage, direction="maximize")


def test_a_study_of_another_tool_is_refused(storage):
    where = studies.connect(storage)
    study = optuna.create_study(study_name="bnpatch", storage=where)
    study.optimize(lambda trial: trial.suggest_float("y", 0, 1), n_trials=1)
    with pytest.raises(BnpatchError, match="has trials that bnpatch did not make"):
        open_study(storage)


@pytest.mark.parametrize("torn", [b'{"op_code":8,"worker_id":"', b'{"op', b"{"])
def test_a_torn_last_line_of_a_journal_is_cut_off(tmp_path, torn):
    path = tmp_path / "study.journal"
    study = open_study(str(path))
    study.add({"x": 0.5}, SPACE, 0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = open_study(str(path))
    assert [t.params for t in again.trials()] == [{"x": 0.5}]
    assert path.read_bytes().startswith(whole)
    again.add({"x": 0.6}, SPACE, 0)
    path.write_bytes(path.read_bytes() + torn)  # another process died while this one lives
    again.add({"x": 0.7}, SPACE, 0)
    assert [t.params["x"] for t in open_study(str(path)).trials()] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    "content", [b"once upon a time", b"once upon a time\n", b'{"op_code":0}\n{"op_co\n', b"\0" * 100]
)
def test_what_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.log"
    path.write_bytes(content)
    with pytest.raises(BnpatchError, match="is no record of an Optuna journal; choose another storage"):
        open_study(str(path))
    assert path.read_bytes() == content


def test_a_lock_that_a_killed_process_left_is_broken(tmp_path, monkeypatch):
    path = tmp_path / "study.journal"
    open_study(str(path))
    os.symlink(path, f"{path}.lock")
    monkeypatch.setattr("bnpatch.search.storages._GRACE_SECONDS", 1)
    with pytest.warns(UserWarning, match="grace_period"):
        open_study(str(path)).add({"x": 0.5}, SPACE, 0)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("sqlite:////nowhere/at/all/x.db", "unable to open database file"),
        ("/nowhere/at/all/x.journal", "no such file or directory"),
        ("journal:///nowhere/x", "no such file or directory"),
        ("study.txt", "names no storage"),
        ("nonsense://x", "nonsense"),
        ("sqlite:///{tmp}/notes.txt", "file is not a database"),
        ("{tmp}/folder.journal", "is a directory"),
    ],
)
def test_places_that_hold_no_study(tmp_path, place, problem):
    (tmp_path / "notes.txt").write_text("once upon a time " * 100)
    (tmp_path / "folder.journal").mkdir()
    with pytest.raises(BnpatchError) as error:
        open_study(place.format(tmp=tmp_path))
    assert problem in str(error.value)
    assert error.value.remedy
    assert "\n" not in str(error.value)


def test_a_database_that_cannot_be_written_is_refused_at_once(tmp_path):
    path = tmp_path / "study.db"
    open_study(f"sqlite:///{path}")
    with pytest.raises(BnpatchError, match="readonly database"):
        open_study(f"sqlite:///file:{path}?mode=ro&uri=true")
