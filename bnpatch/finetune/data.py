"""Training images: timm's augmentations, shuffled in a way that a resumed run repeats."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.finetune.config import Augmentation

#: From (class indices (N,), batch size, random generator) to the batches of an epoch.
Batching = Callable[[Indices, int, np.random.Generator], Sequence[Indices]]


def shuffled(targets: Indices, batch_size: int, rng: np.random.Generator) -> Sequence[Indices]:
    """All examples in random order; what is left over at the end is dropped."""
    order = rng.permutation(len(targets))
    return np.split(order, range(batch_size, len(order), batch_size))[: len(order) // batch_size]


class TrainingImages(Dataset[tuple[int, Tensor | None, str]]):
    """Augmented inputs of examples; inputs as they are stay that way.

    Args:
        examples: from :func:`bnpatch.open_examples`; their cache isn't used, since every epoch differs.
        preprocessing: of the model.
        augmentation: what to do to images.
    """

    def __init__(self, examples: Examples, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.source = examples.source
        self.transform = _transform(preprocessing, augmentation)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        """The index, the input, and why there is none."""
        try:
            item = self.source.read(index)
            return index, item if isinstance(item, Tensor) else self.transform(item), ""
        except Exception as error:  # one broken image is not the end of a run
            return index, None, f"{type(error).__name__}: {error}"


def load_batches(
    images: TrainingImages, targets: Indices, batches: Sequence[Indices], workers: int
) -> DataLoader[Any]:
    """Inputs (N, C, H, W), class indices (N,) and what can't be read (index to reason), batch by batch."""
    return DataLoader(
        images,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=_Collate(targets),
        num_workers=workers,
    )


class _Collate:
    """Stacks what could be read. A class, since worker processes can't be sent a closure."""

    def __init__(self, targets: Indices) -> None:
        self.targets = targets

    def __call__(self, items: list[tuple[int, Tensor | None, str]]) -> tuple[Tensor, Tensor, dict[int, str]]:
        good = {index: x for index, x, _ in items if x is not None}
        problems = {index: problem for index, _, problem in items if problem}
        if not good:
            raise BnpatchError(
                f"no image of a batch can be read: {next(iter(problems.values()))}", "look at the files"
            )
        return torch.stack(list(good.values())), torch.from_numpy(self.targets[list(good)]), problems


@dataclass(frozen=True)
class TrainingData:
    """Some training examples, in the batches of a process of a run.

    Attributes:
        examples: from :func:`bnpatch.open_examples`.
        subset: which of them to use.
        images: their augmented inputs.
        batching: how an epoch is divided into batches.
        seed: of the run.
        workers: processes that decode.
        rank: number of this process.
        processes: how many share the batches.
    """

    examples: Examples
    subset: Indices
    images: TrainingImages
    batching: Batching
    seed: int
    workers: int
    rank: int = 0
    processes: int = 1

    def batches(self, epoch: int, batch_size: int, accumulate: int = 1) -> list[Indices]:
        """The batches of this process in an epoch, as many as make whole steps of the optimizer."""
        rng = np.random.default_rng(self._seed(epoch))
        batches = self.batching(self.examples.targets[self.subset], batch_size, rng)
        per_step = self.processes * accumulate
        whole = len(batches) // per_step * per_step
        return [self.subset[batch] for batch in batches[:whole][self.rank :: self.processes]]

    def load(self, batches: Sequence[Indices]) -> DataLoader[Any]:
        """See :func:`load_batches`."""
        return load_batches(self.images, self.examples.targets, batches, self.workers)

    def seed_everything(self, epoch: int) -> None:
        """Seed all global generators, so that an epoch is a function of the seed and its number."""
        from accelerate.utils import set_seed

        set_seed((int(self._seed(epoch).generate_state(1)[0]) + self.rank) % 2**32)

    def _seed(self, epoch: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, epoch])


def check_same_classes(train: Examples, val: Examples, names: Sequence[str] | None) -> None:
    """See that all examples have a class, and validation none that training hasn't.

    Raises:
        BnpatchError: they haven't, or it has one.
    """
    for name, examples in (("training", train), ("validation", val)):
        if not (examples.classes and examples.labelled.all()):
            raise BnpatchError(f"the {name} data has examples without a class", "give labelled images")
    extra = np.setdiff1d(val.targets, train.targets)
    if len(extra):
        index = int(extra[0])
        name = repr(names[index]) if names and index < len(names) else str(index)
        raise BnpatchError(
            f"the validation data has the class {name}, of which the training data has no example",
            "give data sets with the same classes",
        )


def class_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a folder, without the hidden ones that tools leave behind."""
    return [e.name for e in Path(folder).iterdir() if e.is_dir() and not e.name.startswith(".")]


def check_same_folders(train: str | os.PathLike[str], val: str | os.PathLike[str]) -> None:
    """See that two folders have the same class folders, where both are folders.

    As many others would be taken in order, and every class for another.

    Raises:
        BnpatchError: they haven't.
    """
    if not (Path(train).is_dir() and Path(val).is_dir()):
        return
    names = [set(class_folders(folder)) for folder in (train, val)]
    if only_one := sorted(names[0] ^ names[1]):
        has, lacks = (train, val) if only_one[0] in names[0] else (val, train)
        raise BnpatchError(
            f"{has} has the class folder {only_one[0]!r}, {lacks} has not",
            "give data sets with the same classes",
        )


def _transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    made: Callable[[Any], Tensor] = create_transform(
        input_size=preprocessing.input_size,
        is_training=True,
        scale=(augmentation.min_scale, 1.0),
        # The whole image, undistorted, where nothing is to be cropped.
        ratio=(1.0, 1.0) if augmentation.min_scale == 1 else None,
        hflip=augmentation.hflip,
        color_jitter=0.0,
        auto_augment=augmentation.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
    )
    return made
