"""What mkdocs makes itself: the command reference, the figures, the notebooks, and the example report.

`mkdocs build` calls :func:`on_files`. Everything is made from the code that is documented: it can't differ.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from bnpatch.core.moments import ExampleWeight, Moments, mix
from bnpatch_cli.app import app

plt.switch_backend("Agg")
plt.rcParams.update(
    {"svg.hashsalt": "bnpatch", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)

BLUE, ORANGE, GREEN, GRAY = "#2f6f9f", "#d9822b", "#3f8f5f", "#8a8f98"
DEMO = "demo/bnpatch-out/report.html"
END = "-- end of cell --"


def on_files(files, config):
    """Add the generated pages to those that mkdocs found."""
    pages = {
        "reference/commands.md": commands(),
        "decisions/index.md": decisions(Path(config.docs_dir) / "decisions"),
        "images/alpha.svg": alpha(),
        "images/slope.svg": slope(),
        "images/splits.svg": splits(),
        "example-report.html": report(Path(config.config_file_path).parent / DEMO),
    }
    for path in (Path(config.docs_dir) / "notebooks").glob("*.ipynb"):
        pages[f"notebooks/{path.stem}.md"] = notebook(path)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def commands():
    """Describe every command and option, from the command line itself."""
    command = typer.main.get_command(app)
    with command.make_context("bnpatch", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="bnpatch")
    text = re.sub(r"\[/?bold\]", "", text).replace("# `bnpatch`", "# Command line", 1)
    text = re.sub(r"^(Example: )?(bnpatch .*)$", r"\1\n\n    \2", text, flags=re.MULTILINE)  # as code
    text = re.sub(r"\n{2,}(?=    bnpatch)", "\n", text)
    return re.sub(r"^(?!    bnpatch)(.*)\n(?=    bnpatch)", r"\1\n\n", text, flags=re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    """Let links to notebooks, which work where the sources are read, lead to their pages."""
    return re.sub(r"\]\((notebooks/[\w-]+)\.ipynb\)", r"](\1.md)", markdown)


def notebook(path):
    """Run a notebook in an empty folder, and return it as a page, with what each cell prints."""
    cells = [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    code = f"\nprint({END!r}, flush=True)\n".join(source for kind, source in cells if kind == "code")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    printed = iter(done.stdout.split(f"{END}\n"))
    texts = []
    for kind, source in cells:
        texts.append(source if kind == "markdown" else f"```python\n{source}\n```")
        if kind == "code" and (output := next(printed)):
            texts.append(f"```text\n{output}```")
    return "\n\n".join([*texts, f"To run it yourself: [{path.name}]({path.name})."])


def on_page_content(html, page, config, files):
    """Link the names that docstrings refer to in Sphinx's notation."""
    link = r'<autoref optional identifier="\1"><code>\1</code></autoref>'
    return re.sub(r":(?:func|class|attr|meth|mod|data):<code>~?([\w.]+)</code>", link, html)


def decisions(folder):
    """List the decisions by their titles."""
    titles = (
        f"- [{path.read_text().splitlines()[0].lstrip('# ')}]({path.name})"
        for path in sorted(folder.glob("0*.md"))
    )
    return "\n".join(
        ("# Decisions", "", "What was chosen, why, and what was tried and left out.", "", *titles, "")
    )


def report(path):
    """Return the report of `bnpatch demo`."""
    if not path.is_file():
        raise PluginError(f"{path} is missing: run `make demo` first, as `make docs` does")
    return path.read_text(encoding="utf-8")


def alpha():
    """Draw the distribution that normalizes an image, for three weights."""
    running, example = Moments(0.0, 1.0), Moments(3.0, 0.3)
    figure, axes = plt.subplots(figsize=(7, 2.6))
    x = np.linspace(-4, 6, 400)
    for weight, color, label in (
        (0.0, GRAY, "alpha = 0: running"),
        (0.3, BLUE, "alpha = 0.3"),
        (1.0, ORANGE, "alpha = 1: the image's own"),
    ):
        moments = mix(weight, example, running)
        density = np.exp(-((x - moments.mean) ** 2) / (2 * moments.var)) / np.sqrt(2 * np.pi * moments.var)
        axes.plot(x, density, color=color, label=label)
    axes.set(xlabel="value of a channel", yticks=[])
    axes.legend(frameon=False)
    return svg(figure)


def slope():
    """Draw the weight of an image against its distance, as `ExampleWeight` computes it."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    distance = np.geomspace(0.01, 100, 200)
    for value, color in ((0.0, GRAY), (0.5, BLUE), (1.0, ORANGE)):
        weights = np.broadcast_to(ExampleWeight(0.2, value).at(distance)[0].example, 200)
        axes.semilogx(distance, weights, color=color, label=f"slope = {value:g}")
    axes.set(xlabel="distance D of the image from the running statistics", ylabel="its weight", ylim=(0, 1))
    axes.legend(frameon=False, title="alpha = 0.2")
    return svg(figure)


def splits():
    """Draw who sees which part of the images."""
    figure, axes = plt.subplots(figsize=(7, 1.5))
    parts = (
        ("tuning", "finds the weights", BLUE, 0, 2),
        ("selection", "chooses the candidate", ORANGE, 2, 1),
        ("held-out", "gives the verdict, once", GREEN, 3, 3),
    )
    for name, what, color, left, width in parts:
        axes.barh(0, width, left=left, color=color, edgecolor="white", height=0.5)
        axes.text(left + width / 2, 0, name, ha="center", va="center", color="white", weight="bold")
        axes.text(left + width / 2, -0.5, what, ha="center", va="center", color=color)
    axes.set(ylim=(-0.8, 0.4))
    axes.axis("off")
    return svg(figure)


def svg(figure):
    """Return a figure as SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
