"""Training as a whole, on small real images: what it writes, how it ends, and how it goes on."""

import copy
import csv
import math
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.finetune.config import Augmentation, Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.engine import Engine
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.trainer import NotFiniteLossError, train
from tests.two_processes import in_two_processes

PLAIN = Augmentation(min_scale=1.0, hflip=0.0)
SETTINGS = FineTuneSettings(spec=NormSpec.ghost(8), epochs=2, batch_size=16, lr=0.02, augmentation=PLAIN)
TRAIN, VAL = 64, 40  # examples: four steps in an epoch


@pytest.fixture(scope="module")
def opened(checkpoint, digits):
    """A classifier with little to train on and little to validate with."""
    (images, labels), (others, other_labels) = digits
    model = bnpatch.load(checkpoint, device="cpu")
    train_examples = bnpatch.open_examples((images[:TRAIN], labels[:TRAIN]), model)
    val_examples = bnpatch.open_examples((others[:VAL], other_labels[:VAL]), model)
    return model, RunExamples(train_examples, val_examples)


def fresh(model):
    return replace(model, module=copy.deepcopy(model.module))


def run(opened, settings=SETTINGS, **options):
    model = fresh(opened[0])
    return model, train(model, opened[1], settings, **options)


def weights(model):
    return model.module.state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_training_gets_better_at_what_it_trains_on(opened):
    """A head of zeros gives all classes alike: a loss of ln 10 before the first step."""
    model = fresh(opened[0])
    nn.init.zeros_(model.module.fc.weight)
    nn.init.zeros_(model.module.fc.bias)
    settings = replace(SETTINGS, epochs=4, optimizer="adamw", lr=3e-3)
    result = train(model, opened[1], settings)
    losses = [epoch.train_loss for epoch in result.history]
    # Ten seeds of the classifier: 2.24 to 2.26 in the first epoch, and 1.44 to 1.53 in the last.
    assert losses[0] < math.log(10)
    assert losses[-1] < 0.8 * losses[0]
    assert result.best == max(result.history, key=lambda e: (e.accuracy, -e.epoch))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_writes_the_best_epoch_and_all_metrics(opened, tmp_path, ema):
    model, result = run(opened, replace(SETTINGS, ema=ema, metric="cross-entropy"), output=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "best.pt", "metrics.csv"}
    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(line["epoch"]) for line in lines] == [1, 2]
    assert float(lines[0]["lr"]) > float(lines[1]["lr"]) > 0  # cosine
    best = min(result.history, key=lambda e: e.cross_entropy)
    assert result.best == best
    for candidate in (model, bnpatch.load(tmp_path / "best.pt", device="cpu")):
        scores = bnpatch.evaluate(candidate, opened[1].val)
        assert np.mean(scores.values["cross-entropy"]) == pytest.approx(best.cross_entropy, rel=1e-5)
    assert not model.module.training


def test_averaged_weights_are_other_weights(opened):
    plain, averaged = (run(opened, replace(SETTINGS, epochs=1, ema=ema))[0] for ema in (None, 0.99))
    name = "conv1.weight" if "conv1.weight" in weights(plain) else next(iter(weights(plain)))
    assert not torch.equal(weights(plain)[name], weights(averaged)[name])


def test_the_seed_decides_everything(opened):
    augmentation = Augmentation(auto_augment="rand-m9-n1", random_erasing=0.5)
    settings = replace(SETTINGS, epochs=1, augmentation=augmentation)
    first, again, other = (run(opened, replace(settings, seed=seed))[0] for seed in (1, 1, 2))
    assert_same(weights(first), weights(again))
    assert any(not torch.equal(v, weights(other)[k]) for k, v in weights(first).items())


@pytest.mark.slow
def test_worker_processes_and_mixup(opened):
    augmentation = Augmentation(mixup=0.2, cutmix=1.0, auto_augment="rand-m9")
    settings = replace(SETTINGS, workers=2, augmentation=augmentation, smoothing=0.1)
    first, again = (run(opened, replace(settings, epochs=1))[0] for _ in range(2))
    assert_same(weights(first), weights(again))


def test_accumulation_is_a_larger_batch(opened):
    """Group Norm doesn't see the batch: four batches of 8 give the step of one of 32."""
    settings = replace(SETTINGS, spec=NormSpec.group(8), epochs=1, lr=0.01)
    whole, _ = run(opened, replace(settings, batch_size=32))
    parts, _ = run(opened, replace(settings, batch_size=8, accumulate=4))
    for name, value in weights(whole).items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(value, weights(parts)[name], rtol=1e-3, atol=1e-4)


KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from tests.finetune.test_loop import *
    (threads, checkpoint, data, folder) = sys.argv[1:]
    torch.set_num_threads(int(threads))
    arrays = np.load(data)
    model = bnpatch.load(checkpoint, device="cpu")
    pairs = [(arrays[f"arr_{i}"], arrays[f"arr_{i + 1}"]) for i in (0, 2)]
    def progress(label, done, total):
        if done == TRAIN + TRAIN // 2:  # amid the second epoch
            os.kill(os.getpid(), signal.SIGKILL)
    examples = RunExamples(*(bnpatch.open_examples(pair, model) for pair in pairs))
    train(model, examples, KILLED_SETTINGS, output=Path(folder), callbacks=Callbacks(progress))
"""
KILLED_SETTINGS = replace(
    SETTINGS,
    epochs=3,
    ema=0.9,
    norm_decay=NormDecay(1e-3),
    augmentation=Augmentation(hflip=0.0, random_erasing=0.5),
)


@pytest.mark.slow
def test_goes_on_bit_for_bit_after_a_kill(opened, checkpoint, digits, tmp_path):
    (images, labels), (others, other_labels) = digits
    np.savez(tmp_path / "data.npz", images[:TRAIN], labels[:TRAIN], others[:VAL], other_labels[:VAL])
    folder = tmp_path / "killed"
    arguments = [torch.get_num_threads(), checkpoint, tmp_path / "data.npz", folder]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    run(opened, KILLED_SETTINGS, output=folder, resume=True)
    run(opened, KILLED_SETTINGS, output=tmp_path / "whole")
    ours, theirs = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("killed", "whole")
    )
    for key in ("model", "ema"):
        assert_same(ours[key], theirs[key])
    assert_same(ours["best"]["model"], theirs["best"]["model"])
    assert len(ours["history"]) == 3
    for a, b in zip(ours["history"], theirs["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_resuming_what_is_finished_changes_nothing(opened, tmp_path):
    first, result = run(opened, output=tmp_path)
    again, repeated = run(opened, output=tmp_path, resume=True)
    assert repeated.history == result.history
    assert_same(weights(first), weights(again))


def test_a_resume_file_must_be_whole_and_of_this_run(opened, tmp_path):
    settings = replace(SETTINGS, epochs=1)
    run(opened, settings, output=tmp_path)
    with pytest.raises(BnpatchError, match=r"of another run: settings\.lr differs"):
        run(opened, replace(settings, lr=0.5), output=tmp_path, resume=True)
    content = (tmp_path / "last.pt").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"hello"):
        (tmp_path / "last.pt").write_bytes(broken)
        with pytest.raises(BnpatchError, match=r"last\.pt is damaged"):
            run(opened, settings, output=tmp_path, resume=True)


def test_stops_early(opened, monkeypatch):
    """Steps that change nothing leave the score as it is: no epoch is better than the first."""
    monkeypatch.setattr(Engine, "step", lambda engine, update: engine.drop_gradient())
    _, result = run(opened, replace(SETTINGS, epochs=9, patience=2, spec=NormSpec.group(8)))
    assert result.stopped_early
    assert len(result.history) == 3
    assert result.best.epoch == 1


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_weights(opened, tmp_path):
    model = fresh(opened[0])

    def poison(epoch):
        next(model.module.parameters()).data.fill_(float("nan"))

    with pytest.raises(NotFiniteLossError, match=r"in epoch 2; the weights of epoch 1 are kept"):
        train(model, opened[1], SETTINGS, output=tmp_path, callbacks=Callbacks(on_epoch=poison))
    assert all(torch.isfinite(value).all() for value in weights(model).values())
    assert_same(weights(bnpatch.load(tmp_path / "best.pt", device="cpu")), weights(model))


def test_divergence_in_the_first_epoch_says_so(opened):
    with pytest.raises(NotFiniteLossError, match="no epoch was finished"):
        run(opened, replace(SETTINGS, lr=1e30))


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize(
    ("epoch", "message"),
    [(1, "in epoch 1; no epoch was finished"), (2, "in epoch 2; the weights of epoch 1 are kept")],
)
def test_a_last_step_that_ruins_the_weights_is_divergence(opened, monkeypatch, tmp_path, ema, epoch, message):
    step = Engine.step

    def ruin(engine, update):
        step(engine, update)
        if update == 4 * epoch - 1:  # no loss comes after it in its epoch
            next(engine.scored.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Engine, "step", ruin)
    model = fresh(opened[0])
    with pytest.raises(NotFiniteLossError, match=f"{message}.*lower --lr"):
        train(model, opened[1], replace(SETTINGS, ema=ema), output=tmp_path)
    assert all(torch.isfinite(value).all() for value in weights(model).values())
    assert (tmp_path / "best.pt").exists() == (epoch > 1)
    if epoch > 1:
        assert_same(weights(bnpatch.load(tmp_path / "best.pt", device="cpu")), weights(model))


def test_a_model_that_is_broken_before_it_is_trained_has_not_diverged(opened):
    model = fresh(opened[0])
    next(b for name, b in model.module.named_buffers() if "running_mean" in name).fill_(float("nan"))
    with pytest.raises(OutputsNotFiniteError, match="check the weights"):
        train(model, opened[1], SETTINGS)


def test_halves_the_batch_where_memory_is_short(opened):
    model, told = fresh(opened[0]), []

    def refuse(module, args):
        if module.training and len(args[0]) > 8:  # half of a batch
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.module.register_forward_pre_hook(refuse)
    result = train(model, opened[1], SETTINGS, callbacks=Callbacks(tell=told.append))
    assert [epoch.batch_size for epoch in result.history] == [8, 8]
    assert len(told) == 1
    assert "batches of 16: two of 8" in told[0]


def test_a_group_that_no_halved_batch_holds_ends_the_run(opened):
    model = fresh(opened[0])

    def refuse(module, args):
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.module.register_forward_pre_hook(refuse)
    with pytest.raises(BnpatchError, match="a batch of 4 has no group of 8"):
        train(model, opened[1], SETTINGS)


def test_other_errors_are_not_taken_for_a_lack_of_memory(opened):
    model = fresh(opened[0])

    def refuse(module, args):
        raise RuntimeError("something else")

    model.module.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="something else"):
        train(model, opened[1], SETTINGS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "nope"}, "no optimizer 'nope'"),
        ({"schedule": "nope"}, "no schedule 'nope'"),
        ({"batch_size": 256}, "64 training examples, and a step takes 256"),
    ],
)
def test_settings_that_do_not_fit(opened, values, message):
    with pytest.raises(BnpatchError, match=message):
        run(opened, replace(SETTINGS, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 4}, "a batch of 4 has no group of 8"),
        ({"lr": 0.0}, "learning rate"),
        ({"epochs": 0}, "epochs is 0"),
        ({"metric": "beauty"}, "no metric"),
        ({"precision": "fp7"}, "no precision"),
        ({"schedule": "plateau"}, "can't be resumed"),
        ({"batch_size": 33, "augmentation": Augmentation(mixup=0.1)}, "33 is odd"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(BnpatchError, match=message):
        replace(SETTINGS, **values)


def test_validation_must_have_no_class_of_its_own(opened, digits):
    model, val = opened[0], opened[1].val
    (images, labels), _ = digits
    few = labels < 5
    examples = bnpatch.open_examples((images[few], labels[few]), model)
    with pytest.raises(BnpatchError, match=r"has the class '5', of which the training data has no example"):
        train(fresh(model), RunExamples(examples, val), SETTINGS)


def test_all_examples_must_have_a_class(opened, digits):
    model, known = opened[0], opened[1].train
    (images, labels), _ = digits
    some = bnpatch.open_examples(
        (images[:64], np.where(labels[:64], labels[:64], -1)), model, labels="optional"
    )
    for pair, name in (((some, known), "training"), ((known, some), "validation")):
        with pytest.raises(BnpatchError, match=f"the {name} data has examples without a class"):
            train(fresh(model), RunExamples(*pair), SETTINGS)


def test_weights_that_were_tuned_before_are_dropped(opened):
    model = fresh(opened[0])
    model.set_state(
        model.state.with_re_estimated(
            model.moments_by_batch(3 * torch.rand(8, *model.preprocessing.input_size))
        )
    )
    names = list(model.alphas())
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.3), dict.fromkeys(names, 0.5)))
    train(model, opened[1], replace(SETTINGS, epochs=1))
    zeros = dict.fromkeys(names, 0.0)
    assert model.weights == PatchWeights(zeros, zeros, zeros, zeros)
    assert not model.statistics_in_use()
    assert_same(weights(model), weights(run(opened, replace(SETTINGS, epochs=1))[0]))


def test_half_precision(opened):
    _, result = run(opened, replace(SETTINGS, epochs=1, precision="bf16"))
    assert np.isfinite(result.best.train_loss)


def test_a_precision_that_the_device_lacks(opened):
    with pytest.raises(BnpatchError, match="a CPU does not train in fp16"):
        run(opened, replace(SETTINGS, precision="fp16"))
    run(opened, replace(SETTINGS, epochs=1))  # the refused one has left nothing behind


def test_says_what_to_install(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BnpatchError, match=r"needs accelerate; pip install 'bnpatch\[fine-tune\]'"):
        run(opened)


@pytest.mark.slow
def test_processes_do_not_wait_for_what_does_not_come():
    """Gradients of what one of them leaves out; scores after the loss of one is not finite."""
    printed = in_two_processes("tests.finetune.process_worker").splitlines()
    ends = {"TwoHeads": "trained", "OneOfTwoHeads": "trained", "AtRandom": "trained", "Diverges": "diverged"}
    assert sorted(printed) == sorted(2 * [f"{name} {end}" for name, end in ends.items()])
