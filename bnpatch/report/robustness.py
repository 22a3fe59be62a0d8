"""The files of a robustness benchmark: a page with heat maps, and a table of all errors."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnpatch.core.io import temporary_folder, write_text, writing_to
from bnpatch.core.text import counted
from bnpatch.data.standard_corruptions import STANDARD
from bnpatch.evaluation.metrics import Comparison, Estimate, Outcome
from bnpatch.evaluation.robustness import ERROR, Robustness
from bnpatch.evaluation.robustness_scores import CLEAN, Condition
from bnpatch.report import text
from bnpatch.report.heat_map import heat_map
from bnpatch.report.html import Figure, template
from bnpatch.report.tables import Cell, Row, Table, compared

_NAMED_IMAGES = 5


def write_robustness(
    result: Robustness, folder: Path, origin: Mapping[str, str], again: str, notes: list[str]
) -> list[Path]:
    """Write ``robustness.html`` and ``robustness.csv`` into a folder, and return their paths.

    Args:
        result: the result of :func:`bnpatch.robustness`.
        folder: the folder; it is created if it doesn't exist.
        origin: what the result depends on, by name.
        again: arguments of the command that does it again.
        notes: what a person should know.

    Raises:
        BnpatchError: a file can't be written.
    """
    contents = {
        "robustness.html": robustness_page(result, origin, again, notes),
        "robustness.csv": robustness_csv(result),
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as made:
            for name, content in contents.items():
                write_text(made / name, content)
            for name in contents:
                (made / name).replace(folder / name)
    return [folder / name for name in contents]


def robustness_page(result: Robustness, origin: Mapping[str, str], again: str, notes: list[str]) -> str:
    """Make the report as self-contained HTML; see :func:`write_robustness` for the arguments."""
    patched = result.after is not None
    mean = result.mean_error()
    if result.skipped:
        named = list(result.skipped)[:_NAMED_IMAGES]
        rest = len(result.skipped) - len(named)
        more = f" and {counted(rest, 'other')}" if rest else ""
        notes = [*notes, f"Left out, because they can't be read: {', '.join(named)}{more}."]
    return template("robustness.html.j2").render(
        result=result,
        name=result.model,
        command="robustness",
        sentence=robustness_sentence(result),
        verdict=mean.verdict if patched and mean.outcome is not Outcome.NO_CHANGE else "",
        num_groups=None if result.groups is None else len(np.unique(result.groups)),
        summary=_summary(result),
        notes=notes,
        maps=_maps(result),
        by_kind=_by_kind(result),
        all=_all_conditions(result),
        origin=Table("Of this result.", ["what", "value"], list(origin.items()), "words"),
        again=again,
    )


def robustness_sentence(result: Robustness) -> str:
    """Describe the result in one sentence."""
    mean, clean = result.mean_error(), result.comparison()
    if result.after is None:
        return (
            f"Under corruption {ERROR.format(mean.before.value)} of the answers are wrong, "
            f"{ERROR.format(clean.before.value)} on the images as they are."
        )
    values = f"{ERROR.format(mean.before.value)} → {ERROR.format(mean.after.value)}"
    by = f"{text.points(ERROR, mean.change.value)}, {text.interval(ERROR, mean.change)}"
    opening = {
        Outcome.GAIN: "Under corruption the patched model makes fewer errors",
        Outcome.LOSS: "Under corruption the patched model makes more errors",
        Outcome.NO_CHANGE: "Under corruption the patch changes the errors by no more than chance",
    }[mean.outcome]
    on_clean = f"{text.points(ERROR, clean.change.value)}, {text.interval(ERROR, clean.change)}"
    return f"{opening}: {values} ({by}). On the images as they are the error changes by {on_clean}."


def robustness_csv(result: Robustness) -> str:
    """Return one line per kind and severity, the images as they are first; errors are parts of 1."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    columns = ["kind", "severity", "examples", "error"]
    patched = result.after is not None
    writer.writerow([*columns, *(["patched error", "change", "low", "high"] if patched else ["low", "high"])])
    for condition in result.before:
        c = result.comparison(condition)
        values = (
            (c.before.value, c.after.value, c.change.value, c.change.low, c.change.high)
            if patched
            else (c.before.value, c.before.low, c.before.high)
        )
        writer.writerow([*condition, result.num_examples, *(f"{value:.8g}" for value in values)])
    return content.getvalue()


