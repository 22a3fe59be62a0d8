"""Other processes, and what they leave behind: how it is named, and how long to wait for them."""

import time
from pathlib import Path

from bnpatch.core.leftovers import own_start

SECONDS = 60  # for what takes one or two on an idle machine


def wait_for(happened, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def start_of(process, place=None):
    """How names of temporary files of another process begin."""
    name, here, _, rest = own_start().split("-")
    return "-".join([name, place or here, str(process), rest])
