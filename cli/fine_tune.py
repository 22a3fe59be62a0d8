"""``bnpatch fine-tune``."""

import copy
import json
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .training_options import Techniques, Training

if TYPE_CHECKING:
    from bnpatch.data.dataset import Examples
    from bnpatch.finetune.config import FineTuneSettings
    from bnpatch.finetune.run import FineTuneResult
    from bnpatch.models.torch_model import TorchModel


@opt.in_groups
def fine_tune(
    *,
    model: opt.Model,
    data: opt.Data,
    val: Annotated[str, typer.Option(help="Validation images, in the same classes.", show_default=False)],
    metric: Annotated[str, typer.Option(help="accuracy or cross-entropy.")] = "accuracy",
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Give the model a new classifier for the classes of --data.")
    ] = False,
    trials: Annotated[int, typer.Option(min=1, help="Weights of the example to try afterwards.")] = 15,
    holdout: Annotated[
        float, typer.Option(help="Part of --val that gives the verdict, unseen by everything.")
    ] = 0.5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the last run was cut off.")] = False,
    seeds: Annotated[
        int, typer.Option(min=0, help="Compare the techniques one by one over so many seeds; 0: don't.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "bnpatch-out"
    ),
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    techniques: Techniques,
    training: Training,
    reading: opt.Reading,
    loading: opt.Loading,
) -> None:
    """Train a checkpoint further with better normalization, then tune alpha.

    Ghost Batch Norm, weight decay on scales and shifts, and Batch/Group Norm are chosen by batch size
    and architecture unless you say. Writes metrics.csv, best.pt and last.pt, then recipe.json,
    patched.pt, report.html, alpha-curve.png and trials.csv.

    Examples:
    bnpatch fine-tune model.pt --data train/ --val val/

    bnpatch fine-tune timm:resnet50.a1_in1k --data birds/train --val birds/val --new-head --epochs 30

    accelerate launch -m bnpatch_cli fine-tune model.pt --data train/ --val val/ --precision bf16
    """
    from bnpatch.core.errors import BnpatchError
    from bnpatch.core.io import check_writable, claimed
    from bnpatch.finetune.data import check_same_folders
    from bnpatch.finetune.engine import new_accelerator
    from bnpatch.finetune.run import fine_tune
    from bnpatch.models.torch_model import TorchModel
    from bnpatch.report.files import write_results
    from bnpatch.report.html import Training
    from bnpatch.search.distributed import is_first

    from .render import progress_bar

    check_writable(output)
    with claimed(output) if is_first() else nullcontext():
        loaded = loading.open(model)
        if not isinstance(loaded, TorchModel):
            raise BnpatchError(
                f"{model} is an ONNX file, which can't be trained", "give the torch checkpoint"
            )
        check_same_folders(data, val)
        loaded = _with_head(loaded, data, new_head, seed)
        options = reading.settings(loaded)
        train_options = {**options, "split_name": "train" if reading.split == "validation" else reading.split}
        examples = _opened(data, loaded, seed, train_options)
        val_examples = _opened(val, loaded, seed, options)
        settings = training.settings(metric, reading.batch_size, reading.workers, seed, len(examples))
        accelerator = new_accelerator(settings, loaded.device)
        settings = techniques.settle(loaded, examples, settings, output / "choose.db", resume)
        opt.say(f"training       {settings.spec}; decay {_decay(settings)}")
        opt.say(
            f"               {settings.epochs} epochs, {settings.optimizer}, learning rate {settings.lr:g}"
        )
        untrained = replace(loaded, module=copy.deepcopy(loaded.module)) if seeds else None
        with progress_bar() as progress:
            result = fine_tune(
                loaded,
                examples,
                val_examples,
                settings,
                holdout=holdout,
                trials=trials,
                output=output,
                resume=resume,
                progress=progress,
                on_epoch=lambda epoch: opt.say(
                    f"epoch {epoch.epoch:<8} loss {epoch.train_loss:.4f}, "
                    f"accuracy {100 * epoch.accuracy:.2f}%, cross-entropy {epoch.cross_entropy:.4f} "
                    f"({epoch.seconds:.0f} s)"
                ),
                tell=lambda note: opt.say(f"note           {note}"),
                accelerator=accelerator,
            )
        rows: list[dict[str, Any]] = []
        if untrained is not None:
            rows = _ablation(untrained, examples, val_examples, settings, seeds, holdout)
        if not is_first():  # only the first of several processes prints and writes
            return
        result.tuning.recipe.provenance["command"] = shlex.join(sys.argv[1:])
        result.tuning.recipe.provenance["fine_tuning"] = settings.to_json()
        training_report = Training(result.comparisons, [[row["name"], *row["cells"]] for row in rows])
        files = write_results(result.tuning, loaded, output, training_report)
        _show(result, loaded, files, rows, as_json)


