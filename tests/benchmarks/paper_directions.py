"""Does training here show what the paper shows? Fashion-MNIST subsets, small networks, minutes each.

One table per claim of Summers & Dinneen (2020), means over seeds of held-out examples:

- ``ghost``: accuracy against the ghost size (Fig. 3), and what tuning alpha adds (Fig. 4);
- ``classes``: batches of few classes (Table 1), with and without example weighing;
- ``small``: a batch of two, Group Norm against Batch/Group Norm (section 3.4);
- ``decay``: decay of scales and shifts, in a residual network and in one of Inception's kind (section 3.3).
"""

import copy
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

import bnpatch
from bnpatch.core.norm_spec import NormSpec
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.finetune.config import Augmentation, Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples, TrainingData
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.trainer import train
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.tracing import unnormalized_norms
from tests.benchmarks.fashion_mnist import read

SIDE = 32
ALPHAS = [0.0, *np.geomspace(0.001, 1.0, 13)]


def residual():
    """A ResNet whose last maps are 4 x 4: groups of two examples still pool more than two values."""
    blocks, width = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2), (64, 1), (64, 1)):
        shortcut = None
        if channels != width:
            conv = nn.Conv2d(width, channels, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
        blocks.append(BasicBlock(width, channels, stride, shortcut))
        width = channels
    stem = Inception.unit(1, 16, 3, 2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Inception(nn.Module):
    """Branches that are concatenated and normalized again: only the last block's norms reach the output."""

    def __init__(self, width=16, blocks=3, num_classes=10):
        super().__init__()
        self.stem = self.unit(1, width, 3, 2)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            branches = [
                self.unit(width, width // 2, 1),
                nn.Sequential(self.unit(width, width // 2, 1), self.unit(width // 2, width // 2, 3)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), self.unit(width, width // 2, 1)),
                nn.Sequential(self.unit(width, width // 2, 1), self.unit(width // 2, width // 2, 5)),
            ]
            self.blocks.append(nn.ModuleList(branches))
            width = 2 * width
        self.head = nn.Linear(width, num_classes)

    @staticmethod
    def unit(channels, width, kernel, stride=1):
        conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        for branches in self.blocks:
            x = F.max_pool2d(torch.cat([branch(x) for branch in branches], 1), 2)
        return self.head(x.mean((2, 3)))


def of_few_classes(data, epoch, batch_size, accumulate=1, num_classes=4):
    """Batches of random classes, drawn anew for each (the paper's Table 1); for ``TrainingData.batches``."""
    targets, rng = data.examples.targets, np.random.default_rng([data.seed, epoch])
    members = {c: rng.permutation(np.flatnonzero(targets == c)) for c in np.unique(targets)}
    taken, batches = dict.fromkeys(members, 0), []
    for _ in range(len(targets) // batch_size):
        chosen = rng.choice(list(members), num_classes, replace=False)
        parts = []
        for c, count in zip(chosen, np.bincount(np.arange(batch_size) % num_classes), strict=True):
            parts.append(np.take(members[c], range(taken[c], taken[c] + count), mode="wrap"))
            taken[c] += count
        batches.append(rng.permutation(np.concatenate(parts)))
    return batches


TRAIN, TEST, EPOCHS, SEEDS, RATE = 5000, 2500, 8, 3, 0.1
DECAY = {"residual": residual, "Inception-like": Inception}


def settings():
    """How to train, by direction and name of setting."""
    steps = EPOCHS * (TRAIN // 64)
    specs = [NormSpec.batch(), NormSpec.batch_renorm(warmup=steps // 4)]
    specs += [*map(NormSpec.ghost, (32, 16, 8, 4, 2)), NormSpec.batch_group(16)]
    of_two = (NormSpec.batch(), NormSpec.group(16), NormSpec.batch_group(16))
    decays = {}
    for name, make in DECAY.items():
        decays[f"{name}, none"] = {"make": make}
        reached = unnormalized_norms(make(), torch.zeros(1, 1, SIDE, SIDE))
        for rate in (5e-4, 5e-3):
            for where, norm_layers in (("all", "all"), ("reachable", reached)):
                decay = NormDecay(rate, norm_layers=norm_layers)
                decays[f"{name}, {rate:g} at {where} norm layers"] = {"make": make, "norm_decay": decay}
    return {
        "ghost": {str(size): {"spec": NormSpec.ghost(size)} for size in (64, 32, 16, 8, 4, 2)},
        "classes": {str(spec): {"spec": spec, "batches": of_few_classes} for spec in specs},
        "small": {str(spec): {"spec": spec, "batch_size": 2, "lr": RATE / 16} for spec in of_two},
        "decay": decays,
    }


def parts():
    for direction, by_name in reversed(settings().items()):
        for setting in by_name:
            yield {"direction": direction, "setting": setting}


def measure(setup, direction, setting):
    """The identity, and what tuned alphas change: means over seeds and their errors."""
    values, cells = settings()[direction][setting], []
    base = -1 if values.get("spec", NormSpec()).alpha == 1 else 0  # Group Norm's is alpha = 1
    for seed in range(SEEDS):
        tune, test = (np.array(curve) for curve in curves(setup, seed, **values))
        by_accuracy, by_entropy = tune[:, 0].argmax(), tune[:, 1].argmin()
        changes = test[by_accuracy, 0] - test[base, 0], test[by_entropy, 1] - test[base, 1]
        cells.append([*test[base], *changes, ALPHAS[by_accuracy], ALPHAS[by_entropy]])
    means, errors = np.mean(cells, 0), np.std(cells, 0, ddof=1) / np.sqrt(SEEDS)
    names = "accuracy", "cross_entropy", "accuracy_change", "cross_entropy_change"
    row = {name: [float(means[n]), float(errors[n])] for n, name in enumerate(names)}
    return [{**row, "alpha_by_accuracy": float(means[4]), "alpha_by_cross_entropy": float(means[5])}]


def inputs(folder, part, limit, offset=0):
    images, labels = (a[offset : offset + limit] for a in read(folder, part))
    x = torch.from_numpy(images.copy())[:, None].float()
    return F.interpolate(x, size=SIDE, mode="bilinear") / 127.5 - 1, torch.from_numpy(labels)


def curves(setup, seed, make=residual, batches=TrainingData.batches, **values):
    """Train from scratch; the scores of every alpha on the images to tune on and on the others."""
    torch.manual_seed(seed)
    model = TorchModel(make(), name="small", preprocessing=Preprocessing((1, SIDE, SIDE), (0.5,), (0.5,)))
    train_set, tune_set, test_set = (
        bnpatch.open_examples(inputs(setup.data, *part), model)
        for part in (("train", TRAIN), ("t10k", TEST), ("t10k", TEST, TEST))
    )
    plain = {"epochs": EPOCHS, "seed": seed, "augmentation": Augmentation(min_scale=1.0, hflip=0.0)}
    plain |= {"batch_size": 64, "lr": RATE, "weight_decay": 5e-4}
    last = {}  # the last epoch, as in the paper: the best would be chosen by what alpha is tuned on
    keep = Callbacks(on_epoch=lambda epoch: last.update(copy.deepcopy(model.module.state_dict())))
    examples = RunExamples(train_set, tune_set, selection=np.arange(2))  # scored and not used
    with mock.patch.object(TrainingData, "batches", batches):
        train(model, examples, FineTuneSettings(**plain | values), callbacks=keep)
    model.module.load_state_dict(last)
    return [[score(model, alpha, examples) for alpha in ALPHAS] for examples in (tune_set, test_set)]


def score(model, alpha, examples):
    model.set_alphas(float(alpha))
    scores = bnpatch.evaluate(model, examples, batch_size=250)
    return 100 * scores.values["accuracy"].mean(), scores.values["cross-entropy"].mean()
