"""Write docs/results.md from the measurements: its tables, and the claims with their figures."""

import json
import textwrap
from pathlib import Path

import jinja2

import tests.benchmarks.claims_training  # noqa: F401  # its claims are in the list
from tests.benchmarks import claims, results_pictures, results_tables
from tests.benchmarks.fashion_mnist import Setup

FOLDER = Path(__file__).parents[2] / "docs" / "results"
PAGE, TEMPLATE = FOLDER.with_suffix(".md"), Path(__file__).with_name("results.md.j2")
WIDTH = 120


def read_results(folder=FOLDER):
    """What was measured, by name of the benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def failing(results):
    """Names of the claims that do not hold."""
    return [name for name, claim in claims.CLAIMS.items() if not holds(claim, results)]


def holds(claim, results):
    try:
        return bool(claim(results)[0])
    except (KeyError, StopIteration, IndexError):  # not measured
        return False


def page(results):
    """The text of the page."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    def measured(name):
        about = results[name]
        flags = [
            f" --{key.replace('_', '-')} {about[key]}"
            for key in ("tuning", "held_out")
            if about.get(key, getattr(Setup, key)) != getattr(Setup, key)
        ]
        command = f"`python -m tests.benchmarks.results --only {name}{''.join(flags)}`"
        return f"{command}, {about['date']}, commit {about['commit']}, {about['machine']}."

    def sizes(name):
        tuning, held_out = results[name]["tuning"], results[name]["held_out"]
        return f"tuned on {tuning:,} images and judged by {held_out:,} others"

    text = environment.from_string(TEMPLATE.read_text()).render(
        claim=lambda name: claims.sentence(name, results),
        table=lambda name: getattr(results_tables, name)(results),
        results=results,
        measured=measured,
        sizes=sizes,
    )
    return "\n".join(map(wrapped, text.split("\n")))


def wrapped(line):
    if line.startswith(("|", "!")):
        return line
    indent = "  " if line.startswith("- ") else ""
    filled = textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return filled


def write_page(results):
    """Write the page and its pictures."""
    PAGE.write_text(page(results))
    results_pictures.draw(results, FOLDER)
