"""Which folder is which output? The question whose wrong answer looks like a broken model."""

import os
import re
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from bnpatch.errors import BnpatchError, BnpatchWarning

_SYNSET = re.compile(r"n\d{8}")


class ClassOrder(Enum):
    """How a training script numbers its class folders."""

    PLAIN = "plain"  #: as torchvision: 1, 10, 2
    NATURAL = "natural"  #: as timm: 1, 2, 10

    def sort(self, names: Sequence[str]) -> list[str]:
        """The names in this order."""
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
    sure: bool = False,
    partial: bool = False,
    where: str = "the data",
) -> dict[str, int]:
    """Map names of class folders to outputs of the model.

    In order of preference: the names that the model knows; ImageNet's synsets; as many folders as
    outputs, sorted as the model's training script sorts; folders named by their index.

    Args:
        folders: names of the class folders.
        num_outputs: K.
        class_names: names of the outputs, where known.
        order: how to sort, where sorting decides.
        sure: the names were given by the user: nothing else will do.
        partial: leave out folders that aren't named after a class, where the names are known.
        where: the folder, for messages.

    Raises:
        BnpatchError: there is no sure answer.
    """
    by_name = {name: index for index, name in enumerate(class_names or ())}
    if class_names and len(class_names) == num_outputs:
        known = {name: by_name[name] for name in folders if name in by_name}
        if len(known) == len(folders) or (partial and known):
            return known
    if sure:
        strange = next((f"no {name!r}" for name in folders if name not in by_name), f"{len(by_name)} names")
        raise BnpatchError(
            f"the class map has {strange}, {where} and the model's {num_outputs} outputs need it otherwise",
            "list every class folder once, in the order of the outputs",
        )
    if all(_SYNSET.fullmatch(name) for name in folders) and (synsets := _imagenet_synsets(num_outputs)):
        if unknown := [name for name in folders if name not in synsets]:
            raise BnpatchError(
                f"{where} has the class {unknown[0]}, which is not among the model's {num_outputs}",
                "name the right classes with --class-map",
            )
        return {name: synsets[name] for name in folders}
    if partial and class_names:
        return {}
    if len(folders) == num_outputs:
        _warn_of_other_names(folders, class_names)
        _warn_of_order(folders, order)
        return {name: index for index, name in enumerate(order.sort(folders))}
    if all(name.isdecimal() and int(name) < num_outputs for name in folders):
        return {name: int(name) for name in folders}
    raise BnpatchError(
        f"{where} has {len(folders)} class folders, the model has {num_outputs} outputs",
        "say which is which with --class-map FILE: the folders, one a line, in the order of the outputs",
    )


def read_class_map(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a class map: one name a line in the order of the outputs, or a name and its index.

    Raises:
        BnpatchError: the file can't be read or is no class map.
    """
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BnpatchError(f"cannot read the class map {path}: {error}", "check the path") from error
    if lines and all(len(line) == 2 and line[1].isdecimal() for line in lines):
        lines.sort(key=lambda line: int(line[1]))
        if [int(index) for _, index in lines] != list(range(len(lines))):
            raise BnpatchError(
                f"the indices of {path} are not 0 to {len(lines) - 1}", "number every output once"
            )
    names = tuple(line[0] for line in lines)
    if not names or len(set(names)) < len(names):
        raise BnpatchError(
            f"{path} is not a class map", "write one class folder a line, in the order of the outputs"
        )
    return names


def _imagenet_synsets(num_outputs: int) -> dict[str, int]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_outputs})
    if subset is None:
        return {}
    return {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}


def _warn_of_other_names(folders: Sequence[str], class_names: Sequence[str] | None) -> None:
    if class_names:
        strange = next((name for name in folders if name not in class_names), folders[0])
        warnings.warn(
            f"the class folder {strange!r} is not among the model's class names; folders are taken in order",
            BnpatchWarning,
            stacklevel=3,
        )


def _warn_of_order(folders: Sequence[str], order: ClassOrder) -> None:
    plain, natural = (o.sort(folders) for o in ClassOrder)
    if plain != natural:
        example = next(a for a, b in zip(plain, natural, strict=True) if a != b)
        warnings.warn(
            f"class folders such as {example!r} sort differently in torchvision and in timm; taken in "
            f"{order.value} order, --class-map FILE says otherwise",
            BnpatchWarning,
            stacklevel=3,
        )
