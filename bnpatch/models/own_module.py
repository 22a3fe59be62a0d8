"""Wrap a module of the user's own as a model, with what it knows of its preprocessing and its classes."""

import torch
from torch import nn

from bnpatch.models.labels import choose, labels_of_module
from bnpatch.models.stored_preprocessing import of_module
from bnpatch.models.torch_model import TorchModel

# Classes of wrappers of a module, by name because some take long to import.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "AveragedModel", "OptimizedModule")


def wrap(module: nn.Module, name: str = "") -> TorchModel:
    """Wrap a module of the user's own, with the preprocessing in its pretrained_cfg if it has one."""
    inner = module  # which knows its preprocessing and its classes, where a wrapper does not
    while type(inner).__name__ in _WRAPPERS:
        inner = next(inner.children())
    label = name or type(inner).__name__
    outputs = getattr(inner, "num_classes", None)
    names, notes = choose(
        labels_of_module(inner), outputs if isinstance(outputs, int) else None, f"the module {label}"
    )
    return TorchModel(
        module,
        name=label,
        preprocessing=of_module(inner, label),
        class_names=names,
        device=device_of(module),
        notes=notes,
    )


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the parameters; the CPU if there are none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
