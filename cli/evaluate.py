"""``bnpatch evaluate``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt


@opt.in_groups
def evaluate(
    *,
    model: opt.Model,
    data: opt.Data,
    recipe: Annotated[Path | None, typer.Option(help="Compare the model as it is with this recipe.")] = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    reading: opt.Reading,
    loading: opt.Loading,
) -> None:
    """Score a model on a data set, as it is or with a recipe.

    Examples:
    bnpatch evaluate bnpatch-out/patched.pt --data val/

    bnpatch evaluate model.pt --data other-images/ --recipe bnpatch-out/recipe.json
    """
    from bnpatch import Recipe
    from bnpatch.evaluation import STANDARD_METRICS, compare, warn_at_chance
    from bnpatch.evaluation import evaluate as score

    from .render import comparison_table, interval, progress_bar, table

    loaded = loading.open(model)
    chosen = Recipe.load(recipe) if recipe is not None else None
    if chosen is not None:
        chosen.check_fits(loaded.fingerprints())
    if chosen is None:
        reading = replace(reading, cache_gb=0.0)  # one pass needs no memory of it
    examples = reading.open(data, loaded, seed)
    total, done = len(examples) * (2 if chosen is not None else 1), 0
    with progress_bar() as progress:

        def count(examples_done: int) -> None:
            nonlocal done
            done += examples_done
            progress("evaluating", done, total)

        run: dict[str, Any] = {"batch_size": reading.batch_size, "on_batch": count}
        comparisons = compare(loaded, examples, chosen.alphas, **run) if chosen is not None else []
        scores = score(loaded, examples, **run) if chosen is None else None
    skipped = f", {len(examples.skipped)} unreadable and left out" if examples.skipped else ""
    opt.say(f"examples       {len(examples)}{skipped}")
    content: dict[str, Any] = {
        "model": loaded.name,
        "examples": len(examples),
        "skipped": len(examples.skipped),
    }
    if scores is not None:
        warn_at_chance(scores, examples)
        results = {metric: scores.estimate(metric) for metric in STANDARD_METRICS}
        content["scores"] = {metric.name: estimate.to_json() for metric, estimate in results.items()}
        if not as_json:
            rows = [[m.name, m.format(e.value), interval(m, e)] for m, e in results.items()]
            table(["metric", "mean", "95% interval"], rows)
    else:
        content["comparisons"] = {c.metric.name: c.to_json() for c in comparisons}
        if not as_json:
            comparison_table(comparisons)
    if as_json:
        typer.echo(json.dumps(content))
