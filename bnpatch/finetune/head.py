"""A new classifier for other classes: transfer learning (the paper's 4.3)."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnpatch.core.errors import BnpatchError
from bnpatch.data.class_folders import classes_in
from bnpatch.data.class_targets import ClassOrder
from bnpatch.data.npz import read_arrays
from bnpatch.models.torch_model import TorchModel


def classes_of(data: str | os.PathLike[str], order: ClassOrder) -> tuple[str, ...]:
    """Name the classes of a folder or an ``.npz`` file, in the order of the outputs.

    Raises:
        BnpatchError: the data has no classes.
    """
    path = Path(data)
    if path.is_dir():
        return tuple(classes_in(path, order))
    if path.suffix.lower() == ".npz":
        for labels in read_arrays(path, [("y",), ("labels",), ("targets",), ("train_labels",)]).values():
            return tuple(map(str, range(int(labels.max()) + 1)))
    raise BnpatchError(f"cannot count the classes of {data}", "give a folder with a folder per class")


def new_head(model: TorchModel, class_names: tuple[str, ...], seed: int = 0) -> TorchModel:
    """Give a model an untrained classifier for these classes; its module is changed in place.

    Args:
        model: from :func:`bnpatch.load`.
        class_names: names of the classes in the order of the outputs.
        seed: seed of the initial weights.

    Raises:
        BnpatchError: the model has no linear classifier.
    """
    outputs = model.num_outputs()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _replace_classifier(model, outputs, len(class_names))
    arch = replace(model.arch, num_classes=len(class_names)) if model.arch else None
    return replace(model, class_names=class_names, arch=arch, output=None)


def _replace_classifier(model: TorchModel, outputs: int, num_classes: int) -> None:
    module: Any = model.module
    if hasattr(module, "reset_classifier"):  # timm
        module.reset_classifier(num_classes)
        return
    heads = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and child.out_features == outputs
    }
    if not heads:
        raise BnpatchError(f"{model.name} has no linear classifier", "give it a new one in Python")
    for name, old in heads.items():  # several, where there are auxiliary ones
        module.set_submodule(name, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
