"""What remains of a search: the recipe, the patched model, the curves, the trials, and the report."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from bnpatch.core.io import write_text
from bnpatch.models.export import export_onnx
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.torch_model import TorchModel
from bnpatch.report.curves import plot_curves
from bnpatch.report.findings import Training
from bnpatch.report.page import report_page
from bnpatch.search.config import Trial
from bnpatch.search.result import TuneResult

_PARAMS = ("weight", "scale", "threshold")


def write_results(
    result: TuneResult,
    model: TorchModel | OnnxModel,
    folder: str | os.PathLike[str],
    training: Training | None = None,
) -> list[Path]:
    """Write all results of a search into a folder, each file atomically.

    Args:
        result: of :func:`bnpatch.tune_alpha`.
        model: the model that it was of; it is patched with the recipe.
        folder: made if it isn't there.
        training: what was done to the model before, for the report.

    Returns:
        The files: ``recipe.json``, ``patched.pt`` or ``patched.onnx``, ``alpha-curve.png`` where there was a
        global search for one alpha, ``trials.csv``, ``report.html``.

    Raises:
        BnpatchError: a file can't be written.
    """
    folder = Path(folder)
    recipe, curve, trials, report = (
        folder / name for name in ("recipe.json", "alpha-curve.png", "trials.csv", "report.html")
    )
    result.recipe.save(recipe)
    model.apply(result.recipe)
    pickled = False
    if isinstance(model, OnnxModel):
        patched = folder / "patched.onnx"
        export_onnx(model, patched)
    else:
        patched = folder / "patched.pt"
        pickled = not model.save(patched, result.recipe)
    curves = [curve] if plot_curves(result, curve) else []
    write_trials(result.trials, trials)
    write_text(report, report_page(result, model, recipe, patched, pickled, training))
    return [recipe, patched, *curves, trials, report]


def write_trials(trials: Sequence[Trial], path: str | os.PathLike[str]) -> None:
    """Write one line per trial: what was tried, how many examples saw it, and how they scored with it.

    The standard errors are those of the change from where the global search began, see
    :class:`~bnpatch.search.config.Trial`, which also says what the parameters are.
    """
    text = io.StringIO()
    names = list(trials[0].scores) if trials else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["rung", "trial", *_PARAMS, "examples", *(c for name in names for c in (name, f"{name} error"))]
    )
    for trial in trials:
        scores = (f"{part[name]:.8g}" for name in names for part in (trial.scores, trial.errors))
        params = (f"{trial.params[name]:.8g}" if name in trial.params else "" for name in _PARAMS)
        writer.writerow([trial.candidate, trial.number, *params, trial.examples, *scores])
    write_text(path, text.getvalue())
