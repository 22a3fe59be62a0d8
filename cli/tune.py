"""``bnpatch tune-alpha``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt

if TYPE_CHECKING:
    from bnpatch.search import TuneResult


@opt.in_groups
def tune_alpha(
    *,
    model: opt.Model,
    data: opt.Data,
    metric: Annotated[str, typer.Option(help="accuracy, cross-entropy or top5.")] = "accuracy",
    trials: Annotated[int, typer.Option(help="Weights to try, alpha = 0 included.")] = 15,
    timeout: Annotated[float | None, typer.Option(help="Try no more after so many seconds.")] = None,
    holdout: Annotated[
        float, typer.Option(help="Part of the data that gives the verdict, unseen by the search.")
    ] = 0.5,
    test_data: Annotated[
        str | None, typer.Option(help="Other data for the verdict; --data is all for tuning.")
    ] = None,
    recover_folded: Annotated[
        bool,
        typer.Option(
            "--recover-folded", help="ONNX: find again the Batch Norm that was folded into convolutions."
        ),
    ] = False,
    calib_data: Annotated[
        str | None,
        typer.Option(help="With --recover-folded: images like those of training. Default: the tuning part."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "bnpatch-out"
    ),
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    reading: opt.Reading,
    loading: opt.Loading,
) -> None:
    """Find the weight of the example that suits a model and data best.

    Writes recipe.json, patched.pt (or patched.onnx), alpha-curve.png and trials.csv into the output
    folder. The verdict is given on examples that the search did not see.

    Examples:
    bnpatch tune-alpha model.pt --data val/

    bnpatch tune-alpha timm:resnet50.a1_in1k --data imagenet/val --metric cross-entropy --limit 5000

    bnpatch tune-alpha model.onnx --data val/ --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5

    bnpatch tune-alpha resnet18-f37072fd.pth --data field-images/ --class-map classes.txt -o out/
    """
    from bnpatch import tune_alpha
    from bnpatch.files import check_writable
    from bnpatch.report import write_results, write_trials

    from .render import progress_bar

    check_writable(output)  # now, not after the search
    loaded = loading.open(model)
    done = []
    with progress_bar() as progress:

        def keep(trial: Any, is_best: bool) -> None:
            done.append(trial)
            write_trials(done, output / "trials.csv")
            if is_best:  # whatever happens from here on, this much is known
                loaded.recipe({"metric": metric, "verdict": "none: the search has not ended"}).save(
                    output / "recipe.json"
                )

        result = tune_alpha(
            loaded,
            data,
            metric=metric,
            trials=trials,
            timeout=timeout,
            holdout=holdout,
            test_data=test_data,
            batch_size=reading.batch_size,
            seed=seed,
            recover_folded=recover_folded,
            calib_data=calib_data,
            progress=progress,
            on_trial=keep,
            **reading.settings(loaded),
        )
    result.recipe.provenance["command"] = " ".join(sys.argv[1:])
    files = write_results(result, loaded, output)
    if as_json:
        content = {
            "verdict": result.verdict,
            "alpha": result.alpha,
            "files": [str(f) for f in files],
            **result.recipe.provenance,
        }
        typer.echo(json.dumps(content))
    else:
        _show(result, files)


def _show(result: "TuneResult", files: list[Path]) -> None:
    from .render import comparison_table

    left_out = opt.skipped(result.skipped)
    opt.say(f"examples       {result.num_tuning} to tune on, {result.num_held_out} held out{left_out}")
    if result.interrupted:
        opt.say(f"interrupted    the best of {len(result.trials)} finished trials is kept")
    opt.say(f"trials         {len(result.trials)} in {result.seconds:.1f} s")
    typer.echo("")
    comparison_table(result.comparisons, "held-out")
    typer.echo(f"\n{verdict(result)}\n")
    typer.echo(f"wrote {', '.join(str(f) for f in files)}")


def verdict(result: "TuneResult") -> str:
    """One sentence that a user can act on."""
    tuned = result.comparisons[0]
    change = tuned.metric.format(tuned.change.value, signed=True)
    best = f"alpha = {result.alpha:.4g}"
    if result.alpha == 0:
        return f"{best} is best: keep the model as it is."
    if tuned.verdict == "gain":
        return f"{best}: {change} in {tuned.metric.name} on examples that the search did not see."
    if tuned.verdict == "loss":
        return f"{best} did best in tuning but loses on unseen examples: the recipe keeps the model as it is."
    return (
        f"no significant gain ({best} did best in tuning): keep the model as it is. "
        "The files hold this alpha all the same."
    )
