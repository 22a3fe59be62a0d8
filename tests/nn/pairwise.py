"""Fewer cases than a product of parameters, of which every two values still meet."""

import itertools


def pairwise(*factors):
    """Rows with one value of each factor: any value of one and any value of another are together in some row.

    Greedy: the next row is the one with the most pairs that no row has yet. The first factor's first value is
    preferred where it makes no difference, so that the rows are the same whenever they are asked for.
    """
    factors = [list(factor) for factor in factors]
    rows = list(itertools.product(*(range(len(factor)) for factor in factors)))
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing.intersection(_pairs(row))))
        missing.difference_update(_pairs(best))
        chosen.append(tuple(factor[i] for factor, i in zip(factors, best, strict=True)))
    return chosen


def _pairs(row):
    return list(itertools.combinations(enumerate(row), 2))
