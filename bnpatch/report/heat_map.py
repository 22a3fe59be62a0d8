"""A heat map with a number in each cell, for light and dark pages."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bnpatch.evaluation.metrics import Values
from bnpatch.report.charts import palette, svg, tip_id

# How strong the colour of the largest value is: text on it must be readable in both schemes.
_STRONGEST = 0.55


def heat_map(values: Values, rows: Sequence[str], columns: Sequence[str], name: str, **words: Any) -> Markup:
    """Draw percentages as cells whose colour is the stronger, the larger the value.

    Args:
        values: percentages, of shape (rows, columns).
        rows: names of the rows.
        columns: names of the columns.
        name: see :func:`bnpatch.report.charts.curve_chart`.
        words: ``label`` describes the chart, ``axis`` the columns; with ``signed``, positive values are shown
            as bad and negative ones as good.
    """
    signed = bool(words.get("signed"))
    largest = float(abs(values).max()) or 1.0

    def draw(axes: Axes) -> None:
        colours = palette()
        for row, of_row in enumerate(rows):
            for column, of_column in enumerate(columns):
                value = float(values[row, column])
                colour = colours["data" if not signed else "bad" if value > 0 else "good"]
                text = f"{value:+.1f}" if signed else f"{value:.1f}"
                cell = Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0, facecolor=colour)
                cell.set(alpha=_STRONGEST * abs(value) / largest, gid=tip_id(f"{of_row} {of_column}: {text}"))
                axes.add_patch(cell)
                axes.text(column, row, text, color=colours["ink"], ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=words["axis"])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return svg(draw, name, str(words["label"]), 48 + 18 * len(rows))
