"""Which folder is which output? The question whose wrong answer looks like a broken model."""

import os
import re
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import numpy as np
from PIL import Image

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.dataset import Indices
from bnpatch.data.images import FileImages
from bnpatch.data.preprocessing import ImageModel

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


WITHOUT_LABELS = "or search without labels: --metric unlabeled"


def open_folder(
    folder: Path, model: ImageModel, class_map: str | os.PathLike[str] | None, optional: bool
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
    model: ImageModel,
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
