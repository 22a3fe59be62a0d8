"""Lines for a person, and phrases in them."""

import os
from collections.abc import Mapping, Sequence

import typer

from bnpatch.core.text import visible

#: The warnings of ours that this command printed, so that it does not say them again as notes.
WARNED: list[str] = []


def say(text: str) -> None:
    """Tell a person something that is not the result, in one line; once, however many processes run."""
    if os.environ.get("RANK", "0") == "0":
        put(text, err=True)


def put(text: str = "", *, err: bool = False) -> None:
    """Print one line; what would act on the terminal in names of files, classes and models is escaped."""
    line = text.strip("\n")  # blank lines before and after it are meant
    typer.echo(text.replace(line, visible(line)) if line else text, err=err)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def skipped(reasons: Mapping[str, str]) -> str:
    """Say which images were left out, the first few by name."""
    if not reasons:
        return ""
    return f"; left out, because they can't be read: {len(reasons)} ({some(list(reasons))})"
