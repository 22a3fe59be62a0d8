"""Read the classes of images that are not in class folders from a table beside them.

The validation images of ImageNet and of Tiny ImageNet come like this (LOC_val_solution.csv,
val_annotations.txt), and so does what Hugging Face's imagefolder reads (metadata.csv).
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from bnpatch.core.limits import TEXT_MB

_SUFFIXES = (".csv", ".tsv", ".txt")
_MOST_FILES = 20  # that are looked at
_SHARE = 0.9  # of the images that a table must name
_HEADS = ("label", "labels", "class", "class_name", "classname", "target", "category", "breed", "species")

_Row = list[str]


def classes_beside(folder: Path, paths: Sequence[Path]) -> tuple[Path, dict[Path, str]] | None:
    """Find a table with the classes of images, in their folder or in the one above.

    A table has an image per line: its name, with or without folders and suffix, and its class, with commas,
    tabs or spaces between. A first line may name the columns. Numbers that follow a class in its column, as
    the boxes of ImageNet, are left out.

    Args:
        folder: the folder that was given.
        paths: the images in it, at any depth.

    Returns:
        The table, and the classes by image; None if no table names nine images of ten, and two classes.
    """
    for file in [*_tables(folder), *_tables(folder.absolute().parent)][:_MOST_FILES]:
        by_name = _classes(_rows(file), {key for path in paths for key in (path.name, path.stem)})
        found = {path: by_name.get(path.name, by_name.get(path.stem, "")) for path in paths}
        found = {path: name for path, name in found.items() if name}
        if len(found) >= _SHARE * len(paths) and len(set(found.values())) > 1:
            return file, found
    return None


def _tables(folder: Path) -> list[Path]:
    try:
        files = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
        return sorted(path for path in files if path.stat().st_size < TEXT_MB.value * 1e6)
    except OSError:  # the folder above may not be readable
        return []


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the rows of a table; none if it is no text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        separator = next((mark for mark in "\t,;" if mark in first), " ")
        yield from csv.reader(text.splitlines(), delimiter=separator)
    except (OSError, UnicodeDecodeError, csv.Error):  # another program's file, or none that can be read
        return


def _classes(rows: Iterator[_Row], names: set[str]) -> dict[str, str]:
    """Return the classes by name of image, as far as the rows have any of these names."""
    head: _Row = []
    found: dict[str, str] = {}
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row]
        at = next((place for place, cell in enumerate(cells) if _name(cell) in names), None)
        if at is None:
            head = [cell.lower() for cell in cells] if number == 0 else head
            continue
        beside = at + 1 if at + 1 < len(cells) else at - 1
        place = next((place for place, cell in enumerate(head) if cell in _HEADS), beside)
        if place != at and 0 <= place < len(cells) and (label := cells[place]):
            first, *rest = label.split()
            is_first = all(part.lstrip("-").isdecimal() for part in rest)
            found[_name(cells[at])] = first if is_first else label
    return found


def _name(cell: str) -> str:
    """Return the name of a file without the folders that it is in."""
    return cell.replace("\\", "/").rpartition("/")[2]
