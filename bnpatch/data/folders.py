"""Folders of images: which files, of which class?"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from bnpatch.data.classes import ClassOrder, read_class_map, targets_of_folders
from bnpatch.data.examples import Indices
from bnpatch.data.images import FileImages
from bnpatch.errors import BnpatchError, BnpatchWarning
from bnpatch.patchable import Patchable

WITHOUT_LABELS = "or search without labels: --metric unlabeled"


def open_folder(
    folder: Path, model: Patchable, class_map: str | os.PathLike[str] | None, optional: bool
) -> tuple[FileImages, Indices | None]:
    """Find the images of a folder and their classes.

    Args:
        folder: has a folder of images per class.
        model: has outputs, and perhaps names for them.
        class_map: file that names them.
        optional: images without a class are taken too: those outside class folders, and those in folders
            that can't be matched with the outputs, of which a warning tells.

    Returns:
        The images, and their classes of shape (N,), -1 for those without; None where no image has one.

    Raises:
        BnpatchError: there are no images, or classes are needed and can't be told.
    """
    by_class = images_by_class(folder)
    outside = by_class.pop("", [])
    if not optional:
        _check_class_folders(folder, len(by_class), len(outside))
        outside = []
    if not by_class and not outside:
        raise BnpatchError(f"{folder} has no images", "it needs some")
    targets = _targets(folder, list(by_class), model, class_map, optional) if by_class else {}
    if model.class_names is None and targets and len(targets) == model.num_outputs():
        model.class_names = tuple(
            sorted(targets, key=lambda name: targets[name])
        )  # from now on they are known
    pairs = [(path, -1) for path in outside]
    pairs += [(path, targets.get(name, -1)) for name, paths in by_class.items() for path in paths]
    source = FileImages([path for path, _ in pairs], model.preprocessing.image_mode, folder)
    return source, np.array([target for _, target in pairs], dtype=np.int64) if targets else None


def images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by the folder directly below the root, at any depth; the root's own under ""."""
    from timm.utils.misc import natural_key

    Image.init()
    types = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    by_class: dict[str, list[Path]] = {}
    for root, _, files in os.walk(folder, followlinks=True):
        parts = Path(root).relative_to(folder).parts
        images = [Path(root, name) for name in files if Path(name).suffix.lower() in types]
        if images:
            by_class.setdefault(parts[0] if parts else "", []).extend(images)
    return {
        name: sorted(paths, key=lambda path: natural_key(str(path)))
        for name, paths in sorted(by_class.items())
    }


def _check_class_folders(folder: Path, count: int, outside: int) -> None:
    if not count and outside:
        raise BnpatchError(
            f"the images of {folder} are in no class folders", f"make one folder per class, {WITHOUT_LABELS}"
        )
    if not count:
        raise BnpatchError(f"{folder} has no images", "it needs a folder of images per class")
    if outside:
        warnings.warn(
            f"{outside} images of {folder} are in no class folder: left out", BnpatchWarning, stacklevel=5
        )


def _targets(
    folder: Path,
    names: list[str],
    model: Patchable,
    class_map: str | os.PathLike[str] | None,
    optional: bool,
) -> dict[str, int]:
    """Outputs by name of folder; where classes are optional, without the folders that are no classes."""
    try:
        targets = targets_of_folders(
            names,
            num_outputs=model.num_outputs(),
            class_names=read_class_map(class_map) if class_map else model.class_names,
            order=ClassOrder(model.class_order),
            sure=class_map is not None,
            partial=optional,
            where=str(folder),
        )
        why = "is not among the model's classes"
    except BnpatchError as error:
        if not optional or class_map is not None:
            raise
        targets, why = {}, f"is no class: {error.problem}"
    if strange := next((name for name in names if name not in targets), None):
        warnings.warn(
            f"the folder {strange!r} of {folder} {why}; images of such folders count as unlabelled",
            BnpatchWarning,
            stacklevel=5,
        )
    return targets
