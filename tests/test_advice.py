import math

import pytest
import torch

from bnpatch.evaluation.output_range import OutputRange, inference_bound, training_bound
from bnpatch.finetune.guidance import techniques


def fits(batch_size, num_unnormalized=2):
    return {t.name: t.fits for t in techniques(batch_size, 15, num_unnormalized)}


@pytest.mark.parametrize(
    ("batch_size", "ghost", "batch_group"),
    [
        (1, "no", "yes"),
        (3, "no", "yes"),
        (4, "with care", "with care"),
        (7, "with care", "with care"),
        (8, "with care", "no"),
        (15, "with care", "no"),
        (16, "yes", "no"),
        (512, "yes", "no"),
    ],
)
def test_the_batch_size_decides_how_to_normalize_in_training(batch_size, ghost, batch_group):
    found = fits(batch_size)
    assert (found["Ghost Batch Norm"], found["Batch/Group Norm"]) == (ghost, batch_group)
    assert found["example weighing"] == "yes"
    assert f"{batch_size} " in next(t.reason for t in techniques(batch_size, 15, 2) if "Ghost" in t.name)


def test_the_paths_decide_about_weight_decay():
    decay = "weight decay on scales and shifts"
    assert [fits(32, n)[decay] for n in (0, 2, None)] == ["no", "yes", "with care"]
    reason = next(t.reason for t in techniques(32, 15, 2) if t.name == decay)
    assert "2 of 15 norm layers" in reason


def standardized(values, weights):
    mean = (weights * values).sum()
    return (values - mean) / ((weights * values**2).sum() - mean**2).sqrt()


@pytest.mark.parametrize("n", [2, 9, 1000])
def test_one_value_against_equal_others_attains_the_training_bound(n):
    values = torch.zeros(n, dtype=torch.float64)
    values[0] = 1
    assert standardized(values, torch.full_like(values, 1 / n))[0].item() == pytest.approx(training_bound(n))


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0])
def test_one_value_against_equal_others_attains_the_inference_bound(alpha):
    size = 9
    # The example's values, then one that stands for the running statistics: mean 0, no variance.
    values = torch.zeros(size + 1, dtype=torch.float64)
    values[0] = 1
    weights = torch.full_like(values, alpha / size)
    weights[-1] = 1 - alpha
    assert standardized(values, weights)[0].item() == pytest.approx(inference_bound(size, alpha))


def test_bounds_agree_where_the_example_weighs_as_in_training():
    batch, size = 32, 49
    assert inference_bound(size, 1 / batch) == pytest.approx(training_bound(batch * size))
    assert inference_bound(size, 0.0) == math.inf


def test_beyond_what_training_allowed():
    assert OutputRange("a", 6.0, 5.9, math.inf).is_beyond_training
    assert OutputRange("a", math.nan, 5.9, math.inf).is_beyond_training
    assert not OutputRange("a", 5.8, 5.9, math.inf).is_beyond_training
