"""What the documentation shows exists: commands, options, and every public name."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import bnpatch
from bnpatch_cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def commands():
    """Every line of code that calls bnpatch: (page, arguments)."""
    for page in PAGES:
        for block in re.findall(
            r"^ *```(?:sh|bash|)\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            for line in block.splitlines():
                command = re.search(r"(?:^ *\$?|-m ) ?(?:bnpatch|bnpatch_cli) ((?:[a-z]|-h|--v).*)", line)
                if command:
                    yield page.relative_to(ROOT), command.group(1)


@pytest.mark.parametrize(("page", "line"), [pytest.param(*c, id=f"{c[0]}: {c[1][:60]}") for c in commands()])
def test_every_command_that_is_shown_has_these_options(page, line):
    name, *arguments = shlex.split(line.split("  ")[0], comments=True)
    if arguments[-1:] == ["..."]:
        arguments[-1:] = ["model.pt", "--data", "val/"]
    command = typer.main.get_command(app).commands[name]
    try:
        command.make_context(name, arguments)
    except click.exceptions.UsageError as error:
        pytest.fail(f"{page}: bnpatch {line}: {error.format_message()}")


def test_an_earlier_option_is_still_read():
    command = typer.main.get_command(app).commands["tune-alpha"]
    for name in ("--recover-fused", "--recover-folded"):
        assert command.make_context("tune-alpha", ["m.onnx", "--data", "val/", name]).params["recover_fused"]


def test_some_commands_are_shown():
    assert len(list(commands())) > 20


def test_the_reference_has_every_public_name():
    listed = re.findall(
        r"^::: bnpatch\.(\w+)$", (ROOT / "docs/reference/python.md").read_text(), re.MULTILINE
    )
    aliases = {"OnnxModel", "TorchModel"}  # what `load` returns; people use the verbs
    assert sorted([*listed, *aliases]) == sorted(bnpatch.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patch-in-one-line", "folder-to-verdict", "onnx-file"])
def test_notebooks_run_from_first_to_last_cell(name, tmp_path):
    notebook = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text())
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
