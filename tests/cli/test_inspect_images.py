"""What inspect, evaluate and tune-alpha say of images that are preprocessed otherwise than in training."""

import json
from pathlib import Path

import pytest

WRONG = ["--mean", "0.449", "--std", "0.226"]
SAYS = "fit the first norm layer better with another preprocessing: mean 0.5 and std 0.5"


@pytest.fixture(scope="module")
def plain(clean, tmp_path_factory):
    """Digits as they are, in a folder per class."""
    from bnpatch_cli.demo import write_folders

    path = tmp_path_factory.mktemp("plain")
    write_folders(clean[0][:80], clean[1][:80], path)
    return path


def test_inspect_says_which_preprocessing_fits(cli, checkpoint, plain):
    code, out, _ = cli("inspect", checkpoint, "--data", plain, *WRONG)
    assert code == 0
    assert SAYS in out
    assert "outlook: settle the preprocessing first" in out
    code, out, _ = cli("inspect", checkpoint, "--data", plain)
    assert "another preprocessing" not in out
    assert "expect little of a patch" in out


def test_inspect_as_json(cli, checkpoint, exported, plain):
    for model in (checkpoint, exported):
        content = json.loads(cli("inspect", model, "--data", plain, *WRONG, "--json")[1])
        assert content["findings"] == []
        assert content["checkup"]["better"]["name"] == "mean 0.5 and std 0.5"
        assert content["checkup"]["is_sure"] is True
    assert json.loads(cli("inspect", checkpoint, "--json")[1])["checkup"] is None


def test_evaluate_warns(cli, checkpoint, plain, folder):
    assert SAYS in cli("evaluate", checkpoint, "--data", plain, *WRONG)[2]
    for data in (plain, folder):  # fog is no preprocessing
        assert "another preprocessing" not in cli("evaluate", checkpoint, "--data", data)[2]


@pytest.mark.slow
def test_tune_alpha_warns_and_notes_it(cli, checkpoint, plain):
    code, out, err = cli("tune-alpha", checkpoint, "--data", plain, *WRONG, "--granularity", "global")
    assert code == 0, err
    assert f"warning: the images {SAYS}" in err
    assert SAYS not in out  # it is said once
    assert SAYS in Path("bnpatch-out", "report.html").read_text()
