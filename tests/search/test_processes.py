"""Two processes on the CPU find what one finds, and learn of each other's troubles."""

import json

import numpy as np
import pytest

import bnpatch
from tests.search import process_worker
from tests.two_processes import in_two_processes

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(foggy):
    return foggy[0][:240], foggy[1][:240]


@pytest.fixture(scope="module")
def together(checkpoint, data, tmp_path_factory):
    """What each of two processes says, started once: that takes longer than all of their searches."""
    folder = tmp_path_factory.mktemp("two")
    np.savez(folder / "data.npz", x=data[0], y=data[1])
    in_two_processes("tests.search.process_worker", checkpoint, folder / "data.npz", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_find_what_one_finds(together, checkpoint, data):
    alone = process_worker.settled(bnpatch.load(checkpoint), data)
    first, second = (said["settled"] for said in together)
    assert first == second
    assert first["held"] == alone["held"]
    assert first["trials"] == alone["trials"]
    assert first["after"] == pytest.approx(alone["after"], rel=1e-3)  # batches differ, so rounding does
    assert first["alphas"] == pytest.approx(alone["alphas"], abs=1e-6)
    assert first["lambdas"] == pytest.approx(alone["lambdas"], abs=1e-6)
    assert any(first["lambdas"].values())  # the second process was told the moments that these weigh


def test_failures_and_interruptions_reach_all_processes(together):
    first, second = together
    assert first["failed in the first"] == "OddError: at odds"
    assert first["failed in the second"] == "BnpatchError: process 1 of 2 failed: OddError: at odds"
    assert first["failed alone"] == "TypeError: 'NoneType' object is not callable"
    for name in ("failed in the first", "failed in the second", "failed alone"):
        assert second[name] == "BnpatchError: the first process failed; see what it says"
    for name in ("stopped in the first", "interrupted", "waited"):
        assert first[name] == second[name]
        assert first[name]["interrupted"] == (name != "waited")
        assert first[name]["own metrics"]
    assert first["interrupts"]
    assert second["interrupts"]
