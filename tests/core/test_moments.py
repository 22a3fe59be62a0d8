import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnpatch.core.moments import ExampleWeight, Moments, distance, mix, mix_example, pool
from tests import reference
from tests.reference import weighted_moments

# The same examples on every machine, however long it takes for them.
fixed = settings(derandomize=True, deadline=None)

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8).map(np.array)


def of(sample, axis=None):
    return Moments(np.mean(sample, axis, keepdims=True), np.var(sample, axis, keepdims=True))


@fixed
@given(values, values, st.floats(0, 1))
def test_mix_is_the_weighted_sample(example, running, alpha):
    weights = np.concatenate(
        [np.full(example.size, alpha / example.size), np.full(running.size, (1 - alpha) / running.size)]
    )
    mean, var = weighted_moments(np.concatenate([example, running]), weights)
    mixed = mix(alpha, of(example), of(running))
    # Values reach 1e3, so variances reach 1e6: 1e-9 is fifteen digits of that.
    np.testing.assert_allclose(mixed.mean.item(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mixed.var.item(), var, rtol=1e-12, atol=1e-9)
    assert mixed.var.item() >= 0


def test_with_an_offset_mean_and_variance_have_weights_of_their_own():
    weight = ExampleWeight(0.5, var_offset=np.log(3))  # the odds are 1 for the mean, 3 for the variance
    mixed = mix_example(weight, Moments(5.0, 4.0), Moments(0.0, 1.0), eps=0.0)
    assert mixed.mean == pytest.approx(2.5)
    assert mixed.total == pytest.approx(0.75 * 4 + 0.25 * 1 + 0.5 * 0.5 * 25)


def test_mix_of_plain_numbers_has_the_variance_between_the_means():
    mixed = mix(0.3, Moments(5.0, 4.0), Moments(0.0, 1.0))
    assert mixed.mean == pytest.approx(1.5)
    assert mixed.var == pytest.approx(0.3 * 4 + 0.7 * 1 + 0.3 * 0.7 * 25)  # 7.15; without the last term 1.9


@pytest.mark.parametrize("alpha", [0, 1])
def test_mix_at_the_ends_is_exact(alpha):
    example, running = Moments(0.1, 0.7), Moments(0.3, 0.9)
    mixed = mix(alpha, example, running)
    expected = example if alpha else running
    assert mixed.var == expected.var
    assert mixed.mean == pytest.approx(expected.mean, abs=1e-17)


def test_mix_keeps_digits_where_squares_would_cancel():
    mean, std = np.float32(1e3), np.float32(0.1)
    mixed = mix(np.float32(0.5), Moments(mean, std**2), Moments(mean, std**2))
    np.testing.assert_allclose(mixed.var, std**2, rtol=1e-6)  # float32 rounding
    assert mean * mean + std * std - mean * mean != pytest.approx(std**2, rel=0.1)  # what it avoids


@fixed
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_pool_is_the_union_of_equal_parts(parts, size, seed):
    sample = np.random.default_rng(seed).normal(3, 2, (parts, size))
    pooled = pool(of(sample, axis=1), axes=0)
    np.testing.assert_allclose(pooled.mean.item(), sample.mean(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pooled.var.item(), sample.var(), rtol=1e-10, atol=1e-12)


def test_pool_keeps_the_axes():
    moments = Moments(np.zeros((2, 3, 4)), np.ones((2, 3, 4)))
    assert pool(moments, axes=(0, 2)).mean.shape == (1, 3, 1)


@fixed
@given(st.floats(1e-6, 1 - 1e-6), st.floats(-4, 4), st.floats(-8, 8), st.floats(-2, 2), st.integers(0, 2**31))
def test_weights_by_distance_are_sigmoids(alpha, slope, offset, scale, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 10**scale, (2, 3, 7))
    mean, var = rng.normal(size=3), rng.random(3) + 0.1
    running = Moments(mean[:, None], var[:, None])
    found = mix_example(ExampleWeight(alpha, np.array(slope), offset), of(x, axis=-1), running, 1e-3)
    expected = [reference.weights(one, mean, var, 1e-3, alpha, 1, slope, offset) for one in x]
    for part, share in zip((found.weight, found.var_weight), zip(*expected, strict=True), strict=True):
        assert part.shape == (2, 1, 1)
        np.testing.assert_allclose(part[:, 0, 0], share, rtol=1e-10)  # powers of fifteen digits


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1.0, 1e15])
def test_a_weight_by_distance_is_exact_at_the_ends_and_a_weight_everywhere(dtype, eps, scale):
    """Also for constant examples (variance 0) without eps, and for distances whose powers would overflow."""
    rng = np.random.default_rng(0)
    example = Moments(
        *((scale * part).astype(dtype) for part in (rng.normal(size=(3, 4)), rng.random((3, 4))))
    )
    running = Moments(rng.normal(size=4).astype(dtype), rng.random(4).astype(dtype))
    example.var[:, 0] = running.var[0] = running.var[1] = 0
    alphas = np.concatenate([[0, 1], rng.random(1000), 10.0 ** -rng.uniform(0, 30, 1000)]).astype(dtype)
    alphas = alphas[:, None, None]
    for slope, offset in itertools.product((-4.0, -0.5, 0.0, 0.5, 4.0), (-8.0, 0.0, 8.0)):
        weight = ExampleWeight(alphas, *(np.array(value, dtype) for value in (slope, offset)))
        mixed = mix_example(weight, example, running, eps)
        for found, is_alpha in ((mixed.weight, slope == 0), (mixed.var_weight, slope == offset == 0)):
            found = np.broadcast_to(found, (len(alphas), 3, 1))
            assert found.dtype == dtype
            assert ((found >= 0) & (found <= 1)).all()  # and not NaN
            assert (found[0] == 0).all()
            assert (found[1] == 1).all()
            if is_alpha:
                assert (found == alphas).all()
        assert (mixed.total >= 0).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e15])
def test_one_example_in_numpy_weighs_as_it_does_among_others(scale):
    rng = np.random.default_rng(0)
    several = Moments(*(scale * part for part in (rng.normal(size=(3, 4, 1)), rng.random((3, 4, 1)))))
    running = Moments(rng.normal(size=(4, 1)), rng.random((4, 1)))
    weight = ExampleWeight(0.1, slope=1.5, var_offset=0.5)
    expected = mix_example(weight, several, running, 1e-5)
    far = distance(several, running, 1e-5)
    for row in range(3):
        one = Moments(several.mean[row : row + 1], several.var[row : row + 1])
        for found, among in zip(mix_example(weight, one, running, 1e-5), expected, strict=True):
            np.testing.assert_allclose(np.squeeze(found), among[row].squeeze(), rtol=1e-12)  # of 15 digits
        np.testing.assert_allclose(distance(one, running, 1e-5), far[row : row + 1], rtol=1e-12, strict=True)


def test_an_offset_of_zero_is_not_computed(monkeypatch):
    monkeypatch.setattr("bnpatch.core.moments._exp", None)
    mean, var = ExampleWeight(0.3, 1.0, 0.0).at(np.array([2.0]))
    assert mean is var
