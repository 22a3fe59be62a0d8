"""Training images: augmented by timm, and shuffled in an order that a resumed run repeats."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnpatch.core.errors import BnpatchError
from bnpatch.data.class_folders import classes_in
from bnpatch.data.class_maps import composed
from bnpatch.data.class_targets import ClassOrder
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.finetune.config import Augmentation
from bnpatch.finetune.workers import loaded


@dataclass(frozen=True)
class RunExamples:
    """The examples of a run, from :func:`bnpatch.open_examples`.

    Attributes:
        train: examples to train on.
        val: examples to select the best epoch by.
        subset: which of the training examples to use; None for all.
        selection: which of the validation examples to use; None for all.
    """

    train: Examples
    val: Examples
    subset: Indices | None = None
    selection: Indices | None = None


def shuffled(indices: Indices, batch_size: int, rng: np.random.Generator) -> Sequence[Indices]:
    """Divide examples into batches in random order; an incomplete last batch is dropped."""
    order = rng.permutation(indices)
    return np.split(order, range(batch_size, len(order), batch_size))[: len(order) // batch_size]


class TrainingImages(Dataset[tuple[int, Tensor | None, str]]):
    """Augmented inputs of examples; examples that are tensors already are not augmented.

    Args:
        examples: from :func:`bnpatch.open_examples`; their cache isn't used, because every epoch differs.
        preprocessing: preprocessing of the model.
        augmentation: augmentation of the images.
    """

    def __init__(self, examples: Examples, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.source = examples.source
        self.transform = _transform(preprocessing, augmentation)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        """Return the index, the input or None if it can't be read, and the reason for that."""
        try:
            item = self.source.read(index)
            return index, item if isinstance(item, Tensor) else self.transform(item), ""
        except Exception as error:  # a broken image must not end the run
            return index, None, f"{type(error).__name__}: {error}"


def load_batches(
    images: TrainingImages, targets: Indices, batches: Sequence[Indices], workers: int
) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
    """Load batches: inputs (N, C, H, W), class indices (N,), and reasons by index of unreadable images."""
    options = {
        "dataset": images,
        "batch_sampler": [batch.tolist() for batch in batches],
        "collate_fn": _Collate(targets),
    }
    return loaded(options, workers)


class _Collate:
    """Stacks the images that could be read. It is a class because closures can't be sent to workers."""

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
    """Training examples, and the batches of them that one process of a run gets.

    Attributes:
        examples: from :func:`bnpatch.open_examples`.
        subset: indices of the examples to use.
        images: augmented inputs of the examples.
        seed: seed of the run.
        workers: number of processes that load the images, see :func:`bnpatch.finetune.workers.affordable`.
        rank: number of this process.
        processes: number of processes that share the batches.
    """

    examples: Examples
    subset: Indices
    images: TrainingImages
    seed: int
    workers: int
    rank: int = 0
    processes: int = 1

    def batches(self, epoch: int, batch_size: int, accumulate: int = 1) -> list[Indices]:
        """Return the batches of this process in an epoch, as many as fill whole optimizer steps."""
        rng = np.random.default_rng(self._seed(epoch))
        batches = shuffled(self.subset, batch_size, rng)
        per_step = self.processes * accumulate
        whole = len(batches) // per_step * per_step
        return list(batches[:whole][self.rank :: self.processes])

    def load(self, batches: Sequence[Indices]) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        """See :func:`load_batches`."""
        return load_batches(self.images, self.examples.targets, batches, self.workers)

    def seed_everything(self, epoch: int) -> None:
        """Seed all global generators, so that an epoch depends on the seed and its number alone."""
        from accelerate.utils import set_seed

        set_seed((int(self._seed(epoch).generate_state(1)[0]) + self.rank) % 2**32)

    def _seed(self, epoch: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, epoch])


def check_same_classes(train: Examples, val: Examples, names: Sequence[str] | None) -> None:
    """Check that all examples have a class, and that all classes of validation occur in training.

    Raises:
        BnpatchError: an example has no class, or a class does not occur in training.
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


def check_same_folders(train: str | os.PathLike[str], val: str | os.PathLike[str]) -> None:
    """Check that two paths have the same class folders, if both are folders.

    Class indices follow the order of the folders, so that with other folders they would not match.

    Raises:
        BnpatchError: a class folder is missing in one of them.
    """
    if not (Path(train).is_dir() and Path(val).is_dir()):
        return
    names = [set(map(composed, classes_in(Path(folder), ClassOrder.PLAIN))) for folder in (train, val)]
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
        # Without cropping, the aspect ratio must not be changed either.
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
