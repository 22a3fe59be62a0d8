"""Start a module in two processes that work together, as torchrun does."""

import subprocess
import sys
from pathlib import Path


def in_two_processes(module, *arguments):
    """What they print; they have to end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
