"""Damaged files of all kinds: whatever is wrong, the only error is BnpatchError."""

import warnings

import pytest

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from tests.fuzzing import KINDS

# How many damaged files of each kind; twenty times as many are slow.
COUNTS = {
    "ONNX, small": 100,
    "ONNX, light": 3,
    "ONNX, exported": 8,
    "recipe": 250,
    ".npz": 60,
    "configuration": 100,
    "class map": 40,
    "class map, JSON": 100,
}
COUNT = 20


@pytest.mark.parametrize(
    "times", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "twenty times as many"]
)
@pytest.mark.parametrize("name", KINDS)
def test_only_our_own_errors(name, times, tmp_path):
    kind = KINDS[name]
    path = tmp_path / kind.name
    count = times * COUNTS.get(name, COUNT)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BnpatchWarning)
        for content in kind.originals():
            path.write_bytes(content)
            kind.use(path)  # undamaged, it works
        for seed in range(count):
            path.write_bytes(kind.damaged(seed))
            try:
                kind.use(path)
            except BnpatchError:
                refused += 1
    assert 0 < refused < count  # some damage does no harm
