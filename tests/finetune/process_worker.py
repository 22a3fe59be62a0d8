"""What each of two processes trains for ``test_loop.py``: models whose processes could wait for each other.

``torchrun --nproc-per-node 2 -m tests.finetune.process_worker`` prints a line per model and process.
"""

import os
import sys

import torch
from torch import nn

import bnpatch
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.trainer import NotFiniteLossError, train


class TwoHeads(nn.Module):
    """The second is for a loss that only its authors had."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head, self.other = nn.Linear(144, 2), nn.Linear(144, 5)

    def forward(self, x):
        y = self.body(x)
        return (self.head(y), self.other(y)) if self.training else self.head(y)


class OneOfTwoHeads(TwoHeads):
    """One process leaves out the second."""

    def leaves_out(self):
        return os.environ["RANK"] == "1"

    def forward(self, x):
        y = self.body(x)
        return self.head(y) if self.leaves_out() else self.head(y) + self.other(y)[:, :2]


class AtRandom(OneOfTwoHeads):
    """Any leaves it out by chance."""

    def leaves_out(self):
        return torch.rand(()) < 0.5


class Diverges(nn.Module):
    """The scores of one process are not finite once it has learned anything."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        self.start = self.body[3].bias.tolist()

    def forward(self, x):
        is_ruined = os.environ["RANK"] == "1" and self.body[3].bias.tolist() != self.start
        return self.body(x) / (0 if is_ruined and not self.training else 1)


def main():
    for kind in (TwoHeads, OneOfTwoHeads, AtRandom, Diverges):
        torch.manual_seed(0)  # all processes begin alike
        options = {"img_size": 8, "mean": (0.5,), "std": (0.5,)}
        model = bnpatch.load(kind(), device="cpu", preprocessing=options)
        data = bnpatch.open_examples((torch.rand(32, 1, 8, 8), [0, 1] * 16), model)
        try:
            train(model, RunExamples(data, data), FineTuneSettings(epochs=2, batch_size=4))
            end = "trained"
        except NotFiniteLossError:
            end = "diverged"
        sys.stdout.write(f"{kind.__name__} {end}\n")  # at once, as print does not


if __name__ == "__main__":
    main()
