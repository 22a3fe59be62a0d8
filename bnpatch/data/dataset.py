"""A data set that is decoded once and read in batches any number of times, and random splits of it."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.data.decoding import Indices as Indices
from bnpatch.data.decoding import ItemTransform, Part, Source, decoded
from bnpatch.data.groups import deal
from bnpatch.data.near_copies import Sketches, warn_of_near_copies


@dataclass(frozen=True)
class Batch:
    """Some examples of a data set.

    Attributes:
        indices: their positions in the data set, of shape (N,).
        x: inputs (N, C, H, W), images as bytes or floats as the model takes them.
        targets: what a metric compares outputs with, of shape (N, ...).
    """

    indices: Indices
    x: Tensor
    targets: Tensor


class Examples:
    """A data set that can be read in batches any number of times.

    Decoded examples stay in memory as bytes, up to ``cache_gb``; the rest is decoded again in each pass.
    Examples that can't be read are left out.

    Args:
        source: where the images come from.
        targets: class index of each example, of shape (N,), -1 if it is not known; or anything else that a
            metric compares outputs with, of shape (N, ...); None if no example has a target.
        transform: converts an image to bytes (C, H, W).
        classes: whether the targets are class indices.
        num_workers: number of decoding threads; None for a number that suits the machine and the data, which
            is 0 for a data set of the user's own, because it may not be safe to read from several threads.
        cache_gb: memory for decoded examples, in units of 10^9 bytes.
        strict: raise an error at the first example that can't be read.
        pin_memory: return batches in pinned memory, from which a GPU copies asynchronously.

    Attributes:
        labelled: which examples have a target, of shape (N,).
        skipped: why examples can't be read, by index.
        left_out: by name, why files and folders are no examples, such as what tools leave behind.
        as_they_are: whether inputs are floats, to which no preprocessing is applied.
        in_memory: whether the source is in memory, so that it needs no cache and no threads.
        groups: number of the group of each example, of shape (N,); None if all are independent, see
            :mod:`bnpatch.data.groups`.
        sketches: sketches of the examples read so far, to find near-copies.
        after_reading: called after each pass over examples.
    """

    def __init__(
        self,
        source: Source,
        targets: npt.ArrayLike | None,
        transform: ItemTransform,
        *,
        classes: bool = True,
        num_workers: int | None = None,
        cache_gb: float = 4.0,
        strict: bool = False,
        pin_memory: bool = False,
    ) -> None:
        has_targets = targets is not None
        if targets is None:
            targets = np.full(len(source), -1)
        self.source = source
        self.targets: npt.NDArray[Any] = np.asarray(targets, dtype=np.int64 if classes else None)
        self.classes = classes
        self.labelled = self.targets >= 0 if classes else np.full(len(self.targets), has_targets)
        self.transform = transform
        self.num_workers = num_workers
        self.strict = strict
        self.pin_memory = pin_memory
        self.skipped: dict[int, str] = {}
        self.left_out: dict[str, str] = {}
        self.as_they_are = False
        self.in_memory = False
        self.groups: Indices | None = None
        self.sketches = Sketches()
        self.after_reading: Callable[[], None] = lambda: None
        self._cache = Cache(int(cache_gb * 1e9))

    def __len__(self) -> int:
        """Return the number of examples, with those that can't be read."""
        return len(self.targets)

    def keep(self, indices: Indices) -> None:
        """Keep only the examples with these indices, and number them from 0."""
        self.source = Part(self.source, indices)
        self.targets, self.labelled = self.targets[indices], self.labelled[indices]
        if self.groups is not None:
            self.groups = self.groups[indices]
        self.skipped, self._cache, self.sketches = {}, Cache(self._cache.budget), Sketches()

    @property
    def strata(self) -> Indices:
        """The stratum of each example, of shape (N,), for random choices that are balanced by class.

        It is the class, 0 for every target that is no class, and -1 for an example without a target.
        """
        return np.where(self.labelled, self.targets if self.classes else 0, -1)

    def num_groups(self, indices: Sequence[int] | Indices) -> int | None:
        """Return the number of groups that some examples are of; None without groups."""
        return None if self.groups is None else len(np.unique(self.groups[indices]))

    def warn_of_near_copies(self) -> str:
        """Warn if many of the examples read so far are near-copies, and no groups say so; return the text."""
        if self.groups is not None:
            return ""
        if self.in_memory:
            for index in range(len(self)):
                self.sketches.add(index, torch.as_tensor(self.source.read(index)))
        return warn_of_near_copies(self.sketches)

    def batches(self, batch_size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield the examples with these indices (default: all) in this order.

        Examples that can't be read are left out. An index that is given twice counts once.

        Raises:
            BnpatchError: an example can't be read and ``strict`` is set, or inputs differ in shape.
        """
        kept: list[tuple[int, Tensor]] = []
        for item in self._items(np.arange(len(self)) if indices is None else indices):
            kept.append(item)
            if len(kept) == batch_size:
                yield self._batch(kept)
                kept = []
        if kept:
            yield self._batch(kept)

    def readable(self, indices: Indices) -> Indices:
        """Return the indices of the examples that can be read.

        The method reads them all, and keeps them in memory up to the limit of the cache.

        Raises:
            BnpatchError: none of the examples can be read.
        """
        for _ in () if self.in_memory else self._items(indices):
            pass
        kept = np.array([index for index in indices if index not in self.skipped], dtype=np.int64)
        if not len(kept):
            index, problem = next(iter(self.skipped.items()))
            raise BnpatchError(
                f"none of the images can be read, {self.source.name(index)} for one: {problem}",
                "look at the files",
            )
        return kept

    def fingerprint(self) -> str:
        """Hash the names and the targets of the examples, and their content where reading it is cheap."""
        digest = hashlib.sha256(f"{self.targets.dtype} {self.targets.shape}".encode())
        digest.update(self.targets.tobytes())
        digest.update(self.labelled.tobytes())
        for index in range(len(self)):
            digest.update(os.fsencode(self.source.name(index)))  # a name on disk need not be text
            digest.update(self.source.content(index))
        return digest.hexdigest()[:16]

    def _items(self, indices: Indices) -> Iterator[tuple[int, Tensor]]:
        wanted = dict.fromkeys(map(int, indices))
        if self.in_memory:
            for index in wanted:
                yield index, torch.as_tensor(self.source.read(index))
            return
        cached = self._cache.inputs
        missing = [i for i in wanted if i not in cached and i not in self.skipped]
        arriving = decoded(self.source, self.transform, missing, self.num_workers)
        for index in wanted:
            if index in self.skipped:
                continue
            if index in cached:
                yield index, cached[index]
                continue
            x, problem = next(arriving)
            if x is None:
                self._skip(index, problem)
                continue
            self._cache.offer(index, x)
            self.sketches.add(index, x)
            yield index, x
        self.after_reading()

    def _skip(self, index: int, problem: str) -> None:
        name = self.source.name(index)
        if self.strict:
            raise BnpatchError(f"cannot read {name}: {problem}", "remove it, or leave out --strict")
        self.skipped[index] = problem

    def _batch(self, items: list[tuple[int, Tensor]]) -> Batch:
        indices = np.array([index for index, _ in items])
        try:
            x = torch.stack([x for _, x in items])
        except RuntimeError as error:
            raise BnpatchError(f"inputs differ in shape ({error})", "give inputs of one shape") from error
        targets = torch.from_numpy(self.targets[indices])
        if self.pin_memory:
            x, targets = x.pin_memory(), targets.pin_memory()
        return Batch(indices, x, targets)


@dataclass
class Cache:
    """Inputs by index, up to a total of ``budget`` bytes."""

    budget: int
    used: int = 0
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def offer(self, index: int, x: Tensor) -> None:
        """Keep an input if the budget allows it."""
        if self.used + x.nbytes <= self.budget:
            self.inputs[index] = x
            self.used += x.nbytes


def split(
    strata: Indices, fraction: float, seed: int, groups: Indices | None = None
) -> tuple[Indices, Indices]:
    """Split examples at random, class by class, into a part to tune on and a held-out part.

    The held-out part serves to score the result, which needs labels. Examples without a label are therefore
    never held out, unless no example has one. No group is in both parts: classes are balanced as far as
    groups allow, and an example without a label whose group is held out is in neither part.

    Args:
        strata: stratum of each example, of shape (N,), see :attr:`Examples.strata`.
        fraction: the share of each class that is held out, in (0, 1).
        seed: seed of the random choice.
        groups: number of the group of each example, of shape (N,); None if all are independent.

    Returns:
        Indices of the two parts, each in ascending order.
    """
    eligible = _eligible(strata)
    if groups is None:
        held_out = eligible[subset(strata[eligible], fraction, seed)]
    else:
        held_out = eligible[deal(strata[eligible], groups[eligible], (1 - fraction, fraction), seed)[1]]
    return others(held_out, len(strata), groups), held_out


def others(held_out: Indices, count: int, groups: Indices | None = None) -> Indices:
    """Return the indices of the other examples of a data set, without those of groups that are held out."""
    rest = np.setdiff1d(np.arange(count, dtype=np.int64), held_out)
    return rest if groups is None else rest[~np.isin(groups[rest], groups[held_out])]


def folds(strata: Indices, k: int, seed: int, groups: Indices | None = None) -> list[Indices]:
    """Split examples at random, class by class, into k parts that are held out in turn.

    The parts are disjoint, and their sizes differ by at most one example, or with groups as far as these
    make it necessary. Together they are all the examples that :func:`split` may hold out.

    Args:
        strata: stratum of each example, of shape (N,), see :attr:`Examples.strata`.
        k: number of parts.
        seed: seed of the random choice.
        groups: number of the group of each example, of shape (N,); None if all are independent. A group is in
            one part.

    Returns:
        Indices of each part, in ascending order.

    Raises:
        BnpatchError: there are fewer than two parts, or fewer examples or groups than parts.
    """
    eligible = _eligible(strata)
    units = len(eligible) if groups is None else len(np.unique(groups[eligible]))
    if not 2 <= k <= units:
        raise BnpatchError(
            f"{units} {'examples' if groups is None else 'groups'} can't be held out in {k} folds",
            "choose 2 folds or more, or give more data",
        )
    if groups is not None:
        return [eligible[part] for part in deal(strata[eligible], groups[eligible], [1 / k] * k, seed)]
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(eligible[strata[eligible] == value]) for value in np.unique(strata[eligible])]
    dealt = np.concatenate(by_class)  # every k-th of these goes to a fold, so each fold has all classes
    return [np.sort(dealt[part::k]) for part in range(k)]


def subset(strata: Indices, fraction: float, seed: int) -> Indices:
    """Choose a fraction of the examples at random, stratum by stratum; return indices in ascending order."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    missing = 0.0  # rounding error so far, which the next stratum corrects, so that the total is right
    for value in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == value))
        missing += fraction * len(members)
        count = min(round(missing), len(members))
        missing -= count
        chosen.extend(members[:count].tolist())
    return np.array(sorted(chosen), dtype=np.int64)


def portions(indices: Indices, size: int, seed: int) -> Iterator[Indices]:
    """Yield random batches without end; if fewer than a batch are left, all examples are shuffled again."""
    rng = np.random.default_rng(seed)
    size = min(size, len(indices))
    order: Indices = rng.permutation(indices)
    while True:
        if len(order) < size:
            order = rng.permutation(indices)
        yield order[:size]
        order = order[size:]


def _eligible(strata: Indices) -> Indices:
    """Return the indices of examples that can be held out: the labelled ones, or all if none is labelled."""
    labelled = np.flatnonzero(strata >= 0)
    return labelled if len(labelled) else np.arange(len(strata))
