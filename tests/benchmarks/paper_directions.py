"""Does training here show what the paper shows? Fashion-MNIST subsets, small networks, minutes each.

Prints one table per claim of Summers & Dinneen (2020), means over seeds of held-out examples:

- ``ghost``: accuracy against the ghost size (Fig. 3), and what tuning alpha adds (Fig. 4);
- ``classes``: batches of few classes (Table 1), with and without example weighing;
- ``small``: a batch of two, Group Norm against Batch/Group Norm (section 3.4);
- ``decay``: decay of scales and shifts, in a residual network and in one of Inception's kind (section 3.3).

``python -m tests.benchmarks.paper_directions ghost [--train 5000] [--epochs 8] [--seeds 3]``; the data set is
Debian's package dataset-fashion-mnist, or any folder with its four idx files.
"""

import argparse
import copy
from pathlib import Path
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


def inputs(folder, part, limit, offset=0):
    images, labels = (a[offset : offset + limit] for a in read(folder, part))
    x = (
        F.interpolate(torch.from_numpy(images.copy())[:, None].float(), size=SIDE, mode="bilinear") / 127.5
        - 1
    )
    return x, torch.from_numpy(labels)


class Lab:
    """One data set, trained on with many settings; scores are of test images that nothing was chosen by."""

    def __init__(self, args):
        self.args = args
        self.preprocessing = Preprocessing((1, SIDE, SIDE), (0.5,), (0.5,))
        self.train = inputs(args.data, "train", args.train)
        self.tune = inputs(args.data, "t10k", args.test)
        self.test = inputs(args.data, "t10k", args.test, args.test)

    def settings(self, seed, **values):
        plain = Augmentation(min_scale=1.0, hflip=0.0)
        return FineTuneSettings(
            **{"batch_size": 64, "lr": self.args.lr, "weight_decay": 5e-4, **values},
            epochs=self.args.epochs,
            seed=seed,
            augmentation=plain,
        )

    def run(self, seed, make=residual, batches=TrainingData.batches, **values):
        """Train from scratch; the scores of every alpha on the images to tune on and on the others."""
        torch.manual_seed(seed)
        model = TorchModel(make(), name="small", preprocessing=self.preprocessing)
        train_set, tune_set, test_set = (
            bnpatch.open_examples(pair, model) for pair in (self.train, self.tune, self.test)
        )
        settings = self.settings(seed, **values)
        last = {}  # the last epoch, as in the paper: the best would be chosen by what alpha is tuned on
        keep = Callbacks(on_epoch=lambda epoch: last.update(copy.deepcopy(model.module.state_dict())))
        examples = RunExamples(train_set, tune_set, selection=np.arange(2))  # scored and not used
        with mock.patch.object(TrainingData, "batches", batches):
            result = train(model, examples, settings, callbacks=keep)
        model.module.load_state_dict(last)
        return {
            "loss": result.history[-1].train_loss,
            "curve": [
                [self.score(model, alpha, examples) for alpha in ALPHAS] for examples in (tune_set, test_set)
            ],
        }

    @staticmethod
    def score(model, alpha, examples):
        model.set_alphas(float(alpha))
        scores = bnpatch.evaluate(model, examples, batch_size=250)
        return 100 * scores.values["accuracy"].mean(), scores.values["cross-entropy"].mean()

    def row(self, name, **values):
        """The identity, then alpha tuned by accuracy and by cross-entropy: means and errors over seeds."""
        cells, base = [], -1 if values.get("spec", NormSpec()).alpha == 1 else 0  # Group Norm's is alpha = 1
        for seed in range(self.args.seeds):
            tune, test = (np.array(curve) for curve in self.run(seed, **values)["curve"])
            by_accuracy, by_loss = tune[:, 0].argmax(), tune[:, 1].argmin()
            cells.append(
                [
                    *test[base],
                    test[by_accuracy, 0] - test[base, 0],
                    ALPHAS[by_accuracy],
                    test[by_loss, 1] - test[base, 1],
                    ALPHAS[by_loss],
                ]
            )
        means, n = np.mean(cells, 0), len(cells)
        errors = [f" ± {e:.2g}" for e in np.std(cells, 0, ddof=1) / np.sqrt(n)] if n > 1 else [""] * 6
        shown = [
            f"{means[0]:.2f}{errors[0]}",
            f"{means[2]:+.2f}{errors[2]}",
            f"{means[3]:.3f}",
            f"{means[1]:.4f}{errors[1]}",
            f"{means[4]:+.4f}{errors[4]}",
            f"{means[5]:.3f}",
        ]
        print("| " + " | ".join([name, *shown]) + " |", flush=True)


def header(first):
    names = ["accuracy", "with alpha", "alpha", "cross-entropy", "with alpha", "alpha"]
    print("| " + " | ".join([first, *names]) + " |\n" + "| --- " * 7 + "|", flush=True)


def ghost(lab):
    header("pooled examples, batch 64")
    for size in (64, 32, 16, 8, 4, 2):
        lab.row(str(size), spec=NormSpec.ghost(size))


def classes(lab):
    header("batches of 64 in 4 random classes")
    steps = lab.args.epochs * (lab.args.train // 64)
    specs = [
        NormSpec.batch(),
        NormSpec.batch_renorm(warmup=steps // 4),
        *map(NormSpec.ghost, (32, 16, 8, 4, 2)),
        NormSpec.batch_group(16),
    ]
    for spec in specs:
        lab.row(str(spec), spec=spec, batches=of_few_classes)


def small(lab):
    header("batches of 2")
    for spec in (NormSpec.batch(), NormSpec.group(16), NormSpec.batch_group(16)):
        lab.row(str(spec), spec=spec, batch_size=2, lr=lab.args.lr / 16)


def decay(lab):
    header("decay of scales and shifts, batch 64")
    nets = {"residual": residual, "Inception-like": Inception}
    for name, make in nets.items():
        reached = unnormalized_norms(make(), torch.zeros(1, 1, SIDE, SIDE))
        for rate in (0.0, 5e-4, 5e-3):
            for where in ("all", "reachable"):
                if rate or where == "all":
                    norm_layers = "all" if where == "all" else reached
                    values = {"norm_decay": NormDecay(rate, norm_layers=norm_layers)} if rate else {}
                    lab.row(
                        f"{name}, {f'{rate:g} at {where} norm_layers' if rate else 'none'}",
                        make=make,
                        **values,
                    )


CLAIMS = {"ghost": ghost, "classes": classes, "small": small, "decay": decay}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument(
        "--test", type=int, default=2500, help="images to tune alpha on, and as many to score"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CLAIMS[args.claim](Lab(args))


if __name__ == "__main__":
    main()