def _with_head(model: "TorchModel", data: str, asked: bool, seed: int) -> "TorchModel":
    if not asked:
        return model
    from bnpatch.data.class_folders import ClassOrder
    from bnpatch.finetune.head import classes_of, new_head

    return new_head(model, classes_of(data, ClassOrder(model.class_order)), seed)


def _opened(data: str, model: "TorchModel", seed: int, options: dict[str, Any]) -> "Examples":
    from bnpatch import open_examples

    return open_examples(data, model, seed=seed, **options)


def _decay(settings: "FineTuneSettings") -> str:
    decay = settings.norm_decay
    if decay is None or not decay.rate:
        return "of scales and shifts: none"
    where = "all norm layers" if decay.norm_layers == "all" else f"{len(decay.norm_layers)} norm layers"
    how = "coupled" if decay.coupled else "decoupled"
    return f"of scales toward {decay.gamma_toward:.0f} and of shifts: {decay.rate:.2g}, {how}, at {where}"


def _ablation(
    model: "TorchModel",
    examples: "Examples",
    val_examples: "Examples",
    settings: "FineTuneSettings",
    seeds: int,
    holdout: float,
) -> list[dict[str, Any]]:
    from bnpatch.finetune.ablation import ablate

    from .render import progress_bar

    with progress_bar() as progress:
        rows = ablate(
            model,
            examples,
            val_examples,
            settings,
            seeds=seeds,
            holdout=holdout,
            tell=opt.say,
            progress=progress,
        )
    return [row.to_json() for row in rows]


def _show(
    result: "FineTuneResult",
    model: "TorchModel",
    files: list[Path],
    rows: list[dict[str, Any]],
    as_json: bool,
) -> None:
    from bnpatch.report.text import shown, training_sentence, verdict_sentence

    from .render import comparison_table, table

    tuning, training = result.tuning, result.training
    if as_json:
        content = {
            "best_epoch": training.best.epoch,
            "epochs": len(training.history),
            "stopped_early": training.stopped_early,
            "alpha": tuning.alpha,
            "verdict": str(tuning.verdict),
            "fine_tuned": {c.metric.name: c.to_json() for c in result.comparisons},
            "contributions": rows,
            "files": [str(f) for f in files],
            **tuning.recipe.provenance,
        }
        typer.echo(json.dumps(content))
        return
    ended = ", stopped early" if training.stopped_early else ""
    opt.say(f"best           epoch {training.best.epoch} of {len(training.history)}{ended}")
    if training.skipped:
        opt.say(f"training       {len(training.history)} epochs{opt.skipped(training.skipped)}")
    opt.put("")
    trained, weighted = (shown(c, model, tuning.metric) for c in (result.comparisons, tuning.comparisons))
    comparison_table(trained, "held-out", before="checkpoint", after="fine-tuned")
    opt.put("\nexample weighing contributes to this:\n")
    comparison_table(weighted, "held-out", before="alpha = 0", after="alpha tuned")
    opt.put(f"\n{training_sentence(result.comparisons, tuning.metric)}")
    opt.put(f"Example weighing: {verdict_sentence(tuning)}\n")
    if rows:
        columns = ["contribution, held-out", "accuracy", "change", "cross-entropy", "change"]
        table(columns, [[row["name"], *row["cells"]] for row in rows])
        opt.put("")
    opt.put(f"wrote {', '.join(str(f) for f in files)}")
