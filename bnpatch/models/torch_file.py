"""Write a patched torch model as a checkpoint."""

import io
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import atomic_path
from bnpatch.core.patch import PatchState
from bnpatch.core.recipe import Recipe
from bnpatch.models.architecture import Architecture

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel


def save_checkpoint(model: "TorchModel", path: str | os.PathLike[str], recipe: Recipe) -> bool:
    """Write a checkpoint of a model, see :meth:`bnpatch.models.torch_model.TorchModel.save`."""
    content: dict[str, Any] = {
        "class_names": list(model.class_names) if model.class_names else None,
        "bnpatch": {
            "recipe": recipe.to_json(),
            "preprocessing": model.preprocessing.to_json(),
            "output": model.chosen_output,
        },
    }
    by_name = model.arch is not None and _is_built_by(model, model.arch)
    if by_name:
        content["arch"] = str(model.arch)
        content["state_dict"] = model.module.state_dict()
    else:
        content["model"] = model.module
    buffer = io.BytesIO()
    torch.save(content, buffer)  # in memory, because torch's file writer hides errors of the disk
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return by_name


def _is_built_by(model: "TorchModel", arch: Architecture) -> bool:
    """Tell whether the architecture, built by its name, computes the same with these weights."""
    plain = PatchState(include_1x1=model.state.include_1x1)
    rebuilt = replace(model, module=arch.build(), device=torch.device("cpu"), amp=False, _state=plain)
    try:
        rebuilt.module.load_state_dict(model.module.state_dict(), strict=False)
        rebuilt.apply(model.recipe())
        x = torch.rand(2, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
        with model.evaluating(), rebuilt.evaluating():
            own, other = model.predict(x).float().cpu(), rebuilt.predict(x).float().cpu()
    except (BnpatchError, RuntimeError):  # other shapes, another recipe, or another input: not the same model
        return False
    scale = own.abs().nan_to_num(0, 0).max().item()  # a model may return nan or infinity for random images
    return own.shape == other.shape and torch.allclose(own, other, 1e-2, 1e-2 * scale, equal_nan=True)
