"""Names of modules with and without the prefixes of wrappers, such as DataParallel and torch.compile."""

import re
from collections.abc import Collection
from dataclasses import replace

from bnpatch.core.recipe import Recipe

_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)*")


def as_named_in(names: Collection[str], recipe: Recipe) -> Recipe:
    """Return a recipe with its norm layers named as those of a model, where a wrapper named one of them.

    Args:
        names: the norm layers of the model, also those without running statistics.
        recipe: the recipe.
    """
    ours, theirs = _wrapper_of(recipe.alphas), _wrapper_of(names)
    if ours == theirs:
        return recipe
    layers = (replace(norm, name=theirs + norm.name.removeprefix(ours)) for norm in recipe.norm_layers)
    return replace(recipe, norm_layers=tuple(layers))


def _wrapper_of(names: Collection[str]) -> str:
    """Return the prefix of wrappers that all names have; "" if there is none.

    >>> _wrapper_of(["module._orig_mod.bn1", "module._orig_mod.layer1.bn"])
    'module._orig_mod.'
    """
    found = min((match[0] for match in map(_WRAPPERS.match, names) if match), key=len, default="")
    return found if all(name.startswith(found) for name in names) else ""
