"""Where the modules of a model are: all names of each, and every place in which one is replaced."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def swap(model: nn.Module, swaps: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules, given by ``id``, in every place of the model where they are used.

    Some models also keep their modules in lists, tuples or dictionaries, and run them from there.
    """
    seen: set[int] = set()
    for parent in list(model.modules()):
        _swap_in(vars(parent), swaps, seen)
    return swaps.get(id(model), model)


def _swap_in(values: Any, swaps: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """Return what replaces a value; lists and dictionaries, however deep, are changed in place."""
    if isinstance(values, nn.Module):
        return swaps.get(id(values), values)
    if type(values) is tuple:
        swapped = tuple(_swap_in(value, swaps, seen) for value in values)
        return swapped if any(a is not b for a, b in zip(swapped, values, strict=True)) else values
    if isinstance(values, (dict, list)) and id(values) not in seen:
        seen.add(id(values))
        for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
            if (new := _swap_in(value, swaps, seen)) is not value:
                values[key] = new
    return values


def modules_by_name(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Yield every module once, with all its dotted names."""
    names: dict[int, list[str]] = {}
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return ((modules[key], names[key]) for key in names)
