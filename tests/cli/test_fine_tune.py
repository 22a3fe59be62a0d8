"""``bnpatch fine-tune`` as a user meets it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.recipe import Recipe
from bnpatch.data.dataset import split
from bnpatch.evaluation.metrics import CROSS_ENTROPY
from tests.command_line import one_line
from tests.report.html_page import Page

QUICK = ["--epochs", 1, "-b", 32, "--trials", 2, "-j", 0, "--min-scale", 1, "--hflip", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """Digits to train on and to validate with, as .npz files."""
    folder = tmp_path_factory.mktemp("fine-tune")
    (images, labels), (others, other_labels) = digits
    np.savez(folder / "train.npz", x=images[:96], y=labels[:96])
    np.savez(folder / "val.npz", x=others[:80], y=other_labels[:80])
    np.savez(folder / "few.npz", x=images[labels < 3][:64], y=labels[labels < 3][:64])
    return folder


def arguments(checkpoint, data, *more):
    files = ["--data", data / "train.npz", "--val", data / "val.npz"]
    return ["fine-tune", checkpoint, *files, *QUICK, *more]


def test_writes_what_it_promises(cli, checkpoint, data, tmp_path):
    code, out, err = cli(*arguments(checkpoint, data, "--epochs", 2, "--ema", 0.5))
    assert code == 0, err
    assert "Ghost Batch Norm of 16 examples" in err
    assert re.search(r"Batch/Group Norm: no; .*32", err)  # the guidance, with its reason
    assert re.search(r"epoch 2 +loss \d", err)
    assert re.search(r"checkpoint +fine-tuned.*\naccuracy +\d+\.\d\d% +\d+\.\d\d%", out)
    assert re.search(r"alpha = 0 +alpha tuned.*\naccuracy +\d+\.\d\d% +\d+\.\d\d%", out)
    folder = tmp_path / "bnpatch-out"
    # What example weighting does to a model trained for two epochs is another matter: the best candidate may
    # not be recommended.
    assert {p.name for p in folder.iterdir()} - {"candidate-recipe.json"} == {
        *("best.pt", "last.pt", "metrics.csv"),
        *("recipe.json", "patched.pt", "alpha-curve.png", "trials.csv", "report.html"),
    }
    assert len(list(csv.DictReader((folder / "metrics.csv").open()))) == 2
    recipe = Recipe.load(folder / "recipe.json")
    assert recipe.provenance["fine_tuning"]["spec"]["examples_per_group"] == 16
    assert recipe.provenance["fine_tuning"]["norm_decay"]["rate"] == 1e-4
    assert 0 < len(recipe.provenance["fine_tuning"]["norm_decay"]["sites"]) < len(recipe.norm_layers)
    patched = bnpatch.load(folder / "patched.pt", device="cpu")
    before = bnpatch.load(checkpoint, device="cpu")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(patched.module.parameters(), before.module.parameters(), strict=True)
    )


@pytest.mark.slow
def test_groups_of_validation_images(cli, checkpoint, data):
    """80 images in 10 groups, by the last digit of their number; those to train on have the same names."""
    code, out, err = cli(*arguments(checkpoint, data, "--group-by", r"(\d)$", "--json"))
    assert code == 0, err
    counts = json.loads(out)["data"]
    assert counts["tuning_groups"] + counts["held_out_groups"] == 10
    assert "10 groups, such as '0', both in the data to learn from" in " ".join(err.split())


@pytest.mark.slow
def test_batch_group_norm_by_options(cli, checkpoint, data, tmp_path):
    more = ["--channels-per-group", 8, "--norm-weight-decay", 1e-3, "--norm-weight-decay-sites", "all"]
    code, _, err = cli(*arguments(checkpoint, data, *more, "--decoupled", "--gamma-toward", 0))
    assert code == 0, err
    assert "Batch/Group Norm of 8 channels and all examples" in err
    assert "toward 0 and of shifts: 0.001, decoupled, at all norm layers" in err
    again = bnpatch.load(tmp_path / "bnpatch-out" / "patched.pt", device="cpu")
    assert {norm_layer.channels_per_group for norm_layer in again.inventory().norm_layers} == {8}


@pytest.mark.slow
def test_contributions_as_json(cli, checkpoint, data):
    code, out, err = cli(*arguments(checkpoint, data, "--json", "--seeds", 2))
    assert code == 0, err
    content = json.loads(out)
    rows = {row["name"]: row for row in content["contributions"]}
    report = Page(Path("bnpatch-out/report.html").read_text())
    assert "Fine-tuned, against the checkpoint" in report.headings
    assert "What each technique contributes" in report.headings
    assert "example weighing" in report.text
    assert report.text.count("Example weighing: ") == 1
    assert next(iter(rows)) == "none"
    assert list(rows)[-1] == "all"
    assert len(rows) == 6
    original = bnpatch.load(checkpoint, device="cpu")
    val = bnpatch.open_examples(str(data / "val.npz"), original)
    (_, held_out) = split(val.strata, 0.5, 0)
    as_it_came = bnpatch.evaluate(original, val, indices=held_out).mean(CROSS_ENTROPY)
    compared = content["fine_tuned"]["cross-entropy"]
    assert compared["before"]["value"] == pytest.approx(as_it_came, rel=1e-5)
    patched = bnpatch.load("bnpatch-out/patched.pt", device="cpu")
    now = bnpatch.evaluate(patched, val, indices=held_out).mean(CROSS_ENTROPY)
    assert compared["after"]["value"] == pytest.approx(now, rel=1e-5)
    assert set(rows["none"]["changes"]["accuracy"]) == {0.0}
    scores = [row["scores"]["cross-entropy"] for row in rows.values()]
    assert {len(s) for s in scores} == {2}
    assert len({s[0] for s in scores}) > 3  # they are different runs
    assert re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", rows["all"]["cells"][3])


@pytest.mark.slow
def test_techniques_by_search(cli, checkpoint, data):
    more = ["--choose", "search", "--choose-trials", 3, "--choose-epochs", 1]
    code, _, err = cli(*arguments(checkpoint, data, *more))
    assert code == 0, err
    tried = [line for line in err.splitlines() if line.startswith("tried")]
    assert len(tried) == 3
    assert "Batch Norm:" in tried[0]
    assert "Ghost Batch Norm of 16 examples, decay" in tried[1]
    assert "best of 3 runs of 1 epoch" in err


def test_a_new_head_for_other_classes(cli, checkpoint, data, tmp_path):
    files = ["--data", data / "few.npz", "--val", data / "few.npz"]
    code, _, err = cli("fine-tune", checkpoint, *files, *QUICK, "--new-head")
    assert code == 0, err
    assert bnpatch.load(tmp_path / "bnpatch-out" / "patched.pt", device="cpu").num_outputs() == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-b", 8, "--ghost-batch-size", 16], "a batch of 8 has no group of 16"),
        (["--ghost-batch-size", "some"], "'some' is neither auto nor a number"),
        (["--norm-weight-decay", "-1"], "'-1' is neither auto nor a number"),
        (["--norm-weight-decay-sites", "here"], "choose reachable or all"),
        (["--choose", "dice"], "choose guidance or search"),
        (["--metric", "top5"], "no metric 'top5' to train by"),
        (["-b", 512], "96 training examples, and a step takes 512"),
        (["--lr", "1e30", "--ghost-batch-size", 8], "the loss is no longer a number in epoch 1"),
        (["--data", "few.npz"], "has the class '3', of which the training data has no example"),
    ],
)
def test_bad_input_is_one_line(cli, checkpoint, data, more, message, monkeypatch):
    monkeypatch.chdir(data)
    code, out, err = cli(*arguments(checkpoint, data, *more, "-o", "out"))
    assert code == 2
    assert message in one_line(err)
    assert not out


@pytest.mark.slow
def test_a_damaged_resume_file_and_an_onnx_file(cli, checkpoint, data, exported, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.pt").write_bytes(b"PK damaged")
    code, _, err = cli(*arguments(checkpoint, data, "--resume", "-o", "out"))
    assert code == 2
    assert "out/last.pt is damaged" in one_line(err)
    code, _, err = cli(*arguments(exported, data))
    assert code == 2
    assert "an ONNX file, which can't be trained" in one_line(err)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(cli, checkpoint, data, tmp_path):
    """As ``accelerate launch`` starts them. Group Norm doesn't see how a batch is divided."""
    # accelerate starts several processes with its launcher for GPUs only; --device cpu keeps them off those.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "bnpatch_cli"]
    group_norm = ["--channels-per-group", 8, "--ghost-batch-size", 1, "--norm-weight-decay", 0.01]
    done = subprocess.run(
        [*command, *map(str, arguments(checkpoint, data, *group_norm, "-b", 16, "--json", "-o", "two"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == 1  # of the main process alone
    assert len(re.findall(r"^epoch 1 ", done.stderr, re.MULTILINE)) == 1
    assert len(re.findall(r"^model ", done.stderr, re.MULTILINE)) == 1
    assert cli(*arguments(checkpoint, data, *group_norm, "-b", 32, "-o", "one"))[0] == 0
    two, one = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("two", "one"))
    assert json.loads(two["run"])["processes"] == 2
    for name, value in one["model"].items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(two["model"][name], value, rtol=1e-3, atol=1e-4)
    (two_scored,), (one_scored,) = two["history"], one["history"]
    for name, tolerance in (("train_loss", 1e-3), ("cross_entropy", 1e-2)):  # as close as weights are
        assert two_scored[name] == pytest.approx(one_scored[name], rel=tolerance)
