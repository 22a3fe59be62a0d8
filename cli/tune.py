"""``bnpatch tune-alpha``."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import bnpatch
from bnpatch.core.io import check_writable, claimed
from bnpatch.core.text import counted

from . import options as opt
from . import recipes
from .console import WARNED, put, say, skipped
from .tune_options import Judging, Searching

if TYPE_CHECKING:
    from bnpatch.models.base import Model
    from bnpatch.search.result import TuneResult


@opt.in_groups
def tune_alpha(
    *,
    model: opt.Model,
    data: opt.Data,
    searching: Searching,
    judging: Judging,
    output: opt.Output = Path("bnpatch-out"),
    group_by: opt.GroupBy = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    reading: opt.Reading,
    loading: opt.Loading,
) -> None:
    """Find the weights that suit a model and data best, without retraining.

    alpha is the weight of the example in the statistics that normalize it, lambda that of running
    statistics re-estimated on your images. The search tries several candidates, one weight for all layers,
    then one per layer, and keeps what images that it did not learn from support. The verdict is given on
    further images, and only a gain there is applied.

    Writes recipe.json and patched.pt (or patched.onnx) with what is recommended, candidate-recipe.json where
    the best candidate is not, report.html, alpha-curve.png and trials.csv. What it has found so far is in
    recipe.partial.json and trials.partial.csv until then.

    Examples:
    bnpatch tune-alpha model.pt --data val/

    bnpatch tune-alpha timm:resnet50.a1_in1k --data imagenet/val --granularity global --limit 5000

    bnpatch tune-alpha model.onnx --data field-images/ --metric unlabeled --max-overhead 1.1

    bnpatch tune-alpha model.pt --data field-images/ --keep-data val/

    bnpatch tune-alpha resnet18-f37072fd.pth --data val/ --class-map classes.txt --storage sqlite:///s.db
    """
    from bnpatch.report.files import ResultsSoFar, write_results
    from bnpatch.search.distributed import is_first
    from bnpatch.search.tune import checked_objective

    from .render import progress_bar

    # These checks come first, so that a mistake shows before the model is loaded and the search has run.
    config = searching.config(judging, reading.batch_size, output)
    checked_objective(searching.metric, searching.granularity, searching.timeout, config)
    groups = opt.groups_of(group_by)
    check_writable(output)
    with claimed(output) if is_first() else nullcontext():
        loaded = loading.open(model)
        was_named = loaded.class_names is not None
        so_far = ResultsSoFar(loaded, output, searching.metric)
        with progress_bar() as progress:
            result = bnpatch.tune_alpha(
                loaded,
                data,
                metric=searching.metric,
                granularity=searching.granularity,
                test_data=judging.test_data,
                calib_data=judging.calib_data,
                keep=judging.keep_data,
                timeout=searching.timeout,
                seed=seed,
                config=config,
                progress=progress,
                on_trial=so_far.add,
                groups=groups,
                **reading.settings(loaded),
            )
        if not is_first():  # only the first of several processes prints and writes
            return
        opt.say_assumed_order(loaded, reading, was_named)
        for recipe in (result.recipe, result.candidate_recipe):
            if recipe is not None:
                recipe.provenance["command"] = recipes.command(searching.storage)
        files = write_results(result, loaded, output)
        if as_json:
            typer.echo(json.dumps(_as_json(result, files)))
        else:
            _show(result, loaded, files)
        if judging.fail_unless_gain and not result.is_recommended:
            raise typer.Exit(1)


def _as_json(result: "TuneResult", files: list[Path]) -> dict[str, Any]:
    return {
        "verdict": result.verdict,
        "chosen": result.chosen.name,
        "alpha": result.alpha,
        "alphas": dict(result.weights.alphas),
        "lambdas": dict(result.weights.lambdas),
        "slopes": result.weights.in_effect("slope"),
        "var_offsets": result.weights.in_effect("var_offset"),
        "files": [str(f) for f in files],
        **result.recipe.provenance,
    }


def _show(result: "TuneResult", model: "Model[Any]", files: list[Path]) -> None:
    from bnpatch.report.text import shown, verdict_sentence

    from .render import candidates_table, verdict_table

    left_out = skipped(result.skipped)
    tuning, judging = (
        str(count) if groups is None else f"{count} in {counted(groups, 'group')}"
        for count, groups in (
            (result.num_tuning, result.num_tuning_groups),
            (result.num_held_out, result.held_out.num_groups),
        )
    )
    say(f"examples       {tuning} to tune on, {judging} judged by{left_out}")
    if result.interrupted:
        say("interrupted    what was finished is kept")
    say(f"search         {result.passes:.1f} passes over the tuning examples in {result.seconds:.1f} s")
    put("")
    candidates_table(result)
    put("")
    verdict_table(result.held_out, shown(result.held_out.all_comparisons, model, result.metric))
    put(f"\n{verdict_sentence(result)}\n")
    for note in result.notes:
        if not note.endswith(tuple(WARNED)):  # a warning said it
            put(f"note: {note}")
    put(f"wrote {', '.join(str(f) for f in files)}")
