"""What commands do with recipes: read one, apply it, and note how one was made."""

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import masked

from .console import say

if TYPE_CHECKING:
    from bnpatch.core.recipe import Recipe
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel


def read(path: Path | None) -> "Recipe | None":
    """Read the recipe that an option names, and say what its search concluded."""
    from bnpatch.core.recipe import Recipe
    from bnpatch.report.text import UNFINISHED

    if path is None:
        return None
    recipe = Recipe.load(path)
    if verdict := recipe.provenance.get("verdict"):
        metric = recipe.provenance.get("metric")
        say(f"recipe         verdict of its search: {verdict}" + (f" ({metric})" if metric else ""))
    if verdict == UNFINISHED:
        warnings.warn(
            f"the search that wrote {path} has not ended: the weights are its best so far, and no verdict "
            "says what they are worth",
            BnpatchWarning,
            stacklevel=2,
        )
    return recipe


def apply(recipe: "Recipe", model: "TorchModel | OnnxModel") -> None:
    """Patch a model with a recipe, and say whether the recipe's search recommends it."""
    from bnpatch.report.text import recommendation

    if says := recommendation(recipe):
        say(f"recipe         {says}")
    model.apply(recipe)


def check_unpatched(model: "TorchModel | OnnxModel", called: str) -> None:
    """Check that a model has no weights yet, so that a recipe is not applied twice.

    Raises:
        BnpatchError: it has.
    """
    if not model.weights.is_baseline(model.baseline_alphas()):
        raise BnpatchError(f"{called} is patched already", "leave out --recipe, or give the model as it was")


def command(storage: str | None = None) -> str:
    """Return what was typed, without the password of a database."""
    words = sys.argv[1:]
    if storage is not None:
        words = [word.replace(storage, masked(storage)) for word in words]
    return shlex.join(words)
