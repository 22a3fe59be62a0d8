"""Groups of examples that are not independent: frames of a video, views of a product, images of a patient.

A group stays together in whatever splits a data set, and is one unit in intervals.
"""

import csv
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import counted
from bnpatch.data.decoding import Indices, Source

#: One label per example, or a function from the name of an example to one; None for a group of its own.
GroupsOf = Sequence[Any] | Callable[[str], Any]

_REMEDY = "see --group-by, or groups= in Python"


def number_groups(groups: GroupsOf, source: Source) -> Indices:
    """Number the groups of the examples of a source from 0, (N,), in the order of their appearance.

    Args:
        groups: one label per example, or a function from the name of an example (for a file, its path below
            the folder of the data set) to its label. Examples with equal labels are a group; one whose label
            is None is a group of its own.
        source: where the examples come from.

    Raises:
        BnpatchError: there is another number of labels than of examples, or each is a group of its own.
    """
    if callable(groups):
        labels = [groups(source.name(index)) for index in range(len(source))]
    else:
        labels = np.asarray(groups).tolist() if hasattr(groups, "__array__") else list(groups)
    if len(labels) != len(source):
        raise BnpatchError(
            f"there are {counted(len(labels), 'group label')} for {counted(len(source), 'example')}",
            "give one label per example",
        )
    known: dict[Any, int] = {}
    numbers = [
        known.setdefault(("label", label) if label is not None else ("alone", index), len(known))
        for index, label in enumerate(labels)
    ]
    if len(known) == len(labels) > 1:
        raise BnpatchError(
            "the groups have one example each",
            f"name groups that several examples share ({_REMEDY}), or leave groups out",
        )
    return np.array(numbers, dtype=np.int64)


def warn_of_shared_groups(groups: Callable[[str], Any], source: Source, other: Source) -> None:
    """Warn if two data sets, one to learn from and one to judge by, have images of the same group.

    Args:
        groups: a function from the name of an example to the label of its group, or None for none.
        source: where the examples to learn from come from.
        other: where those to judge by come from.
    """
    names = [{groups(some.name(index)) for index in range(len(some))} for some in (source, other)]
    shared = sorted(map(str, names[0] & names[1] - {None}))
    if shared:
        warnings.warn(
            f"{counted(len(shared), 'group')}, such as {shared[0]!r}, both in the data to learn from and in "
            "that to judge by, so that the verdict is better than on images of other groups: divide them by "
            "group",
            BnpatchWarning,
            stacklevel=2,
        )


def group_by(rule: str) -> Callable[[str], str | None]:
    """Return a function from the name of a file to its group.

    >>> group_by("parent")("cat/scene7/0001.jpg")
    'scene7'
    >>> group_by(r"(patient[0-9]+)")("sick/patient12_left.png")
    'patient12'

    Args:
        rule: "parent" for the folder that holds the file below the class folder; a folder of one name in two
            classes is one group. The path of a ``.csv`` file with a name and a group in each line. Or a
            regular expression, which is searched in the name; its first parenthesis is the group.

    Raises:
        BnpatchError: the rule is none of these. The function raises it for a name that the rule doesn't know.
    """
    if rule == "parent":
        return _folder_below_class
    if rule.lower().endswith(".csv"):
        return _of_table(Path(rule))
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise BnpatchError(
            f"--group-by {rule!r} is no regular expression: {error}",
            "write parent, an expression such as '(patient[0-9]+)', or the name of a .csv file",
        ) from error
    if not pattern.groups:
        raise BnpatchError(
            f"--group-by {rule!r} has no parentheses", "put them around what names the group: '([^_]+)_'"
        )

    def group(name: str) -> str | None:
        found = pattern.search(name)
        if found is None or found[1] is None:
            raise BnpatchError(
                f"--group-by {rule!r} finds nothing in {name}", "write an expression that fits all names"
            )
        return found[1]

    return group


