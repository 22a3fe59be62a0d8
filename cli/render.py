"""Tables and progress for people."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnpatch.core.text import counted, visible
from bnpatch.evaluation.metrics import Comparison, Estimate, Metric
from bnpatch.report.text import OF_CANDIDATES
from bnpatch.search.held_out import HeldOutEvaluation
from bnpatch.search.result import TuneResult


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows; the first column and reasons are left-aligned, numbers are right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(
            visible(column), justify="left" if index == 0 or column == "why" else "right", overflow="fold"
        )
    for row in rows:
        made.add_row(*(visible(str(cell)) for cell in row))
    # Output that goes to a pipe must not be cut to the width of a terminal.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)
    console.print(made)


def comparison_table(
    comparisons: Sequence[Comparison],
    examples: str,
    *,
    before: str = "as it is",
    after: str = "patched",
) -> None:
    """Print before, after, and the paired change with its interval, of what ``examples`` says."""
    table(
        [examples, before, after, "change", "95% interval", ""],
        [
            [
                c.metric.name,
                c.metric.format(c.before.value),
                c.metric.format(c.after.value),
                c.metric.format(c.change.value, signed=True),
                interval(c.metric, c.change, signed=True),
                c.verdict,
            ]
            for c in comparisons
        ],
    )


def verdict_table(held_out: HeldOutEvaluation, comparisons: Sequence[Comparison]) -> None:
    """Print held-out examples before and after: the comparisons to show, and changed answers."""
    comparison_table(comparisons, f"{held_out.num_examples} held-out")
    if held_out.flips is not None:
        typer.echo(
            f"{counted(held_out.flips.gained, 'answer')} became right, {held_out.flips.lost} became wrong"
        )
    elif held_out.changed is not None:
        changed = counted(held_out.changed, "answer")
        typer.echo(f"{changed} changed; without labels nobody knows for the better or worse")
    if (kept := held_out.kept) is not None:
        typer.echo("")
        comparison_table([kept.comparison], f"{kept.num_examples} to keep")
        typer.echo(kept)


def candidates_table(result: TuneResult) -> None:
    """Print the candidates as the selection examples scored them; these chose, so no intervals."""
    metric, baseline = result.metric, result.candidates[0]
    rows = [
        [
            f"{'>' if candidate.chosen else ' '} {candidate.name}",
            metric.format(candidate.mean),
            "" if candidate is baseline else metric.format(candidate.change.value, signed=True),
        ]
        for candidate in result.candidates
    ]
    table(["  candidates (selection)", metric.name, "change"], rows)
    typer.echo(OF_CANDIDATES)


def interval(metric: Metric, estimate: Estimate, signed: bool = False) -> str:
    """Format an interval, of a change if signed, else of a mean; "unknown" where there is none."""
    if estimate.low == -math.inf or estimate.high == math.inf:
        return "unknown"
    low, high = (end if signed else metric.clip(end) for end in (estimate.low, estimate.high))
    return f"[{metric.format(low, signed)}, {metric.format(high, signed)}]"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr with the time left; yield ``progress(label, done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("examples, left"),
        TimeRemainingColumn(),
    )
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes, only the first shows a bar
    with Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("reading data", total=None)

        def progress(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield progress


def counter(progress: Callable[[str, int, int], None], label: str, total: int) -> Callable[[int], None]:
    """Make a function that is told how many more examples are done, and moves a bar."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(label, done, total)

    return count
