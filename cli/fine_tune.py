"""``bnpatch fine-tune``."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import check_writable, claimed
from bnpatch.core.text import counted

from . import options as opt
from . import recipes
from .console import put, say, skipped
from .training_options import Run, Techniques, Training

if TYPE_CHECKING:
    from bnpatch.data.dataset import Examples
    from bnpatch.finetune.checkpoint import Epoch
    from bnpatch.finetune.config import FineTuneSettings
    from bnpatch.finetune.run import FineTuneResult
    from bnpatch.models.torch_model import TorchModel


@opt.in_groups
def fine_tune(
    *,
    model: opt.Model,
    data: opt.Data,
    val: Annotated[str, typer.Option(help="Validation images, in the same classes.", show_default=False)],
    run: Run,
    group_by: opt.GroupBy = None,
    output: opt.Output = Path("bnpatch-out"),
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
    from bnpatch.finetune.engine import new_accelerator
    from bnpatch.report.files import write_results
    from bnpatch.report.tables import TrainingResults
    from bnpatch.search.distributed import is_first

    from .render import progress_bar

    groups = opt.groups_of(group_by)
    check_writable(output)
    with claimed(output) if is_first() else nullcontext():
        loaded = _opened_model(loading, model, (data, val), run.new_head, seed)
        options = {**reading.settings(loaded), "groups": groups}
        examples, val_examples = _opened_examples(data, val, loaded, seed, options)
        settings = training.settings(run.metric, reading.batch_size, reading.workers, seed, len(examples))
        accelerator = new_accelerator(settings, loaded.device)
        settings = techniques.settle(loaded, examples, settings, output / "choose.db", run.resume)
        say(f"training       {settings.spec}; decay {_decay(settings)}")
        say(f"               epochs {settings.epochs}, {settings.optimizer}, learning rate {settings.lr:g}")
        untrained = replace(loaded, module=copy.deepcopy(loaded.module)) if run.seeds else None
        with progress_bar() as progress:
            result = bnpatch.fine_tune(
                loaded,
                examples,
                val_examples,
                settings,
                holdout=run.holdout,
                trials=run.trials,
                output=output,
                resume=run.resume,
                progress=progress,
                on_epoch=_say_epoch,
                tell=lambda note: say(f"note           {note}"),
                accelerator=accelerator,
            )
        rows = [] if untrained is None else _ablation(untrained, examples, val_examples, settings, run)
        if not is_first():  # only the first of several processes prints and writes
            return
        result.tuning.recipe.provenance["command"] = recipes.command()
        result.tuning.recipe.provenance["fine_tuning"] = settings.to_json()
        trained = TrainingResults(result.comparisons, [[row["name"], *row["cells"]] for row in rows])
        files = write_results(result.tuning, loaded, output, trained)
        if as_json:
            typer.echo(json.dumps(_as_json(result, files, rows)))
        else:
            _show(result, loaded, files, rows)


def _opened_model(
    loading: opt.Loading, model: str, folders: tuple[str, str], new_head: bool, seed: int
) -> "TorchModel":
    """Load a model for training and validation images in these folders, which have the same classes."""
    from bnpatch.data.class_targets import ClassOrder
    from bnpatch.finetune import head
    from bnpatch.finetune.data import check_same_folders
    from bnpatch.models.torch_model import TorchModel

    loaded = loading.open(model)
    if not isinstance(loaded, TorchModel):
        raise BnpatchError(f"{model} is an ONNX file, which can't be trained", "give the torch checkpoint")
    check_same_folders(*folders)
    if not new_head:
        return loaded
    return head.new_head(loaded, head.classes_of(folders[0], ClassOrder(loaded.class_order)), seed)


def _opened_examples(
    data: str, val: str, model: "TorchModel", seed: int, options: dict[str, Any]
) -> "tuple[Examples, Examples]":
    """Open the training and the validation images, and warn if a group has images in both."""
    from bnpatch.data.groups import warn_of_shared_groups

    examples = bnpatch.open_examples(data, model, seed=seed, **_of_training(options))
    val_examples = bnpatch.open_examples(val, model, seed=seed, **options)
    if options["groups"] is not None:
        warn_of_shared_groups(options["groups"], examples.source, val_examples.source)
    return examples, val_examples


def _of_training(options: dict[str, Any]) -> dict[str, Any]:
    """Options of :func:`bnpatch.open_examples` for the training images."""
    return {**options, "split_name": "train"} if options["split_name"] == "validation" else options


def _say_epoch(epoch: "Epoch") -> None:
    say(
        f"epoch {epoch.epoch:<8} loss {epoch.train_loss:.4f}, accuracy {100 * epoch.accuracy:.2f}%, "
        f"cross-entropy {epoch.cross_entropy:.4f} ({epoch.seconds:.0f} s)"
    )


def _decay(settings: "FineTuneSettings") -> str:
    decay = settings.norm_decay
    if decay is None or not decay.rate:
        return "of scales and shifts: none"
    where = "all norm layers" if decay.norm_layers == "all" else counted(len(decay.norm_layers), "norm layer")
    how = "coupled" if decay.coupled else "decoupled"
    return f"of scales toward {decay.gamma_toward:.0f} and of shifts: {decay.rate:.2g}, {how}, at {where}"


def _ablation(
    model: "TorchModel",
    examples: "Examples",
    val_examples: "Examples",
    settings: "FineTuneSettings",
    run: Run,
) -> list[dict[str, Any]]:
    from bnpatch.finetune.ablation import ablate
    from bnpatch.finetune.config import Callbacks

    from .render import progress_bar

    with progress_bar() as progress:
        rows = ablate(
            model,
            examples,
            val_examples,
            settings,
            seeds=run.seeds,
            holdout=run.holdout,
            callbacks=Callbacks(progress=progress, tell=say),
        )
    return [row.to_json() for row in rows]


def _as_json(result: "FineTuneResult", files: list[Path], rows: list[dict[str, Any]]) -> dict[str, Any]:
    tuning, training = result.tuning, result.training
    return {
        "best_epoch": training.best.epoch,
        "epochs": len(training.history),
        "stopped_early": training.stopped_early,
        "alpha": tuning.alpha,
        "verdict": tuning.verdict,
        "fine_tuned": {c.metric.name: c.to_json() for c in result.comparisons},
        "contributions": rows,
        "files": [str(f) for f in files],
        **tuning.recipe.provenance,
    }


def _show(
    result: "FineTuneResult", model: "TorchModel", files: list[Path], rows: list[dict[str, Any]]
) -> None:
    from bnpatch.report.text import shown, training_sentence, verdict_sentence

    from .render import comparison_table, table

    tuning, training = result.tuning, result.training
    ended = ", stopped early" if training.stopped_early else ""
    say(f"best           epoch {training.best.epoch} of {len(training.history)}{ended}")
    if training.skipped:
        say(f"training       {counted(len(training.history), 'epoch')}{skipped(training.skipped)}")
    put("")
    trained, weighted = (shown(c, model, tuning.metric) for c in (result.comparisons, tuning.comparisons))
    comparison_table(trained, "held-out", before="checkpoint", after="fine-tuned")
    put("\nexample weighing contributes to this:\n")
    comparison_table(weighted, "held-out", before="alpha = 0", after="alpha tuned")
    put(f"\n{training_sentence(result.comparisons, tuning.metric)}")
    put(f"Example weighing: {verdict_sentence(tuning)}\n")
    if rows:
        columns = ["contribution, held-out", "accuracy", "change", "cross-entropy", "change"]
        table(columns, [[row["name"], *row["cells"]] for row in rows])
        put("")
    put(f"wrote {', '.join(str(f) for f in files)}")
