import json
import multiprocessing
import random
import sqlite3
import time
import warnings
from contextlib import suppress

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from bnpatch.core.errors import BnpatchWarning
from bnpatch.search.storages import Storage
from bnpatch.search.studies import as_stored, open_study
from tests.search import global_search_worker

SPACE = {"x": (0.0, 1.0)}


@pytest.fixture(scope="module")
def uninterrupted():
    return json.loads(json.dumps(global_search_worker.run(None)))


# Copies of one process that has imported everything: what is tested is how they end, not how they begin.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.search.global_search_worker"])


def start(url, log, result, *peers):
    process = PROCESSES.Process(target=global_search_worker.main, args=(url, log, result, *peers))
    process.start()
    return process


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def finish(process, log):
    process.join(120)
    said = log.with_suffix(".stderr").read_text()
    assert process.exitcode == 0, said
    assert said == ""  # Optuna's messages don't help the user


def optuna_trials(url):
    return optuna.load_study(study_name="test", storage=url).trials


def kill_after(url, log, result, count, delay=0.0):
    process = start(url, log, result)
    while len(lines(log)) < count and process.is_alive():
        time.sleep(0.005)
    time.sleep(delay)  # anywhere in the block, or in what is written after it
    assert process.is_alive(), "it was over before it was killed"
    process.kill()
    process.join()


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_as_if_it_had_not_been(url, tmp_path, uninterrupted):
    log, result = tmp_path / "log", tmp_path / "result"
    chance = random.Random(0)
    for kill_at in (chance.randint(1, 12), chance.randint(13, 24)):
        kill_after(url, log, result, kill_at, chance.uniform(0, 0.01))
        time.sleep(global_search_worker.GRACE_SECONDS + 2)  # databases round times to seconds
    finish(start(url, log, result), log)
    assert json.loads(result.read_text()) == uninterrupted
    trials = optuna_trials(url)
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert any("failed_trial" in t.system_attrs for t in trials)
    # Only the block that was being scored at each kill is scored again.
    assert 0 <= len(lines(log)) - len(set(lines(log))) <= 2


