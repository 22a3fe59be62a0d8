"""Experiment trackers that follow the trials of a search, through callbacks as Optuna defines them.

Optuna's own callbacks for these trackers are deprecated, so this module has one for each tracker.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnpatch.core.errors import BnpatchError, first_line

if TYPE_CHECKING:
    import optuna

    from bnpatch.search.config import Callback


def tracker(name: str, metric: str, folder: Path) -> "Callback":
    """Make a callback that writes each trial to a tracker.

        tensorboard = tracker("tensorboard", "accuracy", Path("runs"))
        bnpatch.tune_alpha(model, data, callbacks=[tensorboard])

    Each trial becomes a run, with its parameters and, if it was scored on all examples, its value.

    Args:
        name: tensorboard, mlflow or wandb.
        metric: name of the tuned metric, as the tracker shows it.
        folder: where TensorBoard's event files go. MLflow and Weights & Biases write where their own settings
            say (``MLFLOW_TRACKING_URI``, ``WANDB_DIR``, ``WANDB_MODE``, ...).

    Raises:
        BnpatchError: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise BnpatchError(f"there is no tracker {name!r}", f"choose {', '.join(TRACKERS)}")
    try:
        return TRACKERS[name](metric, folder)
    except ImportError as error:
        raise BnpatchError(
            f"{name} is not installed ({first_line(error)})", f"pip install 'bnpatch[{name}]'"
        ) from error


def _tensorboard(metric: str, folder: Path) -> "Callback":
    from torch.utils.tensorboard import SummaryWriter

    def write(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        with SummaryWriter(str(folder)) as writer:
            name = f"{study.study_name}/{trial.number}"
            writer.add_hparams(dict(trial.params), _values(metric, trial), run_name=name)

    return write


def _mlflow(metric: str, folder: Path) -> "Callback":
    import mlflow

    def write(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        experiment = mlflow.set_experiment(study.study_name)
        with mlflow.start_run(
            experiment_id=experiment.experiment_id, run_name=str(trial.number), nested=True
        ):
            mlflow.log_params(trial.params)
            mlflow.log_metrics(_values(metric, trial))
            mlflow.set_tag("state", trial.state.name)

    return write


def _wandb(metric: str, folder: Path) -> "Callback":
    import wandb

    def write(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        settings: dict[str, Any] = {
            "project": "bnpatch",
            "group": study.study_name,
            "name": str(trial.number),
        }
        with wandb.init(**settings, config=dict(trial.params), reinit="create_new") as run:
            run.summary.update(_values(metric, trial) | {"state": trial.state.name})

    return write


def _values(metric: str, trial: "optuna.trial.FrozenTrial") -> dict[str, float]:
    return {} if trial.value is None else {metric: trial.value}


#: By name, what makes a callback of the name of a metric and a folder.
TRACKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
