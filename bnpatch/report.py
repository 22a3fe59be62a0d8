"""What remains of a search: the recipe, the curve, the trials, and the patched checkpoint."""

import csv
import io
import os
from pathlib import Path

from bnpatch.export import export_onnx
from bnpatch.files import atomic_path, write_text
from bnpatch.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.model import TorchModel
from bnpatch.onnx_model import OnnxModel
from bnpatch.search import Trial, TuneResult


def write_results(
    result: TuneResult, model: TorchModel | OnnxModel, folder: str | os.PathLike[str]
) -> list[Path]:
    """Write all results of a search into a folder, each file atomically.

    Args:
        result: of :func:`bnpatch.tune_alpha`.
        model: the model that it was of; it is patched with the recipe.
        folder: made if it isn't there.

    Returns:
        The files: ``recipe.json``, ``patched.pt`` or ``patched.onnx``, ``alpha-curve.png``, ``trials.csv``.

    Raises:
        BnpatchError: a file can't be written.
    """
    folder = Path(folder)
    names = (
        "recipe.json",
        f"patched{'.onnx' if isinstance(model, OnnxModel) else '.pt'}",
        "alpha-curve.png",
        "trials.csv",
    )
    recipe, patched, curve, trials = (folder / name for name in names)
    result.recipe.save(recipe)
    model.apply(result.recipe)
    if isinstance(model, OnnxModel):
        export_onnx(model, patched)
    else:
        model.save(patched, result.recipe)
    plot_curve(result, curve)
    write_trials(result.trials, trials)
    return [recipe, patched, curve, trials]


def write_trials(trials: list[Trial], path: str | os.PathLike[str]) -> None:
    """Write one line per trial: number, alpha, the mean of each metric, seconds."""
    text = io.StringIO()
    names = list(trials[0].scores) if trials else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "alpha", *names, "seconds"])
    for trial in trials:
        scores = (f"{trial.scores[name]:.8g}" for name in names)
        writer.writerow([trial.number, f"{trial.alpha:.8g}", *scores, f"{trial.seconds:.3f}"])
    write_text(path, text.getvalue())


def plot_curve(result: TuneResult, path: str | os.PathLike[str]) -> None:
    """Draw accuracy and cross-entropy of the tuning examples against alpha (as Fig. 1 of the paper).

    The axis of alpha is the square root's, since useful weights are small.
    """
    import numpy as np
    from matplotlib.figure import Figure

    metrics = [ACCURACY, CROSS_ENTROPY]
    if result.metric.name not in {m.name for m in metrics}:
        metrics.insert(0, result.metric)
    trials = sorted(result.trials, key=lambda trial: trial.alpha)
    alphas = [trial.alpha for trial in trials]
    figure = Figure(figsize=(6.4, 2.1 + 1.9 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), 1, sharex=True)
    for axis, metric in zip(axes, metrics, strict=True):
        values = np.array([trial.scores[metric.name] for trial in trials]) * (100 if metric.is_rate else 1)
        axis.plot(alphas, values, "-", color="#9aa5b1", linewidth=1.2, zorder=1)
        axis.plot(alphas, values, "o", color="#3d4f63", markersize=3.5, zorder=2)
        for alpha, name, style in ((0.0, "identity", "s"), (result.alpha, "chosen", "D")):
            value = values[alphas.index(alpha)]
            shown = f"{value:.2f}%" if metric.is_rate else f"{value:.4f}"
            colour = "#c0392b" if name == "identity" else "#1f7a4d"
            label = f"{name}, alpha = {alpha:.3g}: {shown}"
            axis.plot(alpha, value, style, color=colour, markersize=8, label=label, zorder=3, clip_on=False)
        axis.set_ylabel(f"{metric.name}{' (%)' if metric.is_rate else ''}")
        axis.grid(alpha=0.25)
        axis.legend(loc="best", frameon=False, fontsize=9)
    axes[-1].set_xscale("function", functions=(lambda a: np.sqrt(np.maximum(a, 0)), np.square))
    axes[-1].set_xticks([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0], minor=False)
    axes[-1].set_xlim(0, 1)
    axes[-1].set_xlabel("alpha, the weight of the example")
    axes[0].set_title(f"{result.num_tuning} tuning examples; {result.metric.name} was tuned", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