def robustness_json(result: Robustness) -> dict[str, Any]:
    """Return the result as plain JSON values."""

    def plain(comparison: Comparison) -> dict[str, Any]:
        return comparison.to_json() if result.after is not None else {"before": comparison.before.to_json()}

    mean = result.mean_corruption_error()
    return {
        "model": result.model,
        "examples": result.num_examples,
        "skipped": len(result.skipped),
        "clean": plain(result.comparison()),
        "mean_error": plain(result.mean_error()),
        "mean_corruption_error": None if mean is None else mean.to_json(),
        "kinds": {
            kind: {
                **plain(result.of_kind(kind)),
                "corruption_error": result.corruption_error(kind),
                "severities": {str(s): plain(result.comparison((kind, s))) for s in result.severities},
            }
            for kind in result.kinds
        },
    }


def _summary(result: Robustness) -> Table:
    rows = [
        _row("images as they are", result.comparison(), result),
        _row("under corruption, mean", result.mean_error(), result),
    ]
    if (mean := result.mean_corruption_error()) is not None:
        rows.append(["mean corruption error", "100%", _percent(mean), ""])
    return Table("Errors.", _columns(result, ""), rows)


def _by_kind(result: Robustness) -> Table:
    rows = []
    for kind in result.kinds:
        row = _row(Cell(_words(kind), [STANDARD[kind]]), result.of_kind(kind), result)
        if result.after is not None:
            error = result.corruption_error(kind)
            row = [*row, "none as it is" if error is None else f"{100 * error:.1f}%"]
        rows.append(row)
    more = ["corruption error"] if result.after is not None else []
    return Table("Errors by kind.", [*_columns(result, "kind"), *more], rows)


def _all_conditions(result: Robustness) -> Table:
    rows = [
        _row(f"{_words(kind)} {severity}", result.comparison((kind, severity)), result)
        for kind in result.kinds
        for severity in result.severities
    ]
    return Table("Errors by kind and severity.", _columns(result, "kind, severity"), rows)


def _columns(result: Robustness, first: str) -> list[str]:
    return [first, "as it is", *([] if result.after is None else ["patched", "change"])]


def _row(name: Cell | str, comparison: Comparison, result: Robustness) -> Row:
    _, *cells = compared(comparison)
    return [name, *cells] if result.after is not None else [name, cells[0]]


def _maps(result: Robustness) -> list[Figure]:
    """Heat maps of the errors as they are, and of their change."""

    def errors(condition: Condition) -> tuple[float, float]:
        compared = result.comparison(condition)
        return compared.before.value, compared.change.value

    values = 100 * np.array([[errors((k, s)) for s in result.severities] for k in result.kinds])
    rows, columns = list(map(_words, result.kinds)), list(map(str, result.severities))
    clean_error, clean_change = (100 * value for value in errors(CLEAN))
    label = f"Errors of {len(rows)} kinds of corruption by severity"
    axis = f"severity; as they are: {clean_error:.1f}%"
    maps = [
        Figure(
            "Error (%), as it is", heat_map(values[..., 0], rows, columns, "before", label=label, axis=axis)
        )
    ]
    if result.after is not None:
        label = f"Changes of the error of {len(rows)} kinds of corruption by severity"
        axis = f"severity; as they are: {clean_change:+.1f}"
        chart = heat_map(values[..., 1], rows, columns, "change", label=label, axis=axis, signed=True)
        maps.append(Figure("Change of the error by the patch (points)", chart))
    return maps


def _percent(estimate: Estimate) -> Cell:
    kind = "gain" if estimate.high < 1 else "loss" if estimate.low > 1 else ""
    return Cell(
        f"{100 * estimate.value:.1f}%", [f"{100 * estimate.low:.1f}% to {100 * estimate.high:.1f}%"], kind
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ").replace("jpeg", "JPEG")
