"""Read the classes of images that are not in class folders from a table beside them.

The validation images of ImageNet and of Tiny ImageNet come like this (LOC_val_solution.csv,
val_annotations.txt), and so does what Hugging Face's imagefolder reads (metadata.csv).
"""

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path

from bnpatch.core.limits import TEXT_MB

_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
_MOST_FILES = 20  # that are looked at
_SHARE = 0.9  # of the images that a table must name
_HEADS = ("label", "labels", "class", "class_name", "classname", "target", "category", "breed", "species")
_BITS = ("0", "1", "0.0", "1.0")

_Row = list[str]


def classes_beside(folder: Path, paths: Sequence[Path]) -> tuple[Path, dict[Path, str]] | None:
    """Find a table with the classes of images, in their folder or in the one above.

    A table has an image per line: its name, with or without folders and suffix, and its class, with commas,
    tabs or spaces between. A first line may name the columns; where these are the classes themselves, the
    class is the column with the 1. A ``.jsonl`` file has an object per line instead. Numbers that follow a
    class in its column, as the boxes of ImageNet, are left out. Where images have equal names, their folders
    decide; an image that is listed with several classes has none.

    Args:
        folder: the folder that was given.
        paths: the images in it, at any depth.

    Returns:
        The table, and the classes by image; None if no table names nine images of ten, and two classes.
    """
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        for key in {path.name, path.stem}:
            by_name.setdefault(key, []).append(path)
    for file in [*_tables(folder), *_tables(folder.absolute().parent)][:_MOST_FILES]:
        found = _classes(*_rows(file), by_name)
        if len(found) >= _SHARE * len(paths) and len(set(found.values())) > 1:
            return file, found
    return None


def _tables(folder: Path) -> list[Path]:
    try:
        files = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
        return sorted(path for path in files if path.stat().st_size < TEXT_MB.value * 1e6)
    except OSError:  # the folder above may not be readable
        return []


def _rows(file: Path) -> tuple[list[_Row], bool]:
    """Return the rows of a table, none if it is no text; and whether spaces are between its columns."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if file.suffix.lower() == ".jsonl":
            return _rows_of_json(lines), False
        separator = next((mark for mark in "\t,;" if lines and mark in lines[0]), " ")
        return list(
            csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")
        ), separator == " "
    except (OSError, ValueError, RecursionError, csv.Error):  # another program's file, or one that is damaged
        return [], False


def _rows_of_json(lines: Sequence[str]) -> list[_Row]:
    """Return objects, one in each line, as rows, below the names of the first object's values."""
    objects = [content for content in map(json.loads, lines) if isinstance(content, dict)]
    head = list(objects[0]) if objects else []
    plain = ([content.get(name) for name in head] for content in objects)
    return [head, *([str(v) if isinstance(v, (str, int)) else "" for v in row] for row in plain)]


def _classes(rows: Sequence[_Row], spaced: bool, by_name: Mapping[str, Sequence[Path]]) -> dict[Path, str]:
    """Return the classes of images, as far as the rows name these images.

    Args:
        rows: the rows of a table.
        spaced: whether spaces are between its columns, and may be in the names of its classes.
        by_name: the images by their names, with and without suffix.
    """
    rows = [[cell.strip() for cell in row] for row in rows]
    names: dict[int, set[str]] = {}  # of images, by column: a number may be the class of another image
    for place, cell in chain.from_iterable(map(enumerate, rows)):
        if _parts(cell)[-1] in by_name:
            names.setdefault(place, set()).add(cell)
    head: _Row = []
    found: dict[Path, set[str]] = {}
    for number, cells in enumerate(rows):
        places = [place for place, cell in enumerate(cells) if cell in names.get(place, ())]
        at = max(places, key=lambda place: len(names[place]), default=None)
        if at is None:
            is_head = number == 0 and not any("." in cell or cell.isdecimal() for cell in cells)
            head = cells if is_head else head
        elif label := _class(cells, at, head, spaced):
            for path in _meant(_parts(cells[at]), by_name):
                found.setdefault(path, set()).add(label)
    return {path: next(iter(labels)) for path, labels in found.items() if len(labels) == 1}


def _class(cells: _Row, at: int, head: _Row, spaced: bool) -> str:
    """Return the class in a row that names an image in a column; "" if it is not sure which it is."""
    others = [place for place, cell in enumerate(head) if cell and place != at and place < len(cells)]
    named = [place for place in others if head[place].lower() in _HEADS]
    if len(others) > 1 and not named:
        ones = [head[place] for place in others if cells[place] in ("1", "1.0")]
        return ones[0] if len(ones) == 1 and all(cells[place] in _BITS for place in others) else ""
    if others:
        label = cells[(named or others)[0]]
    elif spaced:
        label = " ".join(cells[at + 1 :] or cells[:at])
    else:
        label = (cells[at + 1 :] or cells[at - 1 : at] or [""])[0]
    first, *rest = label.split() or [""]
    is_first = all(part.lstrip("-").isdecimal() for part in rest)
    return "" if label == "-1" else first if is_first else label  # data sets have -1 for no class


def _meant(parts: Sequence[str], by_name: Mapping[str, Sequence[Path]]) -> list[Path]:
    """Return the images that have a name, and of its folders as many as any of them has."""
    paths = by_name[parts[-1]]

    def shared(path: Path) -> tuple[int, int]:
        pairs = zip(reversed(parts[:-1]), reversed(path.parts[:-1]), strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))), -len(path.parts)

    best = max(map(shared, paths))
    return [path for path in paths if shared(path) == best]


def _parts(cell: str) -> list[str]:
    """Return the folders and the name in the path of a file."""
    return cell.replace("\\", "/").split("/")
