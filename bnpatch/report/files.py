"""The files that a search writes: the recipe, the patched model, the curves, the trials, and the report."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnpatch.core.io import temporary_folder, write_text, writing_to
from bnpatch.models.base import Model
from bnpatch.report.charts import write_curves
from bnpatch.report.html import report_page
from bnpatch.report.tables import TrainingResults
from bnpatch.report.text import UNFINISHED, Written
from bnpatch.search.config import Trial
from bnpatch.search.result import TuneResult

# What a search has found so far, while it lasts, and the trials so far. What an earlier search left in the
# folder stays whole beside them.
_RECIPE_SO_FAR, _TRIALS_SO_FAR = "recipe.partial.json", "trials.partial.csv"

# The best candidate, where held-out examples don't support it.
_CANDIDATE = "candidate-recipe.json"

_PARAMS = ("weight", "scale", "threshold")


class ResultsSoFar:
    """Writes what a search has found so far, so that an interrupted search keeps its best result.

    Args:
        model: the model that is tuned.
        folder: where ``recipe.partial.json`` and ``trials.partial.csv`` are written.
        metric: name of the tuned metric.
    """

    def __init__(self, model: Model[Any], folder: str | os.PathLike[str], metric: str) -> None:
        self._model, self._folder, self._metric = model, Path(folder), metric
        self._trials: list[Trial] = []

    def add(self, trial: Trial, is_best: bool) -> None:
        """Write a trial, and the weights that it tried if they are the best so far.

        Raises:
            BnpatchError: a file can't be written.
        """
        recipe = self._folder / _RECIPE_SO_FAR
        if not self._trials:
            recipe.unlink(missing_ok=True)  # an earlier run's
        self._trials.append(trial)
        write_trials(self._trials, self._folder / _TRIALS_SO_FAR)
        if is_best:
            provenance = {"metric": self._metric, "verdict": UNFINISHED}
            self._model.recipe(trial.state, provenance).save(recipe)


def write_results(
    result: TuneResult,
    model: Model[Any],
    folder: str | os.PathLike[str],
    training: TrainingResults | None = None,
) -> list[Path]:
    """Write all results of a search into a folder.

    They get their names together when all are there, so that a folder never has files of two searches: what
    an earlier one left stays until then. If one can't be written, the recipe is in ``recipe.partial.json``.

    Args:
        result: the result of :func:`bnpatch.tune_alpha`.
        model: the model that was tuned; it is patched with the recipe.
        folder: the folder; it is created if it doesn't exist.
        training: results of training the model before the search, for the report.

    Returns:
        The files: ``recipe.json`` and ``patched.pt`` or ``patched.onnx`` with what is recommended,
        ``candidate-recipe.json`` where the best candidate is not, ``alpha-curve.png`` where there was a
        global search for one alpha, ``trials.csv``, ``report.html``.

    Raises:
        BnpatchError: a file can't be written.
    """
    folder = Path(folder)
    recipe, curve, trials, report = (
        folder / name for name in ("recipe.json", "alpha-curve.png", "trials.csv", "report.html")
    )
    patched, candidate = folder / f"patched{model.suffix}", folder / _CANDIDATE
    result.recipe.save(folder / _RECIPE_SO_FAR)
    write_trials(result.trials, folder / _TRIALS_SO_FAR)
    model.apply(result.recipe)
    with writing_to(folder), temporary_folder(folder) as made:
        is_pickled = not model.save(made / patched.name, result.recipe, result.inputs)
        curves = [curve] if write_curves(result, made / curve.name) else []
        page = report_page(result, model, Written(recipe, patched, is_pickled), training)
        write_text(made / report.name, page)
        for path in made.iterdir():
            path.replace(folder / path.name)
        if result.candidate_recipe is not None:
            result.candidate_recipe.save(candidate)
        for path, is_written in ((curve, bool(curves)), (candidate, result.candidate_recipe is not None)):
            if not is_written:
                path.unlink(missing_ok=True)  # it would be an earlier search's
        (folder / _TRIALS_SO_FAR).replace(trials)
        (folder / _RECIPE_SO_FAR).replace(recipe)
    candidates = [] if result.candidate_recipe is None else [candidate]
    return [recipe, *candidates, patched, *curves, trials, report]


def write_trials(trials: Sequence[Trial], path: str | os.PathLike[str]) -> None:
    """Write one line per trial: its parameters, the number of examples scored, and their mean scores.

    The standard errors are those of the change from the starting point of the global search, see
    :class:`~bnpatch.search.config.Trial`, which also documents the parameters.
    """
    text = io.StringIO()
    names = list(trials[0].scores) if trials else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["candidate", "trial", *_PARAMS, "examples", *(c for name in names for c in (name, f"{name} error"))]
    )
    for trial in trials:
        scores = (f"{part[name]:.8g}" for name in names for part in (trial.scores, trial.errors))
        params = (f"{trial.params[name]:.8g}" if name in trial.params else "" for name in _PARAMS)
        writer.writerow([trial.candidate, trial.number, *params, trial.examples, *scores])
    write_text(path, text.getvalue())
