"""Processes that load training images: how many, and which process they come from."""

import os
import sys

import pytest

from bnpatch.core.errors import BnpatchWarning
from bnpatch.finetune import workers
from bnpatch.finetune.workers import affordable, loaded


class Parents:
    """A data set of the number of the process that started the one that reads."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getppid()


def test_there_are_as_many_processes_as_copies_are_affordable(monkeypatch):
    assert affordable(range(100), 3) == 3
    assert affordable(Parents(), 0) == 0
    monkeypatch.setattr(workers, "_COPIES", 2500)
    with pytest.warns(BnpatchWarning, match="loaded by 2 of 3 processes: each has a copy"):
        assert affordable(bytes(1000), 3) == 2


def test_what_cannot_be_sent_is_loaded_in_the_main_process(monkeypatch):
    class Local(Parents):
        pass

    with pytest.warns(BnpatchWarning, match="loaded by the main process: .* can't be sent"):
        assert affordable(Local(), 2) == 0
    # As in a script or a notebook:
    monkeypatch.setattr(Parents, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Parents", Parents, raising=False)
    with pytest.warns(BnpatchWarning, match="can't be sent"):
        assert affordable(Parents(), 2) == 0


@pytest.mark.slow
def test_no_process_is_forked_from_one_that_has_threads():
    def parents(num_workers):
        batches = loaded({"dataset": Parents(), "batch_size": 1}, num_workers)
        return {int(number) for batch in batches for number in batch}

    assert parents(0) == {os.getppid()}
    (server,) = parents(2)
    assert server not in (os.getpid(), os.getppid())
    assert len(os.listdir(f"/proc/{server}/task")) == 1
