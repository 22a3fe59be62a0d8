import torch
from torch import nn

from bnpatch.core.moments import Moments
from bnpatch.nn.hooks import accurate_moments, at_inputs, joined, pooled_rows
from tests.nn.norms import Sizes, sample


def test_no_digits_are_lost_far_from_zero():
    x = 1000 + torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    found = accurate_moments(x)
    expected = x.double().flatten(2)
    torch.testing.assert_close(found.mean.double(), expected.mean(2), rtol=1e-6, atol=0)  # float32
    torch.testing.assert_close(found.var.double(), expected.var(2, correction=0), rtol=1e-5, atol=0)


def test_shapes_types_and_layouts():
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 2, 3, 2)):
        x = sample(shape)
        found = accurate_moments(x)
        values = x.reshape(3, 4, -1)
        torch.testing.assert_close(found.mean, values.mean(2))
        torch.testing.assert_close(found.var, values.var(2, correction=0))
    x = sample((3, 4, 5, 2), torch.float16, torch.channels_last)
    found = accurate_moments(x)
    assert found.var.dtype == torch.float32
    torch.testing.assert_close(found.var, x.float().flatten(2).var(2, correction=0))


def test_no_examples_have_no_rows():
    found = accurate_moments(torch.zeros(0, 4, 3, 3))
    assert found.mean.shape == found.var.shape == (0, 4)


def test_a_large_batch_needs_little_memory_beside_it():
    x = sample((20, 4, 128, 128), torch.float32)
    with Sizes() as sizes:
        found = accurate_moments(x)
    assert max(sizes.made) < x.numel() / 2
    torch.testing.assert_close(found.var, x.flatten(2).var(2, correction=0))


def test_rows_of_unlike_number_are_pooled_as_one():
    x = sample((5, 4, 6))
    parts = [accurate_moments(x[:2]), accurate_moments(x[2:])]
    pooled = pooled_rows(joined(parts))
    values = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(pooled.mean, values.mean(1))
    torch.testing.assert_close(pooled.var, values.var(1, correction=0))
    assert isinstance(pooled, Moments)


def test_every_use_is_seen_also_by_keyword_and_no_hook_stays():
    norm, seen = nn.BatchNorm2d(4), []
    x = torch.zeros(2, 4, 3, 3)
    with at_inputs({"norm": norm}, lambda name, x: seen.append((name, x.shape))):
        norm(x)
        norm(input=x)
    norm(x)
    assert seen == [("norm", x.shape)] * 2