def _folder_below_class(name: str) -> str | None:
    """Name the folder of a file below the class folder; None for a file directly in the class folder."""
    return "/".join(PurePath(name).parts[1:-1]) or None


def _of_table(path: Path) -> Callable[[str], str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BnpatchError(
            f"cannot read {path}: {error}", "give a file with name,group in each line"
        ) from error
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise BnpatchError(
            f"{path} has the line {','.join(wrong)!r}", "write a name and a group in each line, name,group"
        )
    table = {os.path.normpath(name.strip()): group.strip() for name, group in lines}

    def group(name: str) -> str:
        if name not in table:
            raise BnpatchError(
                f"{path} has no group for {name}", "list each image by its path below the folder of the data"
            )
        return table[name]

    return group


def shuffled(indices: Indices, groups: Indices | None, rng: np.random.Generator) -> Indices:
    """Put examples in random order; those of a group become neighbours.

    Args:
        indices: indices of the examples, (M,).
        groups: the number of the group of each example of the data set, (N,); None without groups.
        rng: the source of random numbers.
    """
    order = rng.permutation(indices)
    if groups is None:
        return order
    rank = rng.permutation(int(groups.max()) + 1)
    return order[np.argsort(rank[groups[order]], kind="stable")]


def cut(order: Indices, ends: Iterable[int], groups: Indices | None) -> list[Indices]:
    """Cut a sequence of examples at some positions, each moved to where the nearest group ends.

    Parts that would be empty are left out, so that large groups make fewer parts.

    >>> [part.tolist() for part in cut(np.arange(6), [2, 4], np.array([0, 0, 0, 1, 1, 1]))]
    [[0, 1, 2], [3, 4, 5]]

    Args:
        order: indices of examples, those of a group side by side.
        ends: positions after the last example of each part but the last.
        groups: the number of the group of each example of the data set, (N,); None without groups.
    """
    if groups is not None:
        here = groups[order]
        borders = np.flatnonzero(here[1:] != here[:-1]) + 1
        ends = sorted({int(borders[np.argmin(np.abs(borders - end))]) for end in ends if len(borders)})
    return np.split(order, list(ends))


def deal(strata: Indices, groups: Indices, shares: Sequence[float], seed: int) -> list[Indices]:
    """Deal whole groups out to parts, so that each part has its share of each class as far as groups allow.

    The groups are dealt in random order, the largest first, each to the part that lacks its classes most.

    Args:
        strata: stratum of each example, (N,).
        groups: number of the group of each example, (N,).
        shares: the share of the examples that each part should have; they add up to 1.
        seed: seed of the random order.

    Returns:
        Indices of each part, in ascending order.
    """
    rng = np.random.default_rng(seed)
    _, kinds = np.unique(strata, return_inverse=True)
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    # Each example also counts in one more class, that of all examples, so that the parts' sizes fit, too.
    everything = int(kinds.max(initial=-1)) + 1
    cells = np.concatenate([numbers * (everything + 1) + kinds, numbers * (everything + 1) + everything])
    cells, members = np.unique(cells, return_counts=True)
    starts = np.searchsorted(cells // (everything + 1), np.arange(len(sizes) + 1))
    cells %= everything + 1
    totals, wanted = np.bincount(cells, members), np.asarray(shares, dtype=np.float64)
    filled = np.zeros((len(shares), everything + 1))
    part_of = np.zeros(len(sizes), dtype=np.int64)
    order = rng.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        here = slice(starts[group], starts[group + 1])
        present, counts = cells[here], members[here]
        # By part: how much this group would increase the squared deviations from the part's share of each
        # class, in units of the class.
        cost = ((2 * filled[:, present] + counts) * counts / totals[present] ** 2).sum(1) / wanted
        part = part_of[group] = int(np.argmin(cost))
        filled[part, present] += counts
    return [np.flatnonzero(part_of[numbers] == part) for part in range(len(shares))]
