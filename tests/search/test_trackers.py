"""Trackers hear of every trial: a real TensorBoard event file, and a real local MLflow store."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.search.trackers import tracker


@pytest.fixture
def search():
    """Run a global search of a small model, with callbacks, and return its result."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.randn(90, 1, 8, 8)
    y = model(x).argmax(1)  # right as it is

    def run(*callbacks):
        return bnpatch.tune_alpha(
            model, (x, y), granularity="global", recalibrate=False, holdout=0.5, callbacks=callbacks
        )

    return run


def test_callbacks_hear_of_every_trial_that_ended(search):
    heard = []
    result = search(
        lambda study, trial: heard.append((study.study_name, trial.number, trial.params["alpha"]))
    )
    by_number = sorted(heard, key=lambda trial: trial[1])  # trials end in another order than they begin
    assert [alpha for _, _, alpha in by_number] == [trial.params["weight"] for trial in result.trials]
    assert {name for name, _, _ in heard} == {"bnpatch"}
    assert len({number for _, number, _ in heard}) == len(heard) > 3


def test_tensorboard_has_an_event_file_per_trial(search, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = []
    search(tracker("tensorboard", "accuracy", tmp_path), lambda study, trial: heard.append(trial))
    written = {}
    for folder in (tmp_path / "bnpatch").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        values = events.Scalars("accuracy") if "accuracy" in events.Tags()["scalars"] else []
        written[folder.name] = [value.value for value in values]
    assert written == {str(t.number): [] if t.value is None else [pytest.approx(t.value)] for t in heard}


@pytest.mark.slow
def test_mlflow_has_a_run_per_trial(search, tmp_path, monkeypatch):
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(uri)
    heard = []
    search(tracker("mlflow", "accuracy", tmp_path), lambda study, trial: heard.append(trial))
    client = mlflow.MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "bnpatch"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(float(run.data.params["alpha"]) for run in runs) == sorted(t.params["alpha"] for t in heard)
    values = [run.data.metrics["accuracy"] for run in runs if "accuracy" in run.data.metrics]
    assert sorted(values) == sorted(t.value for t in heard if t.value is not None)


@pytest.mark.slow
def test_wandb_has_an_offline_run_per_trial(search, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    heard = []
    search(tracker("wandb", "accuracy", tmp_path), lambda study, trial: heard.append(trial))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == len(heard)


def test_what_is_not_there_is_said(monkeypatch):
    with pytest.raises(
        BnpatchError, match="there is no tracker 'neptune'; choose tensorboard, mlflow, wandb"
    ):
        tracker("neptune", "accuracy", Path())
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BnpatchError, match=r"mlflow is not installed .*pip install 'bnpatch\[mlflow\]'"):
        tracker("mlflow", "accuracy", Path())
