"""Fashion-MNIST, its shifts, and small networks trained on it: what most benchmarks measure with.

The data set is Debian's package dataset-fashion-mnist, or any folder with its four idx files.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision

import bnpatch

SIDE = 32
VALUES = {"img_size": SIDE, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}
KINDS = ("none", "contrast x 0.4", "brightness x 0.35", "noise 0.25", "mixed")
NETWORKS = ("test_resnet", "test_efficientnet")


@dataclass(frozen=True)
class Setup:
    """Where the data are, and how much of them a benchmark uses."""

    data: Path = Path("/usr/share/datasets/fashion-mnist")
    networks: Path = Path()  # folder with NAME.pt, which are trained where they are missing
    crops: Path | None = None  # of photographs, see tests/benchmarks/photographs.py
    text: Path | None = None  # the classifier of tests/benchmarks/text_orientation.py
    tuning: int = 2000
    held_out: int = 4000
    train: int = 20000

    def images(self, kind="none", seed=0):
        """Test images as bytes (N, 28, 28), seen otherwise, and their classes."""
        images, labels = (part[: self.tuning + self.held_out] for part in read(self.data, "t10k"))
        return shifted(kind, images, np.random.default_rng(seed)), labels

    def network(self, name, seed=0):
        """The file of a trained network."""
        return trained(name, self.data, self.networks, seed, self.train)

    def parts(self, images, labels):
        """What to tune on, and what to judge by."""
        ends = slice(None, self.tuning), slice(self.tuning, self.tuning + self.held_out)
        return tuple((images[part], labels[part]) for part in ends)


def read(folder, part):
    """Images (N, 28, 28) as bytes, and classes."""
    images, labels = (
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
        for path, offset in (
            (folder / f"{part}-images-idx3-ubyte.gz", 16),
            (folder / f"{part}-labels-idx1-ubyte.gz", 8),
        )
    )
    return images.reshape(-1, 28, 28), labels.astype(np.int64)


def shifted(kind, images, rng):
    """Images as bytes, seen otherwise; "mixed" is one of the other kinds at random for each image.

    A number in a kind's name says how strong it is: "contrast x 0.7", "noise 0.1".
    """
    x = images.astype(float)
    if kind == "mixed":
        which = rng.integers(0, len(KINDS) - 1, len(x))
        for index, one in enumerate(KINDS[:-1]):
            x[which == index] = shifted(one, x[which == index], rng)
    elif kind != "none":
        name, size = kind.split()[0], float(kind.split()[-1])
        if name == "contrast":
            x = 127.5 + size * (x - 127.5)
        elif name == "brightness":
            x = size * x
        else:
            x = x + rng.normal(0, size * 255, x.shape)
    return x.round().clip(0, 255).astype(np.uint8)


def make(name):
    if name == "resnet18":
        return torchvision.models.resnet18(num_classes=10)
    return timm.create_model(name.removeprefix("timm "), num_classes=10, in_chans=1)


def train(name, images, labels, epochs, seed=0):
    """A network trained from scratch, on the accelerator if there is one."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(name).train().to(device)
    channels = next(model.parameters()).shape[1]
    x = torch.from_numpy(images.copy())[:, None].float()
    x = (F.interpolate(x, size=SIDE, mode="bilinear") / 127.5 - 1).to(device)
    y = torch.from_numpy(labels).to(device)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].view(-1, 128):
            xb = x[batch].expand(-1, channels, -1, -1)
            loss = F.cross_entropy(model(xb.flip(-1) if torch.rand(()) < 0.5 else xb), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.cpu().eval()


def trained(name, folder, networks, seed=0, examples=20000):
    """The file of a network trained on the first images for 4 epochs, which is made if it is missing."""
    path = (networks or Path()) / (f"{name}-{seed}.pt" if seed else f"{name}.pt")
    if not path.exists():
        images, labels = (part[:examples] for part in read(folder, "train"))
        torch.save(train(name, images, labels, 4, seed).state_dict(), path)
    return path


def load(path, **options):
    """A trained network with the preprocessing that it was trained with."""
    return bnpatch.load(path, preprocessing=VALUES, **options)
