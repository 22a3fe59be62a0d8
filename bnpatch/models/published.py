"""Find what timm and torchvision know of the weights that they publish."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models import architecture
from bnpatch.models.architecture import Architecture


@cache
def torchvision_weights(name: str) -> list[Any]:
    """Return the published weights of a torchvision architecture, the oldest first."""
    import torchvision

    return list(torchvision.models.get_model_weights(name))


def published_weights(name: str, file_name: str) -> Any:
    """Find published weights by file name; return a torchvision enum member, values of timm, or None."""
    import timm

    if architecture.is_known("torchvision", name):
        for weights in torchvision_weights(name):
            if weights.url.rsplit("/", 1)[-1] == file_name:
                return weights
    for full_name in timm.list_pretrained(f"{name}.*"):
        cfg = timm.get_pretrained_cfg(full_name)
        if cfg is not None and str(cfg.url or "").rsplit("/", 1)[-1] == file_name:
            return _timm_values(full_name)
    return None


def tagged_weights(arch: str | None) -> dict[str, Any] | None:
    """Return timm's values for weights with a tag, as in ``timm:resnet50.tv_in1k``, or None."""
    import timm

    name = architecture.current_name(arch or "").removeprefix("timm:")
    return _timm_values(name) if "." in name and timm.models.is_model_pretrained(name) else None


def default_preprocessing(found: Architecture, module: nn.Module, published: Any) -> Preprocessing:
    """Return the preprocessing of published weights, or of the architecture if they are None."""
    if isinstance(published, Mapping):
        return Preprocessing.of_timm(module, f"timm's published {published['name']}", stored=published)
    if published is not None:
        return Preprocessing.of_torchvision(published, found.in_chans)
    if found.library == "timm":
        return Preprocessing.of_timm(module, f"timm's default for {found.name}")
    default = Preprocessing.of_torchvision(torchvision_weights(found.name)[0], found.in_chans)
    return replace(default, source=f"torchvision's default for {found.name}")


def _timm_values(full_name: str) -> dict[str, Any]:
    import timm

    cfg = timm.get_pretrained_cfg(full_name)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {"name": full_name, **{key: getattr(cfg, key) for key in keys}}