@pytest.mark.slow
def test_a_killed_search_is_continued_at_once_and_waits_only_for_trials_that_it_needs(url, tmp_path):
    log, result = tmp_path / "log", tmp_path / "result"
    kill_after(url, log, result, 14)  # the baseline is done; a trial of the first round runs
    started = time.monotonic()
    finish(start(url, log, result), log)
    assert time.monotonic() - started < global_search_worker.GRACE_SECONDS + 30
    found = json.loads(result.read_text())
    assert found["best"]["x"] == pytest.approx(0.4, abs=0.05)
    assert all(t.state.is_finished() for t in optuna_trials(url))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A database with the study of a search, and what the search found."""
    url = f"sqlite:///{tmp_path_factory.mktemp('searched')}/study.db"
    return url, global_search_worker.run(url)


def test_running_it_again_scores_nothing(searched, tmp_path, uninterrupted):
    url, found = searched
    assert found == uninterrupted
    log = tmp_path / "log"
    assert global_search_worker.run(url, log) == uninterrupted
    assert lines(log) == []


@pytest.mark.slow
def test_two_processes_share_a_study(url, tmp_path):
    logs, results = [tmp_path / "log1", tmp_path / "log2"], [tmp_path / "r1", tmp_path / "r2"]
    processes = [start(url, logs[i], results[i], logs[1 - i]) for i in (0, 1)]
    for process, log in zip(processes, logs, strict=True):
        finish(process, log)
    found = [json.loads(path.read_text()) for path in results]
    assert found[0]["best"] == found[1]["best"]
    assert found[0]["best"]["x"] == pytest.approx(0.4, abs=0.05)
    assert found[0]["passes"] <= 3.5  # both may begin what the budget has room for only once
    assert all(map(lines, logs))  # both worked
    baseline = [line for line in lines(logs[0]) + lines(logs[1]) if line.startswith("0.0 ")]
    assert len(baseline) <= len(global_search_worker.SIZES) + 1
    assert all(t.state.is_finished() for t in optuna_trials(url))


def test_optuna_reads_the_study_like_any_other(searched):
    url, found = searched
    study = optuna.load_study(study_name="test", storage=url)
    best = study.best_trial
    assert best.params == found["best"]
    assert best.value == found["best value"]
    assert study.trials[0].params == {"x": 0.0}
    for trial in study.trials:
        assert trial.value == trial.intermediate_values[trial.last_step]
        assert trial.user_attrs["twice"] == pytest.approx(2 * trial.value)
        assert set(trial.user_attrs) == {"bnpatch:round", "bnpatch:block scores", "twice"}
    assert list(study.trials[0].intermediate_values) == np.cumsum(global_search_worker.SIZES).tolist()
    assert {t.state for t in study.trials[1:]} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_scores_come_back_as_they_were_stored(url):
    scores = {"a": as_stored(np.random.default_rng(0).normal(size=100)), "b": np.ones(1), "c": np.ones(0)}
    study = open_study(Storage(url))
    study.begin({"x": 0.25}, SPACE, 1)
    study.take_over()
    (trial,) = study.trials()
    trial.blocks[3] = scores
    study.record(trial, 100, 0.5)
    (trial,) = study.trials()
    assert trial.is_own
    (trial,) = open_study(Storage(url)).trials()
    assert (trial.number, trial.round, trial.state) == (0, 1, TrialState.RUNNING)
    assert not trial.is_own
    assert trial.params == {"x": 0.25}
    assert list(trial.blocks) == [3]
    for name, values in scores.items():
        np.testing.assert_array_equal(trial.blocks[3][name], values)


@pytest.fixture
def short(url):
    return Storage(url, heartbeat_seconds=1, grace_seconds=2)


@pytest.mark.slow
def test_a_trial_is_its_processs_while_that_lives_however_long_it_takes(url, short):
    study, other = open_study(short), open_study(Storage(url, grace_seconds=2))
    with study.at_work():
        study.begin({"x": 0.5}, SPACE)
        study.take_over()
        time.sleep(5)
        other.take_over()
        assert [t.is_own for t in other.trials()] == [False]
        assert [t.is_own for t in study.trials()] == [True]


@pytest.mark.slow
def test_whoever_was_taken_for_dead_writes_to_nobodys_trial(url, short):
    study, other = open_study(short), open_study(Storage(url, grace_seconds=2))
    study.begin({"x": 0.5}, SPACE)
    study.take_over()  # and no heartbeat follows, as of a process that is suspended
    (before,) = study.trials()
    before.blocks[0] = {"a": np.ones(1)}
    study.record(before, 1, 0.5)
    time.sleep(4)
    other.take_over()
    (taken,) = other.trials()
    assert taken.is_own
    assert taken.number == before.number
    assert list(taken.blocks) == [0]
    assert [t.is_own for t in study.trials()] == [False]
    study.record(before, 2, 0.6)
    study.end(before, TrialState.COMPLETE, 0.6, {})
    assert other.trials() == [taken]
    assert [t.state for t in study.optuna_study.trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_who_ends_hands_its_trials_over_at_once(url):
    study = open_study(Storage(url))
    with suppress(KeyboardInterrupt), study.at_work():
        study.begin({"x": 0.5}, SPACE, 1)
        study.take_over()
        (trial,) = study.trials()
        trial.blocks[0] = {"a": np.ones(1)}
        study.record(trial, 8, 0.25)
        raise KeyboardInterrupt
    other = open_study(Storage(url))
    other.take_over()
    (trial,) = other.trials()
    assert trial.is_own
    assert (trial.number, trial.round, list(trial.blocks)) == (0, 1, [0])
    assert other.optuna_study.trials[1].intermediate_values == {8: 0.25}


def test_a_trial_has_a_heartbeat_before_it_runs(url, monkeypatch):
    """Killed in between, a process would otherwise leave a trial that never counts as stale."""
    storage = Storage(url)
    study = open_study(storage)
    study.begin({"x": 0.5}, SPACE)
    monkeypatch.setattr(storage.database, "set_trial_state_values", stop)
    with pytest.raises(KeyboardInterrupt):
        study.take_over()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        assert database.execute("select count(*) from trial_heartbeats").fetchone() == (1,)
    study = open_study(Storage(url))
    study.take_over()
    assert [t.is_own for t in study.trials()] == [True]


def stop(*args):
    raise KeyboardInterrupt


def test_what_people_enqueue_or_run_themselves_is_left_alone(url):
    study = open_study(Storage(url))
    study.begin({"x": 0.5}, SPACE)
    study.optuna_study.enqueue_trial({"x": 0.1})
    study.optuna_study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    study.take_over()
    assert [t.params for t in study.trials()] == [{"x": 0.5}]


def full(storage):
    """Let the disk be full: the file may not grow."""
    _each_connection(storage, "pragma max_page_count = 1")


def readonly(storage):
    _each_connection(storage, "pragma query_only = on")


def locked(storage):
    lock = sqlite3.connect(storage.url.removeprefix("sqlite:///"))
    lock.execute("begin exclusive")
    LOCKS.append(lock)


LOCKS = []


def _each_connection(storage, statement):
    storage.database.engine.dispose()  # those that are open
    sqlalchemy.event.listen(storage.database.engine, "connect", lambda c, _: c.execute(statement))


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (full, "database or disk is full"),
        pytest.param(readonly, "attempt to write a readonly database", marks=pytest.mark.slow),
        pytest.param(locked, "database is locked", marks=pytest.mark.slow),
    ],
)
def test_a_database_that_fails_in_mid_search_is_said_once_and_the_search_goes_on(
    url, tmp_path, trouble, said, uninterrupted
):
    storage, log = Storage(url, lock_seconds=0.01), tmp_path / "log"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BnpatchWarning)
        found = global_search_worker.run(
            storage, log, on_line=lambda count: trouble(storage) if count == 15 else None
        )
        again = open_study(storage, "another candidate's")
    assert found == uninterrupted
    assert len(lines(log)) - len(set(lines(log))) <= 1  # what was found so far is kept
    said_to_user = [str(w.message) for w in caught if issubclass(w.category, BnpatchWarning)]
    assert said_to_user == [f"cannot use {url} for a study: {said}; the search goes on in memory"]
    again.begin({"x": 0.5}, SPACE)
    assert len(again.trials()) == 1


def test_a_database_that_is_gone_when_the_next_study_is_opened_costs_nothing(url):
    storage = Storage(url)
    open_study(storage)
    readonly(storage)
    with pytest.warns(BnpatchWarning, match="the search goes on in memory"):
        study = open_study(storage, "another candidate's")
    study.begin({"x": 0.5}, SPACE)
    assert len(study.trials()) == 1
