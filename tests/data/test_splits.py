"""Random splits and folds, class by class."""

import numpy as np
import pytest

from bnpatch.core.errors import BnpatchError
from bnpatch.data.dataset import folds, split


def test_split_is_stratified_seeded_and_complete():
    targets = np.repeat([0, 1, 2], [100, 20, 4])
    tuning, held_out = split(targets, 0.25, seed=0)
    assert np.bincount(targets[held_out]).tolist() == [25, 5, 1]
    assert sorted([*tuning, *held_out]) == list(range(124))
    assert np.array_equal(split(targets, 0.25, seed=0)[1], held_out)
    assert not np.array_equal(split(targets, 0.25, seed=1)[1], held_out)
    singles = split(np.arange(100), 0.3, seed=0)[1]
    assert len(singles) == 30


def test_the_unlabelled_are_held_out_only_where_all_are():
    strata = np.array([-1] * 50 + [0] * 30 + [1] * 20)
    tuning, held_out = split(strata, 0.5, seed=0)
    assert np.bincount(strata[held_out]).tolist() == [15, 10]
    assert sorted([*tuning, *held_out]) == list(range(100))
    tuning, held_out = split(np.full(40, -1), 0.25, seed=0)
    assert (len(tuning), len(held_out)) == (30, 10)
    assert not np.array_equal(held_out, split(np.full(40, -1), 0.25, seed=1)[1])


@pytest.mark.parametrize("k", [2, 3, 7])
def test_folds_are_disjoint_complete_and_stratified(k):
    strata = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2], [10, 70, 35, 8]))
    parts = folds(strata, k, seed=0)
    assert sorted(np.concatenate(parts)) == np.flatnonzero(strata >= 0).tolist()
    counts = np.array([np.bincount(strata[part], minlength=3) for part in parts])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp([len(part) for part in parts]) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(np.array_equal(a, b) for a, b in zip(parts, folds(strata, k, seed=0), strict=True))
    assert not np.array_equal(parts[0], folds(strata, k, seed=1)[0])


def test_folds_of_the_unlabelled():
    assert sorted(np.concatenate(folds(np.full(11, -1), 4, seed=0))) == list(range(11))


@pytest.mark.parametrize("k", [1, 6])
def test_more_folds_than_examples_are_refused(k):
    with pytest.raises(BnpatchError, match=f"5 examples can't be held out in {k} folds"):
        folds(np.zeros(5, int), k, seed=0)
