import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Models that are made without a seed of their own are the same in every run."""
    torch.manual_seed(0)
