"""Find the images of a folder and their classes: in a folder per class, or in a table beside them.

:mod:`bnpatch.data.class_targets` matches the classes with the outputs of a model.
"""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import counted
from bnpatch.data.bit_depth import given, of_files
from bnpatch.data.class_maps import SYNSET, composed, read_class_map
from bnpatch.data.class_targets import ClassOrder, are_numbers, targets_of_folders
from bnpatch.data.dataset import Indices
from bnpatch.data.image_files import FoundImages, class_folders, find_images
from bnpatch.data.images import FileImages
from bnpatch.data.label_files import classes_beside
from bnpatch.data.preprocessing import ImageModel

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
    targets = {}
    if by_class:
        in_table = by_class is not found.by_class
        targets = _targets(folder, list(by_class), model, names, class_map is not None, optional, in_table)
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
            order = ClassOrder.NATURAL if are_numbers(names) else order
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
    if not classes and are_numbers(list(others)):
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
    try:
        targets = targets_of_folders(
            names,
            num_outputs=model.num_outputs(None, len(class_names) if sure and class_names else len(names)),
            class_names=class_names,
            order=ClassOrder(model.class_order),
            in_table=in_table,
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
