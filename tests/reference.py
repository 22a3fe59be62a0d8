"""The oracle: Eq. 3 of the paper by its definition, on real samples, in float64.

No formula of bnpatch appears here. The mixture is written out as a weighted sample: every value of the
example's channel group carries the weight alpha / count, and the running distribution is stood in for
by two equally likely points, mean - std and mean + std, which have its mean and its variance. Mean and
variance are then those of a weighted sample, taken in two passes. With a slope, alpha is first replaced by
the weight that the example's distance gives it, by its definition as a sigmoid. With another weight for the
variance, the sample is that of the deviations from each distribution's own mean, to whose variance that of
the two means is added.
"""

import numpy as np


def weighted_moments(values, weights):
    mean = np.sum(weights * values) / np.sum(weights)
    return mean, np.sum(weights * (values - mean) ** 2) / np.sum(weights)


def mixed(weight, one, other):
    """Moments of the distribution that draws from ``one`` with a weight, else from ``other``; per channel."""
    found = []
    for (mean, var), (mean2, var2) in zip(zip(*one, strict=True), zip(*other, strict=True), strict=True):
        points = np.array(
            [mean - var**0.5, mean + var**0.5, mean2 - var2**0.5, mean2 + var2**0.5], np.float64
        )
        found.append(weighted_moments(points, np.array([weight, weight, 1 - weight, 1 - weight]) / 2))
    return tuple(np.array(part) for part in zip(*found, strict=True))


def samples(own, mean, var):
    """The example's values of a channel group, and points that stand in for its running distribution."""
    std = np.sqrt(var)
    return own.ravel(), np.concatenate([mean - std, mean + std])


def weights(x, running_mean, running_var, eps, alpha, channels_per_group=1, slope=0.0, var_offset=0.0):
    """The weights of mean and variance of one example (C, *spatial)."""
    if alpha in (0, 1):
        return alpha, alpha
    distances = []
    for first in range(0, x.shape[0], channels_per_group):
        group = slice(first, first + channels_per_group)
        own, points = samples(x[group], running_mean[group], running_var[group])
        moved = (np.mean(own) - np.mean(points)) ** 2 / (np.var(points) + eps)
        scaled = np.log((np.var(own) + eps) / (np.var(points) + eps)) ** 2
        distances.append((moved + scaled) / 2)
    logit = np.log(alpha / (1 - alpha)) + slope * np.log(min(np.mean(distances), 1e9) + 1e-4)
    return tuple(1 / (1 + np.exp(-logit - offset)) for offset in (0.0, var_offset))


def of_sample(share, own, points):
    """The weight of each value of a sample."""
    return np.concatenate([np.full(own, share / own), np.full(points, (1 - share) / points)])


def weighted_norm(
    x,
    running_mean,
    running_var,
    weight,
    bias,
    eps,
    alpha,
    channels_per_group=1,
    slope=0.0,
    var_offset=0.0,
):
    x, running_mean, running_var, weight, bias = (
        np.asarray(a, np.float64) for a in (x, running_mean, running_var, weight, bias)
    )
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        share, var_share = weights(
            x[n], running_mean, running_var, eps, alpha, channels_per_group, slope, var_offset
        )
        for first in range(0, x.shape[1], channels_per_group):
            group = slice(first, first + channels_per_group)
            own, points = samples(x[n, group], running_mean[group], running_var[group])
            counts = own.size, points.size
            mean, var = weighted_moments(np.concatenate([own, points]), of_sample(share, *counts))
            if var_offset:
                apart = np.concatenate([own - np.mean(own), points - np.mean(points)])
                _, within = weighted_moments(apart, of_sample(var_share, *counts))
                _, between = weighted_moments(
                    np.array([np.mean(own), np.mean(points)]), np.array([share, 1 - share])
                )
                var = within + between
            spatial = (-1,) + (1,) * (x.ndim - 2)
            normalized = (x[n, group] - mean) / np.sqrt(var + eps)
            y[n, group] = normalized * weight[group].reshape(spatial) + bias[group].reshape(spatial)
    return y


def grouped_norm(x, weight, bias, eps, channels_per_group, groups_of_examples):
    """Normalization in training by the paper's definition; the groups are lists of examples."""
    x, weight, bias = (np.asarray(a, np.float64) for a in (x, weight, bias))
    y = np.full_like(x, np.nan)
    spatial = (-1,) + (1,) * (x.ndim - 2)
    for examples in groups_of_examples:
        for first in range(0, x.shape[1], channels_per_group):
            channels = np.arange(first, first + channels_per_group)
            values = x[np.ix_(examples, channels)]
            normalized = (values - np.mean(values)) / np.sqrt(np.var(values) + eps)
            y[np.ix_(examples, channels)] = normalized * weight[channels].reshape(spatial) + bias[
                channels
            ].reshape(spatial)
    return y
