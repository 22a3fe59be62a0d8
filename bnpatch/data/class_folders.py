"""Find the images of a folder, and match its class folders with the outputs of a model.

A wrong match makes a good model look broken, so :func:`targets_of_folders` raises an error or warns where
the match is not certain. :func:`open_folder` finds the images; :mod:`bnpatch.data.class_maps` reads the file
in which the user can give the match.
"""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path

import numpy as np

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import counted
from bnpatch.data.bit_depth import given, of_files
from bnpatch.data.class_maps import SYNSET, composed, read_class_map
from bnpatch.data.class_names import SAY_WHICH, check_names, outputs_by_name, outputs_by_synset
from bnpatch.data.dataset import Indices
from bnpatch.data.image_files import FoundImages, class_folders, find_images
from bnpatch.data.images import FileImages
from bnpatch.data.label_files import classes_beside
from bnpatch.data.preprocessing import ImageModel


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
    indices: bool = False,
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
        indices: whether names that are the numbers of all outputs are these, whatever the order of folders;
            true for a table.
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
    if indices and {*map(int, folders)} == {*range(num_outputs)}:
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
    if class_names and by_name.keys().isdisjoint(map(composed, folders)) and not _are_numbers(folders):
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


def _are_numbers(folders: Sequence[str]) -> bool:
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
    if not _are_numbers(folders) or set(map(int, folders)) == set(range(len(folders))):
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


# Names of the parts of a data set, the most likely one first.
_PARTS = ("val", "validation", "valid", "test", "train")

WITHOUT_LABELS = "or search without labels: --metric unlabeled"


def open_folder(
    folder: Path,
    model: ImageModel,
    class_map: str | os.PathLike[str] | None,
    optional: bool,
    bit_depth: int | None = None,
    strict: bool = False,
) -> tuple[FileImages, Indices | None]:
    """Find the images of a folder and their classes.

    Args:
        folder: a folder with one folder of images per class.
        model: the model, whose class names are used if it has some, and set if they become known here.
        class_map: file with the class names, see :func:`bnpatch.data.class_maps.read_class_map`.
        optional: also use images without a class: those outside class folders, and those in folders that
            can't be matched with the outputs (with a warning).
        bit_depth: how many bits the values of 16- and 32-bit images have; by default, as many as a sample of
            them needs (with a warning).
        strict: raise an error if a folder can't be listed; otherwise it counts as an image that can't be
            read.

    Returns:
        The images; and their classes of shape (N,), -1 for images without a class, or None if no image has
        one.

    Raises:
        BnpatchError: there are no images, or classes are needed and can't be determined.
    """
    found = find_images(folder)
    by_class = found.by_class
    if strict and found.problems:
        path, problem = next(iter(found.problems.items()))
        raise BnpatchError(f"cannot read {path}: {problem}", "make it readable, or leave out --strict")
    _warn_of_left_out(folder, found)
    names = read_class_map(class_map) if class_map else model.class_names
    if len(by_class.keys() - {""}) < 2 and not set(by_class) & set(names or ()):
        by_class = _by_table(folder, by_class)
    outside = by_class.pop("", [])
    if not optional:
        _check_class_folders(folder, len(by_class), len(outside))
        outside = []
    if not by_class and not outside:
        raise BnpatchError(f"{folder} has no images", "give a folder that has some")
    if by_class and by_class is found.by_class:
        _warn_of_empty(folder, by_class, names, class_map is not None)
    _check_parts(folder, by_class, names, optional)
    targets = (
        _targets(
            folder,
            list(by_class),
            model,
            names,
            class_map is not None,
            optional,
            by_class is not found.by_class,
        )
        if by_class
        else {}
    )
    if model.class_names is None and targets and len(targets) == model.num_outputs(None, len(targets)):
        model.class_names = tuple(sorted(targets, key=lambda name: targets[name]))
    pairs = [(path, -1) for path in outside]
    pairs += [(path, targets.get(name, -1)) for name, paths in by_class.items() for path in paths]
    depth = given(bit_depth) if bit_depth else of_files([outside, *by_class.values()], str(folder))
    mode = model.preprocessing.image_mode
    source = FileImages([path for path, _ in pairs], mode, folder, depth, found.problems)
    source.left_out = found.left_out
    return source, np.array([target for _, target in pairs], dtype=np.int64) if targets else None


def classes_in(folder: Path, order: ClassOrder) -> list[str]:
    """Name the class folders of a folder; or the classes in a table beside its images, in their order.

    Raises:
        BnpatchError: the folder can't be listed.
    """
    names = class_folders(folder)
    if len(names) < 2:
        paths = [path for images in find_images(folder).by_class.values() for path in images]
        if paths and (found := classes_beside(folder, paths)) is not None:
            names = sorted(set(found[1].values()))
            order = ClassOrder.NATURAL if _are_numbers(names) else order
    return order.sort(names)


