"""Match the names of class folders with the outputs of a model.

A wrong match makes a good model look broken, so :func:`targets_of_folders` raises an error or warns where
the match is not certain. :mod:`bnpatch.data.class_maps` reads the file in which the user can give the match.
"""

import warnings
from collections.abc import Mapping, Sequence
from enum import Enum

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import counted
from bnpatch.data.class_maps import composed
from bnpatch.data.class_names import SAY_WHICH, check_names, outputs_by_name, outputs_by_synset


class ClassOrder(Enum):
    """How a training script numbers its class folders."""

    PLAIN = "plain"  #: as in torchvision: 1, 10, 2
    NATURAL = "natural"  #: as in timm: 1, 2, 10

    def sort(self, names: Sequence[str]) -> list[str]:
        """Sort names in this order."""
        if self is ClassOrder.PLAIN:
            return sorted(names)
        from timm.utils.misc import natural_key

        return sorted(names, key=natural_key)


def targets_of_folders(
    folders: Sequence[str],
    *,
    num_outputs: int,
    class_names: Sequence[str] | None,
    order: ClassOrder,
    in_table: bool = False,
    sure: bool = False,
    partial: bool = False,
    where: str = "the data",
) -> dict[str, int]:
    """Map the names of class folders to outputs of the model.

    The function takes the first of these that applies: the folders have the model's class names; they are
    synsets of ImageNet; there are as many folders as outputs, and their order is that of the model's training
    script; their names are indices.

    Args:
        folders: names of the class folders.
        num_outputs: K, the number of outputs.
        class_names: names of the outputs, if known.
        order: how to sort the folders if their order decides.
        in_table: the names are classes in a table, whose numbers no script has sorted as folders: if they
            are those of all outputs, they are these, and otherwise they are in the order of numbers.
        sure: the user gave the class names, so nothing but these names may decide.
        partial: if the class names are known, leave out folders that aren't named after a class.
        where: the folder that has the class folders, for messages.

    Raises:
        BnpatchError: the folders can't be matched with certainty.
    """
    known = outputs_by_name(folders, num_outputs, class_names)
    if len(known) == len(folders) or (partial and known):
        return known
    if not partial:
        check_names(folders, class_names or ())
    by_name = {composed(name): index for index, name in enumerate(class_names or ())}
    if sure:
        strange = next(
            (f"no {name!r}" for name in folders if composed(name) not in by_name),
            counted(len(by_name), "name"),
        )
        raise BnpatchError(
            f"the class map has {strange}: it does not fit {where} and the model's "
            f"{counted(num_outputs, 'output')}",
            "list every class folder once, in the order of the outputs",
        )
    if (synsets := outputs_by_synset(folders, num_outputs)) is not None:
        if unknown := [name for name in folders if name not in synsets]:
            raise BnpatchError(
                f"{where} has the class {unknown[0]}, which is not among the model's {num_outputs}",
                "name the right classes with --class-map",
            )
        return synsets
    if partial and class_names:
        return {}
    if in_table and are_numbers(folders):
        order = ClassOrder.NATURAL
        if {*map(int, folders)} == {*range(num_outputs)}:
            return {name: int(name) for name in folders}
    if len(folders) == num_outputs:
        return _by_order(folders, class_names, by_name, order, where)
    if all(name.isdecimal() and int(name) < num_outputs for name in folders):
        if all(int(name) for name in folders):
            warnings.warn(
                f"the folders of {where} are numbers without a 0: {folders[0]!r} is taken for output "
                f"{int(folders[0])}, where outputs count from 0; --class-map FILE says otherwise",
                BnpatchWarning,
                stacklevel=2,
            )
        return {name: int(name) for name in folders}
    raise BnpatchError(
        f"{where} has {counted(len(folders), 'class folder')}, the model has "
        f"{counted(num_outputs, 'output')}",
        SAY_WHICH,
    )


def _by_order(
    folders: Sequence[str],
    class_names: Sequence[str] | None,
    by_name: Mapping[str, int],
    order: ClassOrder,
    where: str,
) -> dict[str, int]:
    """Return outputs by name of folder, in the order of the training script, and say what is not sure."""
    if class_names and by_name.keys().isdisjoint(map(composed, folders)) and not are_numbers(folders):
        raise BnpatchError(
            f"none of the class folders of {where} ({folders[0]!r}, ...) has the name of a class of the "
            f"model ({class_names[0]!r}, ...)",
            SAY_WHICH,
        )
    in_order = {name: index for index, name in enumerate(order.sort(folders))}
    if class_names:
        _check_other_names(in_order, class_names, by_name)
    if class_names or not _warn_of_numbers(folders, order):
        _warn_of_order(folders, order)
    return in_order


def are_numbers(folders: Sequence[str]) -> bool:
    """Tell whether all names of folders are numbers."""
    return all(name.isdecimal() for name in folders)


def _check_other_names(
    in_order: Mapping[str, int], class_names: Sequence[str], by_name: Mapping[str, int]
) -> None:
    """Check folders of which some have other names than the model's classes, and which are taken in order.

    Raises:
        BnpatchError: a folder has the name of a class, and by order it would be another one.
    """
    strange = next((name for name in in_order if composed(name) not in by_name), next(iter(in_order)))
    problem = f"the class folder {strange!r} is not among the model's class names"
    for name, index in in_order.items():
        if by_name.get(composed(name), index) != index:
            raise BnpatchError(f"{problem}, and by order {name!r} would be {class_names[index]!r}", SAY_WHICH)
    warnings.warn(
        f"{problem}; folders are taken in order, --class-map FILE says otherwise",
        BnpatchWarning,
        stacklevel=4,
    )


def _warn_of_numbers(folders: Sequence[str], order: ClassOrder) -> bool:
    """Warn, and return True, if folders are named by numbers that aren't the indices of the outputs."""
    if not are_numbers(folders) or set(map(int, folders)) == set(range(len(folders))):
        return False
    names = order.sort(folders)
    same = ClassOrder.PLAIN.sort(folders) == ClassOrder.NATURAL.sort(folders)
    differ = "" if same else ", and sort differently in torchvision and in timm"
    pairs = ", ".join(f"{name!r} is output {index}" for index, name in enumerate(names[:3]))
    warnings.warn(
        f"the folders are numbers, but not 0 to {len(names) - 1}{differ}; in {order.value} order, {pairs}"
        f"{', and so on' if len(names) > 3 else ''}; --class-map FILE says otherwise",
        BnpatchWarning,
        stacklevel=4,
    )
    return True


def _warn_of_order(folders: Sequence[str], order: ClassOrder) -> None:
    plain, natural = (o.sort(folders) for o in ClassOrder)
    if plain != natural:
        example = next(a for a, b in zip(plain, natural, strict=True) if a != b)
        warnings.warn(
            f"class folders such as {example!r} sort differently in torchvision and in timm; taken in "
            f"{order.value} order, --class-map FILE says otherwise",
            BnpatchWarning,
            stacklevel=4,
        )
