"""Read a class map: a file with the names of the classes, from which the order of the outputs follows."""

import codecs
import contextlib
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import check_regular
from bnpatch.core.limits import CLASSES, TEXT_MB

_REMEDY = "write one class folder a line, in the order of the outputs, or a name, a tab and its index"

_Row = tuple[str, str]  # a name and its index
SYNSET = re.compile(r"n\d{8}")  #: a class of ImageNet, by its WordNet number


def composed(name: str) -> str:
    """Return a name in Unicode's composed form, because file systems encode accents differently."""
    return unicodedata.normalize("NFC", name)


def read_class_map(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a class map and return the names.

    The file may have one name per line in the order of the outputs; or a name and its index per line, in
    either order, with a tab, a comma, a semicolon or a space between them; or JSON: a list of names,
    ``{name: index}`` or ``{index: name}``. Indices count from 0. Names may have spaces.

    Returns:
        The names in the order of the outputs, in Unicode's composed form.

    Raises:
        BnpatchError: the file can't be read, is not a class map, or is much too long for one.
    """
    text = _text(path)
    stripped = text.strip()
    if stripped[:1] in ("[", "{") and (Path(path).suffix.lower() == ".json" or _is_json(stripped)):
        names = _of_json(stripped, path)
    else:
        written = (line.strip() for line in io.StringIO(text, newline=None) if line.strip())
        lines = list(islice(written, int(CLASSES.value) + 1))  # splitlines would list millions of lines first
        _check_count(len(lines), path)
        names = _of_lines(lines, path)
    names = [composed(name.strip()) for name in names]
    if not names or not all(names) or len(set(names)) < len(names):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        raise BnpatchError(
            f"{path} is not a class map" + (f", {twice!r} comes twice" if twice else ""), _REMEDY
        )
    return tuple(names)


def _text(path: str | os.PathLike[str]) -> str:
    try:
        check_regular(Path(path))
        size = Path(path).stat().st_size / 1e6
        TEXT_MB.check(size, f"the class map {path} has {size:,.0f} MB")
        content = Path(path).read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BnpatchError(f"cannot read the class map {path}: {error}", "check the path") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # other text, or brackets that are nested too deep to be a class map
        return False
    return True


def _of_json(text: str, path: str | os.PathLike[str]) -> list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BnpatchError(f"cannot read the class map {path}: {first_line(error)}", _REMEDY) from error
    _check_count(len(content), path)
    if isinstance(content, list) and _are_plain(content):
        return [str(name) for name in content]
    if isinstance(content, dict):
        # {index: [synset, name]} is how ImageNet's classes come
        values = [value[0] if isinstance(value, list) and value else value for value in content.values()]
        if _are_plain(values):
            rows = [(key, str(value)) for key, value in zip(content, values, strict=True)]
            if all(map(_is_index, content)) and not all(isinstance(value, int) for value in values):
                rows = [(name, index) for index, name in rows]
            if all(_is_index(index) for _, index in rows):
                return _in_order(rows, path)
    raise BnpatchError(f"{path} is not a class map", "give a list of names, {name: index} or {index: name}")


def _are_plain(values: list[Any]) -> bool:
    return all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in values)


def _of_lines(lines: list[str], path: str | os.PathLike[str]) -> list[str]:
    """Return the names in lines with an index if all lines have one, else the whole lines."""
    for separator in ("\t", ",", ";", None):
        pairs = [_cut(line, separator) for line in lines]
        for start in (0, 1) if separator and len(lines) > 2 else (0,):  # the first line may be a header
            ways = [[pair[way] for pair in pairs[start:]] for way in (0, 1)]
            ways = [rows for rows in ways if all(_is_index(index) for _, index in rows)]
            if rows := _chosen(ways, path):
                return _in_order(rows, path)
    if all(SYNSET.fullmatch(line.split()[0]) for line in lines):  # a description follows each synset
        return [line.split()[0] for line in lines]
    return lines


def _cut(line: str, separator: str | None) -> tuple[_Row, _Row]:
    """Split a line into name and index in two ways: with the index last, and with the index first."""
    if separator == ",":
        with contextlib.suppress(csv.Error):  # the line is longer than any that names a class
            row = next(csv.reader([line]), [])  # names may be quoted
            if len(row) == 2:
                return (row[0], row[1]), (row[1], row[0])
    last, first = line.rsplit(separator, 1), line.split(separator, 1)
    if len(last) < 2:
        return (line, ""), (line, "")
    return (last[0], last[1]), (first[1], first[0])


def _chosen(ways: list[list[_Row]], path: str | os.PathLike[str]) -> list[_Row] | None:
    """Return the rows with names and indices in the right places.

    The result is None if the numbers are parts of the names, as in the lines "room 1" and "room 2".
    """
    complete = [rows for rows in ways if _is_complete(rows)]
    if len(complete) == 2 and _sorted(complete[0]) != _sorted(complete[1]):
        raise BnpatchError(
            f"it is not clear which numbers of {path} are the indices",
            "write the names alone, in the order of the outputs",
        )
    distinct = [rows for rows in ways if len({name for name, _ in rows}) == len(rows)]
    return next(iter([*complete, *distinct]), None)


def _is_complete(rows: list[_Row]) -> bool:
    """Tell whether these are distinct names with the indices 0 to N - 1."""
    names = {name for name, _ in rows}
    return len(names) == len(rows) and sorted(int(index) for _, index in rows) == list(range(len(rows)))


def _in_order(rows: list[_Row], path: str | os.PathLike[str]) -> list[str]:
    rows = _sorted(rows)
    if [int(index) for _, index in rows] != list(range(len(rows))):
        raise BnpatchError(
            f"the indices of {path} are not 0 to {len(rows) - 1}", "number every output once, from 0"
        )
    return [name for name, _ in rows]


def _sorted(rows: list[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: int(row[1]))


def _is_index(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _check_count(count: int, path: str | os.PathLike[str]) -> None:
    CLASSES.check(count, f"{path} has {count:,} classes or more")