def _by_table(folder: Path, by_class: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return images by class as a table beside them says, with a warning; or as they are, without one."""
    paths = [path for images in by_class.values() for path in images]
    if not paths or (found := classes_beside(folder, paths)) is None:
        return by_class
    table, classes = found
    warnings.warn(
        f"the images of {folder} are in no class folders: their classes are those in {table.name}",
        BnpatchWarning,
        stacklevel=5,
    )
    by_table: dict[str, list[Path]] = {name: [] for name in sorted(set(classes.values()))}
    for path in paths:
        by_table.setdefault(classes.get(path, ""), []).append(path)
    return by_table


def _check_parts(
    folder: Path, by_class: Mapping[str, Sequence[Path]], known: Sequence[str] | None, optional: bool
) -> None:
    """Check that the folders are classes and not the parts of a data set: train, val and so on."""
    if not by_class or not set(by_class) <= set(_PARTS) or set(by_class) <= set(known or ()):
        return
    if optional and not any(
        len(p.relative_to(folder).parts) > 2 for paths in by_class.values() for p in paths
    ):
        return  # folders of images without labels
    first = next(name for name in _PARTS if name in by_class)
    raise BnpatchError(
        f"the folders of {folder} ({', '.join(by_class)}) are parts of a data set, not classes",
        f"give {folder / first}",
    )


def _warn_of_left_out(folder: Path, found: FoundImages) -> None:
    for why, images in found.images_left_out.items():
        names = [name for name, reason in found.left_out.items() if reason == why]
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(
            f"left out of {folder}, because {why}: {len(names)} ({some}), with {counted(images, 'image')}",
            BnpatchWarning,
            stacklevel=5,
        )


def _warn_of_empty(folder: Path, others: Collection[str], known: Sequence[str] | None, sure: bool) -> None:
    """Warn of folders without images, and say whether they count as classes.

    Args:
        folder: the folder that they are in.
        others: names of the folders with images.
        known: names of the classes, if they are known; otherwise numbers and synsets may be names.
        sure: the user gave the class names, so that folders of other names are certainly no classes.
    """
    empty = [name for name in class_folders(folder) if name not in others]
    classes = set(map(composed, known or ()))
    if not classes and _are_numbers(list(others)):
        classes = set(filter(str.isdecimal, empty))
    unknown = [name for name in empty if composed(name) not in classes and not SYNSET.fullmatch(name)]
    for names, taken in (
        (sorted({*empty} - {*unknown}), "taken for classes by their names"),
        ([] if sure else unknown, "not taken for classes; --class-map FILE says otherwise"),
    ):
        if names:
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            warnings.warn(
                f"{folder} has {counted(len(names), 'folder')} without images ({some}), {taken}",
                BnpatchWarning,
                stacklevel=5,
            )


def _check_class_folders(folder: Path, count: int, outside: int) -> None:
    if not count and outside:
        raise BnpatchError(
            f"the images of {folder} are in no class folders", f"make one folder per class, {WITHOUT_LABELS}"
        )
    if not count:
        raise BnpatchError(f"{folder} has no images", "it needs a folder of images per class")
    if outside:
        warnings.warn(
            f"left out of {folder}, because in no class folder: {counted(outside, 'image')}",
            BnpatchWarning,
            stacklevel=5,
        )


def _targets(
    folder: Path,
    names: list[str],
    model: ImageModel,
    class_names: Sequence[str] | None,
    sure: bool,
    optional: bool,
    in_table: bool,
) -> dict[str, int]:
    """Return outputs by name of folder; if classes are optional, folders that are no classes are left out."""
    numbers = in_table and _are_numbers(names)
    try:
        targets = targets_of_folders(
            names,
            num_outputs=model.num_outputs(None, len(class_names) if sure and class_names else len(names)),
            class_names=class_names,
            order=ClassOrder.NATURAL if numbers else ClassOrder(model.class_order),
            indices=numbers,
            sure=sure,
            partial=optional,
            where=str(folder),
        )
        why = "is not among the model's classes"
    except BnpatchError as error:  # the folders are no classes of the model: they may be something else
        if not optional or sure:
            raise
        targets, why = {}, f"is no class: {error.problem}"
    if strange := next((name for name in names if name not in targets), None):
        warnings.warn(
            f"the folder {strange!r} of {folder} {why}; images of such folders count as unlabelled",
            BnpatchWarning,
            stacklevel=5,
        )
    return targets
