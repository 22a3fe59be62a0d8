"""Run a command in this process, and read how it ended."""

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest

from bnpatch_cli import main

QUICK = ["--granularity", "global", "--holdout", "0.5", "-j", "0"]


def run_in(folder, *args):
    """What a command that must end well prints to stdout and to stderr, started in this folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["bnpatch", *map(str, args)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, err.getvalue()
    return out.getvalue(), err.getvalue()


def one_line(err):
    """The error, which must be the only thing that says error, and without a traceback."""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.rstrip().endswith(line)
    return line.removeprefix("error: ")
