"""What files cost that ask for more than their size suggests: python -m tests.benchmarks.bounds [WORDS]"""

import sys
import tempfile
from pathlib import Path

from tests.hostile import CASES, cost


def main() -> None:
    print("| file | CPU | wall | peak memory | of it for the file | outcome |\n|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = cost(name, case.make(Path(folder)))
            outcome = found.outcome.replace(folder, "...")
        memory = f"{found.peak:,.0f} MB | {found.peak - found.base:,.0f} MB"
        print(f"| {name} | {found.cpu:.1f} s | {found.wall:.1f} s | {memory} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
