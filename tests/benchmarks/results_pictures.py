"""The three pictures of docs/results.md."""

import matplotlib
import numpy as np

from bnpatch.data.standard_corruptions import SEVERITIES, STANDARD
from tests.benchmarks.strength import STRENGTHS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"as it is": "0.45", "one alpha": "tab:orange", "candidates": "tab:blue"}
UNIT = {
    "contrast x": "contrast (factor)",
    "brightness x": "brightness (factor)",
    "noise": "noise (share of the range)",
}


def draw(results, folder):
    """Write the pictures as png files."""
    for name, figure in (
        ("corruptions", corruptions(results)),
        ("strength", strength(results)),
        ("weight", weight(results)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


def corruptions(results):
    """Errors by kind and severity, as it is, with one patch for all kinds, and with one for each."""
    panels = {
        "as_it_is": "as it is",
        "for_all": "one patch for all kinds",
        "for_kind": "a patch for each kind",
    }
    errors = {(row["kind"], row["severity"]): row for row in results["corruptions"]["rows"]}
    figure, grid = plt.subplots(1, 3, figsize=(11, 5))
    for axes, (key, title) in zip(grid, panels.items(), strict=True):
        values = np.array([[100 * errors[kind, s][key] for s in SEVERITIES] for kind in STANDARD])
        axes.imshow(values, cmap="Reds", vmin=0, vmax=100, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            ink = "white" if value > 65 else "black"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_title(f"{title}: mean {values.mean():.1f}", fontsize=10)
        axes.set_xticks(range(len(SEVERITIES)), SEVERITIES)
        names = [kind.replace("_", " ") for kind in STANDARD] if axes is grid[0] else []
        axes.set_yticks(range(len(names)), names, fontsize=9)
    grid[1].set_xlabel("severity")
    return figure


def strength(results):
    """Accuracy against the strength of a shift; a contrast of 1 is no shift, and begins every line."""
    rows = results["strength"]["rows"]
    clean = {row["search"]: row for row in rows if row["strength"] == 1}
    figure, grid = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for axes, (shift, strengths) in zip(grid, STRENGTHS.items(), strict=True):
        of = {(row["strength"], row["search"]): row for row in rows if row["shift"] == shift}
        shown = [strength for strength in strengths if strength != 1]
        for name, colour in COLOURS.items():
            search, key = ("candidates", "before") if name == "as it is" else (name, "after")
            values = [clean[search][key], *(of[strength, search][key] for strength in shown)]
            none = 0 if shift == "noise" else 1
            axes.plot([none, *shown], 100 * np.array(values), "o-", color=colour, label=name, markersize=4)
        axes.set_xlabel(UNIT[shift])
        if shift != "noise":
            axes.invert_xaxis()
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("top-1 (%)")
    grid[0].legend(frameon=False, fontsize=9)
    return figure


def weight(results):
    """What one alpha for all layers changes, against alpha."""
    units = {"accuracy": (100, "change of top-1 (points)"), "cross-entropy": (1, "change of cross-entropy")}
    figure, grid = plt.subplots(1, 2, figsize=(11, 3.2))
    for axes, (metric, (scale, label)) in zip(grid, units.items(), strict=True):
        for row in results["one_alpha"]["rows"]:
            if row["metric"] == metric:
                curve = scale * np.array(row["curve"])
                axes.plot(np.linspace(0, 1, len(curve)) ** 2, curve - curve[0], label=row["shift"])
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="alpha", ylabel=label)
        axes.grid(alpha=0.3)
    grid[0].legend(frameon=False, fontsize=9)
    return figure
