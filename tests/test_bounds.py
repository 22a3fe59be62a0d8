"""Files that ask for far more than their size suggests: what they cost with the default limits."""

import sys

import pytest

from tests.hostile import CASES, cost

# Of processor time, because others may use the machine too: four times what the slowest takes here, so that
# slower processors pass. The memory, beside that of the imports, is the same on all.
SECONDS, MEGABYTES = 40, 2000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", CASES)
def test_refused_or_done_within_bounds(name, tmp_path):
    found = cost(name, CASES[name].make(tmp_path))
    refused = found.outcome.startswith(("refused", "skipped"))
    assert refused == CASES[name].refused, found
    assert refused or found.outcome == "done", found
    assert found.cpu < SECONDS, found
    assert found.peak - found.base < MEGABYTES, found
