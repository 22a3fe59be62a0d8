"""Temporary files of runs that were killed, and folders that belong to a run."""

import os
import subprocess
import sys
import time

import pytest

from bnpatch.core import leftovers
from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import claimed, temporary_folder, write_text
from bnpatch.core.leftovers import is_alive, own_start, remove_leftovers
from tests.other_processes import names, start_of, wait_for


@pytest.fixture(scope="module")
def dead():
    """The id of a process that is over."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def aged(path, seconds):
    os.utime(path, (time.time() - seconds, time.time() - seconds))
    return path


def test_temporary_files_of_dead_processes_are_removed(tmp_path, living, dead):
    day = 24 * 3600
    over = [tmp_path / f"{start_of(dead)}a.pt", tmp_path / f"{start_of(dead)}folder"]
    stay = [
        tmp_path / f"{start_of(living)}a.pt",
        tmp_path / f"{own_start()}a.pt",
        tmp_path / ".bnpatch-notes",
    ]
    elsewhere = [tmp_path / f"{start_of(dead, '0' * 8)}new", tmp_path / f"{start_of(living, '0' * 8)}old"]
    over[1].mkdir()
    for path in (over[0], over[1] / "b.onnx", *stay, *elsewhere):
        path.touch()
    for path in stay:
        aged(path, 9 * day)
    aged(elsewhere[1], 2 * day)
    write_text(tmp_path / "new.txt", "")
    assert names(tmp_path) == {path.name for path in (*stay, elsewhere[0])} | {"new.txt"}


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path, dead):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    (tmp_path / f"{start_of(dead)}link").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"mine"}
    assert names(tmp_path / "mine") == {"a.txt"}


def test_a_process_that_nobody_buried_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(process.pid)
    process.kill()
    wait_for(lambda: not is_alive(process.pid))
    process.communicate()


KILLED = """
import os, signal, sys
from bnpatch.core.io import atomic_path, temporary_folder
with temporary_folder(sys.argv[1]) as folder, atomic_path(sys.argv[1] + "/a.txt"):
    (folder / "b.txt").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 2
    with temporary_folder(tmp_path) as folder:
        assert names(tmp_path) == {folder.name}
    assert not names(tmp_path)


def test_a_folder_belongs_to_one_run(tmp_path, living, dead):
    mark = tmp_path / f"{start_of(dead)}{leftovers.RUNNING}"
    mark.touch()
    with claimed(tmp_path):
        assert f"{own_start()}{leftovers.RUNNING}" in names(tmp_path)
    mark.rename(tmp_path / f"{start_of(living)}{leftovers.RUNNING}")
    with pytest.raises(BnpatchError, match=f"another run of bnpatch .process {living}. writes to .*; wait"):
        claimed(tmp_path).__enter__()
    assert len(names(tmp_path)) == 1  # that of the other run


def test_a_run_on_another_machine_is_over_when_it_shows_no_life(tmp_path, living):
    mark = tmp_path / f"{start_of(living, '0' * 8)}{leftovers.RUNNING}"
    mark.touch()
    with pytest.raises(BnpatchError, match="of another machine"):
        claimed(tmp_path).__enter__()
    aged(mark, 600)
    with claimed(tmp_path):
        pass


def test_a_run_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("bnpatch.core.io._TOUCH_SECONDS", 0.01)
    with claimed(tmp_path):
        (mark,) = tmp_path.iterdir()
        aged(mark, 600)
        wait_for(lambda: time.time() - mark.stat().st_mtime < 300)
    assert not names(tmp_path)
