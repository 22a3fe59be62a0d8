"""Fine-tuning: settings, data and checkpoints of a run that don't fit, and what to do about it."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import bnpatch
from bnpatch.core.norm_spec import NormSpec, Renorm
from bnpatch.data.class_targets import ClassOrder
from bnpatch.finetune.config import Augmentation, FineTuneSettings
from bnpatch.finetune.data import RunExamples, check_same_folders
from bnpatch.finetune.engine import Engine, new_accelerator
from bnpatch.finetune.head import classes_of
from bnpatch.finetune.technique_search import by_search
from bnpatch.finetune.trainer import train
from bnpatch.models.load import load
from bnpatch_cli.app import app
from bnpatch_cli.training_options import Techniques
from tests.onnx.build import bn_model
from tests.remedies.world import SIDE, X, Y, cases, followed, loaded, onnx_file

PLAIN = Augmentation(min_scale=1.0, hflip=0.0)
SETTINGS = FineTuneSettings(spec=NormSpec.batch(), epochs=1, batch_size=2, lr=0.01, augmentation=PLAIN)
CPU = torch.device("cpu")
BYTES = (X * 40 + 100).clip(0, 255).byte()
UNKNOWN = np.array([0, 1, 2, 0, 1, -1])


def run(y=Y, val=Y, output=None, resume=False, **change):
    model = loaded()
    data = ((BYTES, part) for part in (y, val))
    examples = RunExamples(*(bnpatch.open_examples(part, model, labels="optional") for part in data))
    return train(model, examples, replace(SETTINGS, **change), output=output, resume=resume)


def once_more(w, damage=lambda path: None, **change):
    """Go on with a run that is over, whose last state was changed."""
    run(output=w.folder)
    damage(w.folder / "last.pt")
    run(output=w.folder, resume=True, **change)


def of_another_version(path):
    torch.save({**torch.load(path, weights_only=True), "format": -1}, path)


def chosen(w, resume=True, **change):
    model = loaded()
    examples = bnpatch.open_examples((BYTES.repeat(2, 1, 1, 1), np.tile(Y, 2)), model)
    settings, options = replace(SETTINGS, **change), {"trials": 1, "epochs": 1}
    by_search(model, examples, settings, database=w.folder / "runs.db", resume=resume, **options)


def without_memory(batch_size):
    """Train where batches of more than two examples do not fit."""
    right = Engine.add_gradient
    with pytest.MonkeyPatch.context() as patch:

        def add_gradient(engine, x, *rest):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return right(engine, x, *rest)

        patch.setattr(Engine, "add_gradient", add_gradient)
        run(batch_size=batch_size)


def with_one_value_per_channel(batch_size):
    """A norm of vectors, which can't be trained on one of them."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = load(layers.eval(), preprocessing={"img_size": SIDE})
    examples = bnpatch.open_examples((BYTES, Y), model)
    train(model, RunExamples(examples, examples), replace(SETTINGS, batch_size=batch_size))


def folders(w, *names):
    return w.images(*(f"{name}/1.png" for name in names), root="-".join(names))


def techniques(**options):
    return lambda w: Techniques(**options)._check()


def on_a_graph(w):
    path, data = onnx_file(w, bn_model()), folders(w, "a", "b")
    app(["fine-tune", str(path), "--data", str(data), "--val", str(data)], standalone_mode=False)


def on_a_checkpoint(w):
    data = folders(w, *(str(number) for number in range(10)))
    few = ("--epochs", "1", "--batch-size", "2", "--output", str(w.folder / "out"))
    app(
        ["fine-tune", str(w.checkpoint), "--data", str(data), "--val", str(data), *few], standalone_mode=False
    )


