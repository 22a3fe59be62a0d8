from functools import partial

import pytest

import bnpatch
from bnpatch.search import job, ladder
from bnpatch.search.learn import Course, learn


@pytest.fixture(scope="session", autouse=True)
def quick():
    """A small network on easy images learns in fewer steps, and its latency is measured sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "learn", partial(learn, checks=5))
        patch.setattr(Course, "of", lambda examples, set_size=1: Course(24, max(128, set_size)))
        patch.setattr(ladder, "_OTHER_STARTS", ())
        patch.setattr(job, "LATENCY_SECONDS", 1.0)
        yield


@pytest.fixture
def model(checkpoint):
    return bnpatch.load(checkpoint)
