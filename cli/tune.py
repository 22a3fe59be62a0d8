"""``bnpatch tune-alpha``."""

import json
import shlex
import sys
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnpatch.core.text import masked

from . import options as opt

if TYPE_CHECKING:
    from bnpatch.models.base import Model
    from bnpatch.search.result import TuneResult

_SEARCH, _VERDICT = "Search", "Verdict and calibration"


class _Granularity(str, Enum):
    """What has weights of its own."""

    auto = "auto"
    all_layers = "global"
    stage = "stage"
    layer = "layer"


@opt.in_groups
def tune_alpha(
    *,
    model: opt.Model,
    data: opt.Data,
    metric: Annotated[
        str,
        typer.Option(
            help="accuracy, cross-entropy or top5; without labels unlabeled (for comparison: information, "
            "alignment, entropy, evalnorm).",
            rich_help_panel=_SEARCH,
        ),
    ] = "accuracy",
    granularity: Annotated[
        _Granularity,
        typer.Option(
            help="What has weights of its own: the model, each stage, each layer; auto tries both ends.",
            rich_help_panel=_SEARCH,
        ),
    ] = _Granularity.auto,
    recalibrate: Annotated[
        bool | None,
        typer.Option(
            "--recalibrate/--no-recalibrate",
            help="Let re-estimated running statistics join. Default: with --granularity auto.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    slopes: Annotated[
        bool,
        typer.Option(
            "--slopes/--no-slopes",
            help="Let the weight of an example depend on how far it is from the running statistics.",
            rich_help_panel=_SEARCH,
        ),
    ] = True,
    trials: Annotated[
        int | None,
        typer.Option(help="At most so many weights in each global search.", rich_help_panel=_SEARCH),
    ] = None,
    max_passes: Annotated[
        float,
        typer.Option(
            help="At most so many passes over the images in each global search.", rich_help_panel=_SEARCH
        ),
    ] = 3.0,
    timeout: Annotated[
        float | None, typer.Option(help="Begin nothing more after so many seconds.", rich_help_panel=_SEARCH)
    ] = None,
    max_overhead: Annotated[
        float | None,
        typer.Option(
            help="Patch only as much as keeps the measured latency within so many times the original's.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="Tune for shifts that are not in the data: any of contrast,brightness,noise,blur.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    class_prior: Annotated[
        str | None,
        typer.Option(
            help="With --metric unlabeled or information: how often the classes occur, e.g. 0.7,0.2,0.1. "
            "Default: equally.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    recover_folded: Annotated[
        bool,
        typer.Option(
            "--recover-folded",
            help="Find again the Batch Norm that was fused into convolutions (--calib-data: clean images).",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Keep the trials in a database, e.g. sqlite:///x.db: the same command goes on after a kill.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Name of the study in the storage.", rich_help_panel=_SEARCH)
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Part of the data that gives the verdict, unseen by the search. Default: 0.5, or in turns "
            "where images are few.",
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(help="Other data for the verdict; --data is all for tuning.", rich_help_panel=_VERDICT),
    ] = None,
    calib_data: Annotated[
        str | None,
        typer.Option(
            help="Images to re-estimate statistics on, labels unused. Default: those to tune on.",
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    keep_data: Annotated[
        str | None,
        typer.Option(
            help="Images that a patch must not harm, labelled or not, e.g. the original validation set.",
            rich_help_panel=_VERDICT,
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            help="The loss that is accepted on --keep-data: of accuracy or, without labels, of answers.",
            rich_help_panel=_VERDICT,
        ),
    ] = 0.005,
    fail_unless_gain: Annotated[
        bool,
        typer.Option(
            "--fail-unless-gain",
            help="Exit with 1 unless held-out images support a patch. The files are written all the same.",
            rich_help_panel=_VERDICT,
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "bnpatch-out"
    ),
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
    from bnpatch import tune_alpha
    from bnpatch.core.io import check_writable, claimed
    from bnpatch.report.files import RECIPE_SO_FAR, TRIALS_SO_FAR, write_results, write_trials
    from bnpatch.search.config import SearchConfig
    from bnpatch.search.distributed import is_first
    from bnpatch.search.tune import checked_objective

    from .render import progress_bar

    # These checks come first, so that a mistake shows before the model is loaded and the search has run.
    config = SearchConfig(
        recalibrate=recalibrate,
        slopes=slopes,
        trials=trials,
        max_passes=max_passes,
        holdout=holdout,
        class_prior=class_prior,
        augment=augment,
        margin=margin,
        max_overhead=max_overhead,
        recover_folded=recover_folded,
        batch_size=reading.batch_size,
        storage=storage,
        study=study,
    )
    checked_objective(metric, granularity.value, timeout, config)
    groups = opt.groups_of(group_by)
    check_writable(output)
    with claimed(output) if is_first() else nullcontext():
        loaded = loading.open(model)
        was_named = loaded.class_names is not None
        done: list[Any] = []
        with progress_bar() as progress:

            def keep(trial: Any, is_best: bool) -> None:
                if not done:
                    (output / RECIPE_SO_FAR).unlink(missing_ok=True)  # an earlier run's
                done.append(trial)
                write_trials(done, output / TRIALS_SO_FAR)
                if is_best:  # written at once, so that an interrupted search keeps its best result
                    provenance = {"metric": metric, "verdict": opt.UNFINISHED}
                    loaded.recipe(trial.state, provenance).save(output / RECIPE_SO_FAR)

            result = tune_alpha(
                loaded,
                data,
                metric=metric,
                granularity=granularity.value,
                test_data=test_data,
                calib_data=calib_data,
                keep=keep_data,
                timeout=timeout,
                seed=seed,
                config=config,
                progress=progress,
                on_trial=keep,
                groups=groups,
                **reading.settings(loaded),
            )
        if not is_first():  # only the first of several processes prints and writes
            return
        opt.say_assumed_order(loaded, reading, was_named)
        for recipe in (result.recipe, result.candidate_recipe):
            if recipe is not None:
                recipe.provenance["command"] = _command(storage)
        files = write_results(result, loaded, output)
        if as_json:
            content = {
                "verdict": str(result.verdict),
                "chosen": result.chosen.name,
                "alpha": result.alpha,
                "alphas": dict(result.weights.alphas),
                "lambdas": dict(result.weights.lambdas),
                "slopes": result.weights.varying(),
                "files": [str(f) for f in files],
                **result.recipe.provenance,
            }
            typer.echo(json.dumps(content))
        else:
            _show(result, loaded, files)
        if fail_unless_gain and not result.is_recommended:
            raise typer.Exit(1)


def _command(storage: str | None) -> str:
    """What was typed, without the password of a database."""
    words = sys.argv[1:]
    if storage is not None:
        words = [word.replace(storage, masked(storage)) for word in words]
    return shlex.join(words)


def _show(result: "TuneResult", model: "Model[Any]", files: list[Path]) -> None:
    from bnpatch.report.text import shown, verdict_sentence

    from .render import candidates_table, verdict_table

    left_out = opt.skipped(result.skipped)
    tuning, judging = (
        str(count) if groups is None else f"{count} in {groups} groups"
        for count, groups in (
            (result.num_tuning, result.num_tuning_groups),
            (result.num_held_out, result.verdict.num_groups),
        )
    )
    opt.say(f"examples       {tuning} to tune on, {judging} judged by{left_out}")
    if result.interrupted:
        opt.say("interrupted    what was finished is kept")
    opt.say(f"search         {result.passes:.1f} passes over the tuning examples in {result.seconds:.1f} s")
    opt.put("")
    candidates_table(result)
    opt.put("")
    verdict_table(result.verdict, shown(result.verdict.all_comparisons, model, result.metric))
    opt.put(f"\n{verdict_sentence(result)}\n")
    for note in result.notes:
        opt.put(f"note: {note}")
    opt.put(f"wrote {', '.join(str(f) for f in files)}")
