import pytest

from tests.remedies.world import World


@pytest.fixture
def world(tmp_path, checkpoint):
    return World(tmp_path, checkpoint)