CASES = {
    "another run": (
        lambda w: once_more(w, lr=0.02),
        "is of another run: settings.lr differs",
        "repeat the command as it was, or leave out --resume",
        lambda w: [run(output=w.folder, resume=True), run(output=w.folder, lr=0.02)],
    ),
    "another version": (
        lambda w: once_more(w, of_another_version),
        "is of another version of bnpatch",
        "start anew without --resume",
        lambda w: run(output=w.folder),
    ),
    "a damaged state": (
        lambda w: once_more(w, lambda path: path.write_bytes(b"PK")),
        "is damaged: the run can't go on from it",
        "start anew without --resume",
        lambda w: run(output=w.folder),
    ),
    "another search": (
        lambda w: [chosen(w), chosen(w, lr=0.02)],
        "is of another search: .*lr differs",
        "repeat the command as it was, or leave out --resume",
        lambda w: [chosen(w), chosen(w, lr=0.02, resume=False)],
    ),
    "too small a batch": (
        lambda w: replace(SETTINGS, spec=NormSpec.ghost(4)),
        "a batch of 2 has no group of 4 examples",
        "give a larger --batch-size or a smaller --ghost-batch-size",
        lambda w: [
            replace(SETTINGS, spec=NormSpec.ghost(4), batch_size=4),
            replace(SETTINGS, spec=NormSpec.ghost(2)),
        ],
    ),
    "too large a batch": (
        lambda w: run(batch_size=8),
        "6 training examples, and a step takes 8",
        "lower --batch-size",
        lambda w: run(batch_size=6),
    ),
    "one example": (
        lambda w: with_one_value_per_channel(1),
        "a norm can't train on one value per channel",
        "raise --batch-size",
        lambda w: with_one_value_per_channel(2),
    ),
    "no memory": (
        lambda w: without_memory(5),
        "not enough memory for a batch of 5",
        "lower --batch-size",
        lambda w: without_memory(2),
    ),
    "half precision on a CPU": (
        lambda w: new_accelerator(replace(SETTINGS, precision="fp16"), CPU),
        "a CPU does not train in fp16",
        "choose --precision bf16 or no",
        lambda w: [new_accelerator(replace(SETTINGS, precision=name), CPU) for name in ("bf16", "no")],
    ),
    "schedule": (
        lambda w: run(schedule="sine"),
        "timm has no schedule 'sine'",
        "choose cosine, tanh, step or poly",
        lambda w: run(schedule="cosine"),
    ),
    "optimizer": (
        lambda w: run(optimizer="sdg"),
        "timm has no optimizer 'sdg'",
        r"see timm\.optim\.list_optimizers\(\)",
        lambda w: run(optimizer=timm.optim.list_optimizers(filter="sg*")[0]),
    ),
    "diverged": (
        lambda w: run(lr=1e38),
        "the loss is no longer a number in epoch 1",
        "lower --lr, or set --clip-grad",
        lambda w: run(),
    ),
    "diverged, all of them": (
        lambda w: chosen(w, lr=1e38),
        "every run diverged",
        "lower --lr",
        lambda w: chosen(w, resume=False),
    ),
    "images without a class": (
        lambda w: run(y=UNKNOWN),
        "the training data has examples without a class",
        "give labelled images",
        lambda w: run(),
    ),
    "classes that are not trained": (
        lambda w: run(y=Y.clip(0, 1)),
        "the validation data has the class 2",
        "give data sets with the same classes",
        lambda w: run(y=Y.clip(0, 1), val=Y.clip(0, 1)),
    ),
    "other folders": (
        lambda w: check_same_folders(folders(w, "a", "b"), folders(w, "a", "c")),
        "has the class folder 'b', .*a-c has not",
        "give data sets with the same classes",
        lambda w: check_same_folders(folders(w, "a", "b"), folders(w, "a", "b")),
    ),
    "classes for a new head": (
        lambda w: classes_of("torch/cifar10", ClassOrder.NATURAL),
        "cannot count the classes of torch/cifar10",
        "give a folder with a folder per class",
        lambda w: classes_of(folders(w, "a", "b"), ClassOrder.NATURAL),
    ),
    "a graph": (
        on_a_graph,
        "is an ONNX file, which can't be trained",
        "give the torch checkpoint",
        on_a_checkpoint,
    ),
    "renorm with groups": (
        lambda w: NormSpec(examples_per_group=2, renorm=Renorm()),
        "Batch Renormalization has no groups",
        "leave out the groups or the renorm",
        lambda w: [NormSpec(examples_per_group=2), NormSpec(renorm=Renorm())],
    ),
    "--ghost-batch-size": (
        techniques(ghost_batch_size="half"),
        "--ghost-batch-size 'half' is neither auto nor a number",
        "give one of these",
        lambda w: [techniques(ghost_batch_size=value)(w) for value in ("auto", "8")],
    ),
    "--choose": (
        techniques(choose="luck"),
        "--choose 'luck'",
        "choose guidance or search",
        lambda w: [techniques(choose=value)(w) for value in ("guidance", "search")],
    ),
    "--norm-weight-decay-sites": (
        techniques(norm_weight_decay_sites="some"),
        "--norm-weight-decay-sites 'some'",
        "choose reachable or all",
        lambda w: [techniques(norm_weight_decay_sites=value)(w) for value in ("reachable", "all")],
    ),
}


@pytest.mark.filterwarnings("ignore")
@cases(CASES, slow=("a graph", "another search", "diverged, all of them"))
def test_training(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))
