"""Several processes: how they are started, and that each says where to look."""

import json
import os
from unittest import mock

import accelerate
import numpy as np
import pytest
import torch

from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.engine import new_accelerator
from bnpatch.search.distributed import Processes, start
from tests.remedies.world import followed
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def together(checkpoint, foggy, tmp_path_factory):
    """What each of two processes says."""
    folder = tmp_path_factory.mktemp("two")
    np.savez(folder / "data.npz", x=foggy[0][:120], y=foggy[1][:120])
    in_two_processes("tests.remedies.process_worker", checkpoint, folder / "data.npz", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def train():
    new_accelerator(FineTuneSettings(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("use", "on_gpu", "problem"),
    [
        (Processes, False, "the processes can't be connected: .*MASTER_ADDR"),
        (Processes, True, "accelerate sees 1 of 2 processes"),
        (train, False, "the processes can't be connected: .*MASTER_ADDR"),
    ],
)
def test_a_process_that_is_alone(together, monkeypatch, use, on_gpu, problem):
    """Something set WORLD_SIZE, and nothing started the other process."""

    def follow(_):
        assert [said["processes"] for said in together] == [2, 2]

    monkeypatch.setattr("torch.accelerator.is_available", lambda: on_gpu)
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", {})
    with mock.patch.dict(os.environ, WORLD_SIZE="2"):  # accelerate sets more
        followed(use, problem, "start them with torchrun or accelerate launch", follow)


def test_a_number_of_processes_that_is_none(monkeypatch):
    def follow(_):
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert start() is None
        monkeypatch.delenv("WORLD_SIZE")
        assert start() is None

    monkeypatch.setenv("WORLD_SIZE", "two")
    followed(start, "the environment variable WORLD_SIZE is 'two'", "set a number, or unset it", follow)


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("no number", "is not a finite number", "look at the metric"),
        ("two shapes", "returned shape", "it must return a tensor with one number per example"),
    ],
)
def test_a_failure_in_a_process(together, name, problem, remedy):
    first, second = (said[name] for said in together)
    assert problem in first[0]
    assert remedy in first[1]
    assert second == ["the first process failed", "see what it says"]
    first, second = (said["right"] for said in together)  # another metric, as the first says
    assert first == second
    assert isinstance(first, float)
