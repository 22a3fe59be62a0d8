"""``bnpatch evaluate``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bnpatch
from bnpatch.core.text import counted

from . import options as opt
from . import recipes
from .console import say, skipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnpatch.data.dataset import Examples
    from bnpatch.evaluation.evaluate import Scores
    from bnpatch.evaluation.metrics import Comparison
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel


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
    from bnpatch.evaluation.evaluate import STANDARD_METRICS, compare
    from bnpatch.evaluation.metrics import PREDICTION
    from bnpatch.models.doctor import warn_of_preprocessing

    from .render import counter, progress_bar

    groups = opt.groups_of(group_by)
    chosen = recipes.read(recipe)
    loaded = loading.open(model, chosen)
    patched = None
    if chosen is not None:
        recipes.check_unpatched(loaded, model)
        recipes.apply(chosen, loaded)
        patched = loaded.weights
        loaded.set_state(loaded.baseline())
    else:
        reading = replace(reading, cache_gb=0.0)  # the data is read once, so caching would waste memory
    was_named = loaded.class_names is not None
    examples = reading.open(data, loaded, seed, groups=groups)
    opt.say_assumed_order(loaded, reading, was_named)
    with progress_bar() as progress:
        passes = 1 if patched is None else 2
        on_batch = counter(progress, "evaluating", passes * len(examples))
        run: dict[str, Any] = {"batch_size": reading.batch_size, "on_batch": on_batch}
        if patched is None:
            scores = bnpatch.evaluate(loaded, examples, (*STANDARD_METRICS, PREDICTION), **run)
        else:
            comparisons = compare(loaded, examples, patched, **run)
    content: dict[str, Any] = {"model": loaded.name, **_counts(examples)}
    examples.warn_of_near_copies()
    warn_of_preprocessing(loaded, examples)
    if chosen is None:
        content["scores"] = _show_scores(scores, examples, loaded, as_json)
    else:
        if chosen.provenance.get("data", {}).get("fingerprint") == examples.fingerprint():
            say("note           the recipe was tuned on a part of these examples")
        content["comparisons"] = _show_comparisons(comparisons, content["examples"], loaded, as_json)
    if as_json:
        typer.echo(json.dumps(content))


def _counts(examples: "Examples") -> dict[str, int]:
    """Say how many examples were scored, in how many groups, and which were left out; the numbers by name."""
    left_out = {examples.source.name(index): why for index, why in examples.skipped.items()}
    counts = {"examples": len(examples) - len(left_out), "skipped": len(left_out)}
    num_groups = examples.num_groups([i for i in range(len(examples)) if i not in examples.skipped])
    if num_groups is not None:
        counts["groups"] = num_groups
    in_groups = "" if num_groups is None else f" in {counted(num_groups, 'group')}"
    say(f"examples       {counts['examples']}{in_groups}{skipped(left_out)}")
    return counts


def _show_scores(
    scores: "Scores", examples: "Examples", model: "TorchModel | OnnxModel", as_json: bool
) -> dict[str, Any]:
    """Print the scores unless JSON is wanted, and return them as plain values by name of metric."""
    from bnpatch.evaluation.evaluate import STANDARD_METRICS, warn_at_chance
    from bnpatch.evaluation.metrics import ACCURACY, PREDICTION
    from bnpatch.evaluation.permutation import warn_if_permuted
    from bnpatch.report.text import shown_metrics

    from .render import interval, table

    warn_at_chance(scores.mean(ACCURACY), examples)
    answers = scores.values[PREDICTION.name].astype(int)
    warn_if_permuted(answers, examples.targets[scores.indices], model.class_names)
    results = {metric: scores.estimate(metric) for metric in STANDARD_METRICS}
    if not as_json:
        metrics = shown_metrics(STANDARD_METRICS, model)
        rows = [[m.name, m.format(results[m].value), interval(m, results[m])] for m in metrics]
        table(["metric", "mean", "95% interval"], rows)
    return {metric.name: estimate.to_json() for metric, estimate in results.items()}


def _show_comparisons(
    comparisons: "Sequence[Comparison]", count: int, model: "TorchModel | OnnxModel", as_json: bool
) -> dict[str, Any]:
    """Print the comparisons unless JSON is wanted, and return them as plain values by name of metric."""
    from bnpatch.report.text import shown

    from .render import comparison_table

    if not as_json:
        comparison_table(shown(comparisons, model), f"all {count}")
    return {comparison.metric.name: comparison.to_json() for comparison in comparisons}
