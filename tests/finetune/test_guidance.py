"""Which techniques suit a model and a batch size."""

import pytest

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
