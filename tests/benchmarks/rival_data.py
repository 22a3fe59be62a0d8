"""Networks and images for :mod:`tests.benchmarks.rivals`.

Each data set is a folder of arrays: the images as they are, under each of the standard corruptions, and the
mixture, in which each image has one of these at random or none.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bnpatch
from bnpatch import FineTuneSettings
from bnpatch.data.standard_corruptions import STANDARD, corrupt
from bnpatch.finetune import head, techniques
from bnpatch.finetune.config import Augmentation
from bnpatch.models.torch_model import TorchModel
from tests.benchmarks import fashion_mnist, photographs

CLEAN, MIXTURE = "clean", "mixture"
KINDS = tuple(STANDARD)

SIDE, TRANSFERRED = 96, 5000  # pixels, and training images, for the networks that are fine-tuned
VALIDATION = 1000


@dataclass(frozen=True)
class DataSet:
    """Images, of which the first are to tune on and the others to judge by.

    Attributes:
        name: name of its folder.
        severity: severity of the corruptions.
        tuning: number of images to tune on.
        held_out: largest number of images to judge by.
    """

    name: str
    severity: int
    tuning: int
    held_out: int


PHOTOGRAPHS = DataSet("photographs", 3, photographs.TUNING, 300)
FASHION = DataSet("fashion", 3, 800, 1200)
LARGE_FASHION = DataSet("fashion-96", 3, 400, 600)


@dataclass(frozen=True)
class Network:
    """A network, and the images that it is tried on.

    Attributes:
        name: its name in tables.
        data: the images.
        load: makes the model from the working folder and the name of a device.
    """

    name: str
    data: DataSet
    load: Callable[[Path, str], TorchModel]


def lite0(_: Path, device: str) -> TorchModel:
    """EfficientNet-Lite0 with its ImageNet weights."""
    return bnpatch.load(photographs.network().to(device), preprocessing=photographs.VALUES)


def _headless(device: str) -> TorchModel:
    values = {**photographs.VALUES, "img_size": SIDE}
    model = bnpatch.load(photographs.network().to(device), preprocessing=values)
    return head.new_head(model, tuple(map(str, range(10))))


def _transferred(name: str, folder: Path, device: str) -> TorchModel:
    model = _headless(device)
    model.module.load_state_dict(torch.load(folder / f"{name}.pt", map_location=device))
    return model


def _small(name: str, folder: Path, device: str) -> TorchModel:
    return bnpatch.load(folder / f"{name}.pt", preprocessing=fashion_mnist.VALUES, device=device)


NETWORKS = (
    Network("Lite0", PHOTOGRAPHS, lite0),
    Network("Lite0-plain", LARGE_FASHION, lambda f, d: _transferred("plain", f, d)),
    Network("Lite0-techniques", LARGE_FASHION, lambda f, d: _transferred("techniques", f, d)),
    Network("test_resnet", FASHION, lambda f, d: _small("test_resnet", f, d)),
    Network("test_efficientnet", FASHION, lambda f, d: _small("test_efficientnet", f, d)),
)


@lru_cache(maxsize=2)
def loaded(name: str, folder: Path, device: str) -> TorchModel:
    """Load a network by its name; a process keeps the last two."""
    return next(network for network in NETWORKS if network.name == name).load(folder, device)


def fine_tune(name: str, folder: Path, fashion: Path, device: str, epochs: int, count: int) -> float:
    """Transfer EfficientNet-Lite0 to Fashion-MNIST (the paper's 4.3), write its weights, return its accuracy.

    Args:
        name: "plain", or "techniques" for those that the paper's guidance chooses.
        folder: where the weights are written.
        fashion: folder of Fashion-MNIST.
        device: name of the device.
        epochs: passes over the training images.
        count: number of training images.
    """
    images, labels = fashion_mnist.read(fashion, "train")
    x = _resized(images[: count + VALIDATION], SIDE).repeat(3, axis=1).transpose(0, 2, 3, 1)
    model = _headless(device)
    train = bnpatch.open_examples((x[:count], labels[:count]), model)
    val = bnpatch.open_examples((x[count:], labels[count : count + VALIDATION]), model)
    settings = FineTuneSettings(
        epochs=epochs,
        batch_size=16,  # some thousand images make few steps otherwise
        lr=0.02,
        augmentation=Augmentation(min_scale=0.7),
        workers=4 if epochs > 1 else 0,
    )
    if name == "techniques":
        settings = techniques.by_guidance(model, settings).settings(settings)
    result = bnpatch.fine_tune(model, train, val, settings)
    with model.in_state(model.baseline()):
        torch.save(model.module.state_dict(), folder / f"{name}.pt")
    return result.training.best.accuracy


def _resized(images: np.ndarray, side: int) -> np.ndarray:
    """Gray images (N, H, W) as (N, 1, side, side)."""
    size = (side, side)
    resized = (Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in images)
    return np.stack([np.asarray(image) for image in resized])[:, None]


def images_of(
    data: DataSet, fashion: Path, crops: Path, limit: Sequence[int] | None
) -> dict[str, np.ndarray]:
    """Return x, (N, C, H, W) bytes, the tuning images first; y (N,), and the group of each image, (N,).

    Args:
        data: the data set.
        fashion: folder of Fashion-MNIST.
        crops: file of crops that :mod:`tests.benchmarks.photographs` wrote.
        limit: use at most so many to tune on, and so many to judge by, at random.
    """
    if data is PHOTOGRAPHS:
        with np.load(crops) as stored:
            images, labels, groups = stored["images"], stored["labels"], stored["groups"]
        parts = photographs.split(groups)
    else:
        images, labels = fashion_mnist.read(fashion, "t10k")
        groups = np.arange(len(images))
        parts = groups[: data.tuning], groups[data.tuning : data.tuning + data.held_out]
    if limit:
        rng = np.random.default_rng(0)
        parts = [rng.permutation(part)[:most] for part, most in zip(parts, limit, strict=True)]
    order = np.concatenate(parts)
    if data is PHOTOGRAPHS:
        x = images[order].transpose(0, 3, 1, 2)
    else:
        x = _resized(images[order], fashion_mnist.SIDE if data is FASHION else SIDE)
        x = x if data is FASHION else x.repeat(3, axis=1)
    return {"x": x, "y": labels[order], "groups": groups[order], "tuning": np.array(len(parts[0]))}


def write_conditions(
    data: DataSet, images: np.ndarray, folder: Path, conditions: Sequence[str], pool: Executor
) -> None:
    """Corrupt images, and write an array for each condition."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = np.arange(len(images))
    which = np.random.default_rng(0).integers(0, 1 + len(KINDS), len(images))
    for condition in conditions:
        made = images.copy()
        for number, kind in enumerate(KINDS, start=1):
            seen = {MIXTURE: np.flatnonzero(which == number), kind: everything}.get(condition, everything[:0])
            parts = np.array_split(seen, max(1, len(seen) // 50))
            jobs = [pool.submit(_corrupted, images[part], part, kind, data.severity) for part in parts]
            for part, job in zip(parts, jobs, strict=True):
                made[part] = job.result()
        np.save(folder / f"{condition}.npy", made)


def _corrupted(images: np.ndarray, indices: np.ndarray, kind: str, severity: int) -> np.ndarray:
    made = [corrupt(x, kind, severity, (0, int(n))) for x, n in zip(images, indices, strict=True)]
    return np.stack(made) if made else images
