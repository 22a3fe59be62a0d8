"""Settings out of range: each is refused, and what the message names instead is accepted."""

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import pick_device
from bnpatch.core.limits import TEXT_MB
from bnpatch.core.norm_spec import NormSpec
from bnpatch.data.bit_depth import given
from bnpatch.data.corruptions import augmented
from bnpatch.data.groups import group_by
from bnpatch.finetune.config import Augmentation, FineTuneSettings
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.search.config import SearchConfig
from bnpatch.search.label_free import as_prior
from bnpatch.search.objective import ObjectiveSpec
from bnpatch.search.task import parts_of
from bnpatch.search.trackers import tracker
from bnpatch.search.tune import checked_objective
from bnpatch_cli.robustness import _severities
from tests.remedies.world import X, Y, cases, followed, loaded, opened

BYTES = (X * 40 + 100).clip(0, 255).byte()
ONE_CLASS, FEW = np.zeros(6, np.int64), (X[:2], Y[:2])


def settings(**changes):
    return FineTuneSettings(**changes)


def parts(data, **options):
    return parts_of(opened(data, **options), None, None, 0, needs_labels=True)


def search(granularity="global", timeout=None):
    return checked_objective("accuracy", granularity, timeout, SearchConfig())


CASES = {
    "severities": (
        lambda: _severities("1,x"),
        "--severities '1,x' is not a list of severities",
        "write 1,3,5",
        lambda: _severities("1,3,5"),
    ),
    "device": (
        lambda: pick_device("tpu:9"),
        "there is no device 'tpu:9' here",
        "leave out --device",
        lambda: pick_device(),
    ),
    "bit depth": (
        lambda: given(7),
        "images of 7 bits can't be read",
        "choose a --bit-depth of 8 to 32",
        lambda: [given(8), given(32)],
    ),
    "trials": (
        lambda: SearchConfig(trials=0),
        "0 trials find nothing",
        "set --trials to 1 or more",
        lambda: SearchConfig(trials=1),
    ),
    "passes": (
        lambda: SearchConfig(max_passes=0),
        "0 passes find nothing",
        "set --max-passes to 1 or more",
        lambda: SearchConfig(max_passes=1),
    ),
    "granularity": (
        lambda: search("per-layer"),
        "there is no granularity 'per-layer'",
        "choose one of auto, global, stage, layer",
        lambda: [search(name) for name in ("auto", "global", "stage", "layer")],
    ),
    "timeout": (
        lambda: search(timeout=-1),
        "-1 seconds are no time",
        "set --timeout to 0 or more",
        lambda: search(timeout=0),
    ),
    "prior in words": (
        lambda: as_prior("often,rarely,never", 3),
        "'often,rarely,never' is not a list of numbers",
        "write --class-prior 0.7,0.2,0.1",
        lambda: as_prior("0.7,0.2,0.1", 3),
    ),
    "prior of another length": (
        lambda: as_prior((0.5, 0.5), 3),
        "a class prior of 2 numbers does not fit 3 classes",
        "give one share per class",
        lambda: as_prior((0.5, 0.3, 0.2), 3),
    ),
    "prior with labels": (
        lambda: ObjectiveSpec.of("accuracy", (0.5, 0.3, 0.2), 8),
        "a class prior is for tuning without labels",
        "add --metric unlabeled",
        lambda: ObjectiveSpec.of("unlabeled", (0.5, 0.3, 0.2), 8),
    ),
    "empty group": (
        lambda: NormSpec.ghost(0),
        "a group of 0 examples is empty",
        "give 1 example or more",
        lambda: NormSpec.ghost(1),
    ),
    "crop of nothing": (
        lambda: Augmentation(min_scale=0),
        "a crop can't keep 0 of an image",
        "give more than 0, at most 1",
        lambda: [Augmentation(min_scale=scale) for scale in (0.01, 1)],
    ),
    "no epochs": (lambda: settings(epochs=0), "epochs is 0", "give 1 or more", lambda: settings(epochs=1)),
    "learning rate": (
        lambda: settings(lr=-1.0),
        "a learning rate of -1.0 is none",
        "give a positive --lr",
        lambda: settings(lr=1e-3),
    ),
    "metric to train by": (
        lambda: settings(metric="top5"),
        "there is no metric 'top5' to train by",
        "choose accuracy or cross-entropy",
        lambda: [settings(metric=name) for name in ("accuracy", "cross-entropy")],
    ),
    "precision": (
        lambda: settings(precision="fp8"),
        "there is no precision 'fp8'",
        "choose no, fp16, bf16",
        lambda: [settings(precision=name) for name in ("no", "fp16", "bf16")],
    ),
    "schedule": (
        lambda: settings(schedule="plateau"),
        "the schedule plateau can't be resumed",
        "choose cosine, tanh, step or poly",
        lambda: [settings(schedule=name) for name in ("cosine", "tanh", "step", "poly")],
    ),
    "odd batch": (
        lambda: settings(batch_size=7, augmentation=Augmentation(mixup=0.2)),
        "mixup and cutmix pair images, 7 is odd",
        "give an even batch",
        lambda: settings(batch_size=8, augmentation=Augmentation(mixup=0.2)),
    ),
    "negative decay": (
        lambda: NormDecay(-1),
        "a weight decay of -1 is none",
        "give 0 or more",
        lambda: NormDecay(0),
    ),
    "decay toward 3": (
        lambda: NormDecay(1e-4, gamma_toward=3),
        "scales don't decay toward 3",
        "choose 1 or 0",
        lambda: [NormDecay(1e-4, gamma_toward=end) for end in (1, 0)],
    ),
    "strength": (
        lambda: augmented(opened((BYTES, Y)), "noise", strength=9),
        "a strength of 9 is out of range",
        "choose up to 1.5",
        lambda: augmented(opened((BYTES, Y)), "noise", strength=1.5),
    ),
    "augmented floats": (
        lambda: augmented(opened((X, Y)), "noise"),
        "inputs that are floats can't be augmented",
        "give images as bytes or files",
        lambda: augmented(opened((BYTES, Y)), "noise"),
    ),
    "one class": (
        lambda: parts((X, ONE_CLASS)),
        "all examples are of one class",
        "with the classes that",
        lambda: parts((X, Y)),
    ),
    "too few": (
        lambda: parts(FEW),
        "2 examples: too few to tune on some and to judge by others",
        "give more data",
        lambda: parts((X, Y)),
    ),
    "too few groups": (
        lambda: parts((X, Y), groups=list("aaabbb")),
        "all examples to tune on are of one group",
        "give images of more groups",
        lambda: parts((BYTES.repeat(2, 1, 1, 1), np.tile(Y, 2)), groups=list("aabbccddeeff")),
    ),
}


