"""``bnpatch robustness``."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import check_writable, claimed

from . import options as opt
from . import recipes
from .console import put

if TYPE_CHECKING:
    from bnpatch.data.dataset import Examples
    from bnpatch.evaluation.robustness import Progress, Robustness
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel

#: What was scored, image by image, so that a run that was killed goes on.
SCORES = "scores.npz"


@opt.in_groups
def robustness(
    *,
    model: opt.Model,
    data: opt.Data,
    recipe: Annotated[Path | None, typer.Option(help="Compare the model as it is with this recipe.")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of corruption, as fog,snow. Default: all fifteen.", show_default=False),
    ] = None,
    severities: Annotated[str, typer.Option(help="Severities, each from 1 to 5.")] = "1,2,3,4,5",
    output: opt.Output = Path("bnpatch-robustness"),
    group_by: opt.GroupBy = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    reading: opt.Reading,
    loading: opt.Loading,
) -> None:
    r"""Score a model under the 15 standard corruptions in 5 severities, as it is and patched.

    The patch is that of --recipe, or the one that a patched model has. Both see the same corrupted images.
    The corruptions are those of ImageNet-C, applied to your images: pip install 'bnpatch\[robustness]'.

    Writes robustness.html with heat maps, robustness.csv, and scores.npz, with which the same command goes on
    where it was killed.

    Examples:
    bnpatch robustness model.pt --data val/ --recipe bnpatch-out/recipe.json

    bnpatch robustness patched.onnx --data val/ --kinds fog,snow --severities 3 --limit 500
    """
    from bnpatch.data.standard_corruptions import check_installed, parse_standard_kinds
    from bnpatch.report.robustness import robustness_json, write_robustness

    # These checks come first, so that a mistake shows before the model is loaded.
    chosen, levels = parse_standard_kinds(kinds), _severities(severities)
    check_installed()
    groups = opt.groups_of(group_by)
    check_writable(output)
    with claimed(output):
        patch = recipes.read(recipe)
        loaded = loading.open(model, patch)
        was_named = loaded.class_names is not None
        examples = reading.open(data, loaded, seed, groups=groups)
        opt.say_assumed_order(loaded, reading, was_named)
        with _progress() as progress:
            result = bnpatch.robustness(
                loaded,
                examples,
                patch,
                kinds=chosen,
                severities=levels,
                batch_size=reading.batch_size,
                seed=seed,
                resume=output / SCORES,
                progress=progress,
            )
        examples.warn_of_near_copies()
        notes = _notes(loaded, result, recipe)
        files = write_robustness(
            result, output, _origin(loaded, examples, recipe, seed), recipes.command(), notes
        )
    if as_json:
        content = {**robustness_json(result), "notes": notes, "files": [str(f) for f in files]}
        typer.echo(json.dumps(content))
        return
    _show(result)
    for note in notes:
        put(f"note: {note}")
    put(f"wrote {', '.join(str(f) for f in files)}")


def _severities(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(part not in ("1", "2", "3", "4", "5") for part in parts):
        raise BnpatchError(f"--severities {text!r} is not a list of severities", "write 1,3,5")
    return tuple(map(int, dict.fromkeys(parts)))


def _notes(model: "TorchModel | OnnxModel", result: "Robustness", recipe: Path | None) -> list[str]:
    from bnpatch.data.standard_corruptions import SHORTEST_SIDE

    channels, height, width = model.preprocessing.input_size
    notes = []
    if result.after is None:
        reason = "The model is not patched" if recipe is None else "The recipe changes nothing"
        notes.append(f"{reason}, so there is nothing to compare the model with.")
    if min(height, width) < 200:
        notes.append(
            f"The severities are made for images of 224 pixels; on images of {width} x {height} the same "
            "severity is a stronger corruption."
        )
    if min(height, width) < SHORTEST_SIDE:
        notes.append(
            f"To be corrupted, images were continued by their mirror image up to {SHORTEST_SIDE} pixels."
        )
    if channels == 1:
        notes.append("Gray images were corrupted as color images, and made gray again.")
    return notes


def _origin(
    model: "TorchModel | OnnxModel", examples: "Examples", recipe: Path | None, seed: int
) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "imagecorruptions-imaug", "scikit-image", "numpy")
    return {
        "model": model.name,
        "recipe": "none" if recipe is None else str(recipe),
        "preprocessing": f"{model.preprocessing}, from {model.preprocessing.source}",
        "data fingerprint": examples.fingerprint(),
        "seed": str(seed),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _show(result: "Robustness") -> None:
    from bnpatch.evaluation.robustness import ERROR
    from bnpatch.report.robustness import robustness_sentence

    from .render import comparison_table, interval, table

    if result.after is None:
        rows = [
            [name, *(ERROR.format(result.comparison((name, s)).before.value) for s in result.severities)]
            for name in result.kinds
        ]
        table(["error", *(f"severity {s}" for s in result.severities)], rows)
    else:
        rows = []
        for kind in result.kinds:
            c, relative = result.of_kind(kind), result.corruption_error(kind)
            values = [ERROR.format(value.value) for value in (c.before, c.after)]
            change = [ERROR.format(c.change.value, signed=True), interval(ERROR, c.change, signed=True)]
            rows.append([kind, *values, *change, "" if relative is None else f"{100 * relative:.1f}%"])
        table(["error", "as it is", "patched", "change", "95% interval", "corruption error"], rows)
        put("")
        comparison_table([result.comparison()], f"{result.num_examples} as they are")
        put("")
        comparison_table([result.mean_error()], "mean under corruption")
        if (mean := result.mean_corruption_error()) is not None:
            low, high = 100 * mean.low, 100 * mean.high
            put(
                f"mean corruption error {100 * mean.value:.1f}% of the model's as it is "
                f"[{low:.1f}%, {high:.1f}%]"
            )
    put(f"\n{robustness_sentence(result)}\n")


@contextmanager
def _progress() -> "Iterator[Callable[[Progress], None]]":
    """A bar on stderr with the time that is left, which goes by the cost of each kind of corruption."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, {task.fields[left]} left"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading data", total=None, left="?")

        def show(now: "Progress") -> None:
            left = str(timedelta(seconds=round(now.seconds_left)))
            bar.update(task, description=now.label, completed=now.done, total=now.total, left=left)

        yield show
