"""Variances of means over examples that come in groups, such as the frames of a video.

Examples of a group resemble each other, so that a group says less than as many independent examples. The
effective unit is the group: the variance of a mean is estimated from the groups (Liang & Zeger, "Longitudinal
data analysis using generalized linear models", Biometrika 73, 1986), and the number of examples that a rate
rests on is divided by the design effect (Kish, "Survey Sampling", 1965).
"""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

#: With fewer groups than this, the variance between groups is hardly known, and any interval is rough.
FEW_GROUPS = 10

# A prior: the design effect is estimated as if this many more groups were known, in each of which all values
# are equal.
_PRIOR_GROUPS = 2


def clusters(groups: Indices | None) -> Indices | None:
    """Number the groups of examples (N,) from 0; None where each example is a group of its own.

    >>> clusters(np.array([7, 7, 3]))
    array([1, 1, 0])
    >>> clusters(np.array([7, 5, 3])) is None
    True
    """
    if groups is None:
        return None
    unique, numbers = np.unique(groups, return_inverse=True)
    return numbers if len(unique) < len(groups) else None


def by_group(values: Values, numbers: Indices) -> Values:
    """Return one value per group, (G,), whose mean and variance are those of the mean of all examples.

    This is the linearization of the ratio of two sums, that of the values and that of the sizes. For groups
    of one size it is the mean of each group.

    >>> by_group(np.array([1.0, 3.0, 5.0, 7.0]), np.array([0, 0, 1, 1]))
    array([2., 6.])
    """
    sizes, sums = np.bincount(numbers), np.bincount(numbers, values)
    mean = float(np.mean(values))
    linear: Values = mean + (sums - sizes * mean) * (len(sizes) / len(values))
    return linear


def effective_groups(numbers: Indices) -> float:
    """Return the effective number of groups (Kish), which unequal sizes reduce: 1 for one, else 2 or more."""
    sizes = np.bincount(numbers)
    return 1.0 if len(sizes) == 1 else max(2.0, len(numbers) ** 2 / float(np.sum(sizes**2)))


def effective_count(values: Values, numbers: Indices) -> float:
    """Return the number of independent examples that say as much about the mean as these, in (0, N].

    It is N over the design effect: the variance of the mean with these groups over that without. If few
    values differ from the rest, they say little about how alike the values of a group are, so the estimate
    goes towards that of groups whose values are all equal. Without this prior, the interval of a rate would
    shrink to nothing where no answer changes.

    Args:
        values: values of the examples, (N,), most of which are equal.
        numbers: number of the group of each example, (N,).
    """
    sizes = np.bincount(numbers)
    largest = float(np.sum(sizes**2)) / len(values)  # the design effect if the values of a group are equal
    distinct, counts = np.unique(values, return_counts=True)
    # Only groups with a value other than the commonest show how alike the values of a group are.
    differing = len(np.unique(numbers[values != distinct[np.argmax(counts)]]))
    found = 0.0
    if differing and len(sizes) > 1:
        between = float(np.var(by_group(values, numbers), ddof=1)) / len(sizes)
        found = between / (float(np.var(values)) / len(values))
    effect = (differing * found + _PRIOR_GROUPS * largest) / (differing + _PRIOR_GROUPS)
    return len(values) / max(1.0, effect)
