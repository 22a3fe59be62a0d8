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
    group_by: opt.GroupBy = None,
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
    from bnpatch import BnpatchError
    from bnpatch.evaluation.evaluate import STANDARD_METRICS, compare, warn_at_chance
    from bnpatch.evaluation.evaluate import evaluate as score
    from bnpatch.evaluation.metrics import ACCURACY, PREDICTION
    from bnpatch.evaluation.permutation import warn_if_permuted
    from bnpatch.report.text import recommendation, shown, shown_metrics

    from .render import comparison_table, interval, progress_bar, table

    groups = opt.groups_of(group_by)
    chosen = opt.recipe_of(recipe)
    loaded = loading.open(model, chosen)
    patched = None
    if chosen is not None:
        if not loaded.weights.is_baseline(loaded.baseline_alphas()):
            raise BnpatchError(
                f"{model} is patched already", "leave out --recipe, or give the model as it was"
            )
        if says := recommendation(chosen):
            opt.say(f"recipe         {says}")
        loaded.apply(chosen)
        patched = loaded.weights
        loaded.set_state(loaded.baseline())
    if chosen is None:
        reading = replace(reading, cache_gb=0.0)  # the data is read once, so caching would waste memory
    was_named = loaded.class_names is not None
    examples = reading.open(data, loaded, seed, groups=groups)
    opt.say_assumed_order(loaded, reading, was_named)
    total, done = len(examples) * (2 if chosen is not None else 1), 0
    with progress_bar() as progress:

        def count(examples_done: int) -> None:
            nonlocal done
            done += examples_done
            progress("evaluating", done, total)

        run: dict[str, Any] = {"batch_size": reading.batch_size, "on_batch": count}
        comparisons = compare(loaded, examples, patched, **run) if patched is not None else []
        scores = score(loaded, examples, (*STANDARD_METRICS, PREDICTION), **run) if chosen is None else None
    left_out = {examples.source.name(index): why for index, why in examples.skipped.items()}
    number = len(examples) - len(left_out)
    num_groups = examples.num_groups([i for i in range(len(examples)) if i not in examples.skipped])
    in_groups = "" if num_groups is None else f" in {num_groups} groups"
    opt.say(f"examples       {number}{in_groups}{opt.skipped(left_out)}")
    examples.warn_of_near_copies()
    content: dict[str, Any] = {"model": loaded.name, "examples": number, "skipped": len(left_out)}
    if num_groups is not None:
        content["groups"] = num_groups
    if scores is not None:
        warn_at_chance(scores.mean(ACCURACY), examples)
        answers = scores.values[PREDICTION.name].astype(int)
        warn_if_permuted(answers, examples.targets[scores.indices], loaded.class_names)
        results = {metric: scores.estimate(metric) for metric in STANDARD_METRICS}
        content["scores"] = {metric.name: estimate.to_json() for metric, estimate in results.items()}
        if not as_json:
            metrics = shown_metrics(STANDARD_METRICS, loaded)
            rows = [[m.name, m.format(results[m].value), interval(m, results[m])] for m in metrics]
            table(["metric", "mean", "95% interval"], rows)
    else:
        content["comparisons"] = {c.metric.name: c.to_json() for c in comparisons}
        tuned_on = chosen.provenance.get("data", {}).get("fingerprint") if chosen is not None else None
        if tuned_on == examples.fingerprint():
            opt.say("note           the recipe was tuned on a part of these examples")
        if not as_json:
            comparison_table(shown(comparisons, loaded), f"all {number}")
    if as_json:
        typer.echo(json.dumps(content))
