"""Open damaged files of all kinds, each in limited time: python -m tests.benchmarks.fuzz --count 100000

The files are opened in another process. If a file takes more seconds of processor than the limit, hangs, or
ends the process, the next process opens the rest. ``--keep`` writes what must be looked at into a folder.
A run that is interrupted prints what it has counted.
"""

import argparse
import multiprocessing
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 10
HANGS = 600  # seconds of wall time


def work(name: str, seeds: range, folder: str, limit: float, results: Connection) -> None:
    """Open the damaged files with these seeds, and send for each how it ended.

    A file that takes more seconds of processor than ``limit`` ends the process with SIGPROF.
    """
    from bnpatch.core.errors import BnpatchError
    from tests.fuzzing import KINDS

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    kind = KINDS[name]
    kind.use(_written(kind, folder, kind.originals()[0]))  # what is computed once does not count
    for seed in seeds:
        path = _written(kind, folder, kind.damaged(seed))
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            kind.use(path)
            outcome = "fine"
        except BnpatchError:
            outcome = "refused"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            place = next(
                (f"{f.filename}:{f.lineno}" for f in reversed(last) if "/bnpatch/" in f.filename), ""
            )
            outcome = f"escaped: {type(error).__name__} at {place}: {str(error)[:200]}"
        results.send(outcome)


def _written(kind, folder: str, content: bytes) -> Path:
    path = Path(folder) / kind.name
    path.write_bytes(content)
    return path


def run(name: str, seeds: range, limit: float, keep: Path | None, counts: Counter) -> None:
    """Open files in processes, one after the other, and count how they ended."""
    context = multiprocessing.get_context("spawn")
    while seeds:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, seeds, folder, limit, theirs), daemon=True)
            process.start()
            theirs.close()
            seeds = _follow(process, ours, name, seeds, keep, counts)
            process.kill()
            process.join()


def _follow(process, results: Connection, name, seeds: range, keep, counts: Counter) -> range:
    """Count outcomes until the process has opened all, or one of the files is too much; return the rest."""
    while seeds:
        try:
            outcome = results.recv() if results.poll(HANGS) else f"slow: no end in {HANGS} s"
        except EOFError:
            process.join()
            slow = process.exitcode == -signal.SIGPROF
            outcome = "slow: too many seconds of processor" if slow else f"crashed: {process.exitcode}"
        counts[outcome.split(":")[0]] += 1
        if outcome not in ("fine", "refused"):
            print(f"{name} {seeds[0]}: {outcome}", flush=True)
            if keep is not None:
                from tests.fuzzing import KINDS

                keep.mkdir(parents=True, exist_ok=True)
                target = keep / f"{seeds[0]}-{KINDS[name].name}"
                target.write_bytes(KINDS[name].damaged(seeds[0]))
        seeds = seeds[1:]
        if outcome.startswith(("slow", "crashed")):
            break
    return seeds


def main() -> None:
    from tests.fuzzing import KINDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="files of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of processor, the limit for one file")
    parser.add_argument("--keep", type=Path, help="folder for what must be looked at")
    given = parser.parse_args()
    print("| kind | tried | refused | escaped | slow | crashed | seconds |\n|---|---|---|---|---|---|---|")
    each = -(-given.count // len(given.kinds))
    for name in given.kinds:
        start, counts = time.monotonic(), Counter()
        try:
            run(name, range(given.first, given.first + each), given.seconds, given.keep, counts)
        finally:
            cells = [counts.total(), *(counts[way] for way in ("refused", "escaped", "slow", "crashed"))]
            print(f"| {name} | {' | '.join(map(str, cells))} | {time.monotonic() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