@pytest.mark.filterwarnings("ignore::bnpatch.core.errors.BnpatchWarning")
@cases(CASES)
def test_what_the_message_names_instead_is_accepted(name):
    fails, problem, remedy, follow = CASES[name]
    followed(fails, problem, remedy, lambda _: follow())


def test_a_tracker_that_is_named_is_known(tmp_path):
    with pytest.raises(BnpatchError, match="there is no tracker 'comet'") as error:
        tracker("comet", "accuracy", tmp_path)
    assert error.value.remedy == "choose tensorboard, mlflow, wandb"


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(TEXT_MB.name, "much")
    with pytest.raises(BnpatchError, match="set a positive number"):
        TEXT_MB.check(1, "a text")
    monkeypatch.setenv(TEXT_MB.name, "0.5")
    with pytest.raises(
        BnpatchError,
        match=f"and the limit is 0.5; .* set the environment variable {TEXT_MB.name} to a higher",
    ):
        TEXT_MB.check(1, "a text")
    monkeypatch.setenv(TEXT_MB.name, "2")
    TEXT_MB.check(1, "a text")


def test_tables_of_groups(tmp_path):
    table = tmp_path / "groups.csv"
    with pytest.raises(
        BnpatchError, match=r"cannot read .*groups\.csv.*; give a file with name,group in each line"
    ):
        group_by(str(table))
    table.write_text("a/1.png\n")
    with pytest.raises(BnpatchError, match=r"has the line 'a/1\.png'; write a name and a group in each line"):
        group_by(str(table))
    table.write_text("a/1.png,first\n")
    assert group_by(str(table))("a/1.png") == "first"


def test_a_search_of_examples_that_are_open_takes_no_groups():
    model = loaded()
    with pytest.raises(BnpatchError, match="the examples are open already; give groups to open_examples"):
        bnpatch.tune_alpha(model, bnpatch.open_examples((X, Y), model), groups=list("aabbcc"))
    assert bnpatch.open_examples((X, Y), model, groups=list("aabbcc")).num_groups(np.arange(6)) == 3
