"""The long form of test_shards_fuzz.py: many mutated tars, with time and memory watched.

    python tests/soak/fuzz_shards.py --count 100000

Prints a table of what was tried and what became of it; exits 1 at the first broken promise, with the example that
Hypothesis has shrunk it to. Needs the packages of the extra ``test``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hypothesis import given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_options import soak_parser
from tar_mutations import FORMATS, check, contents, mutations

MAX_SECONDS = 5.0  # of CPU for one tar of a few kilobytes
MAX_MEMORY = 1 << 20  # KiB
ROUND = 2000  # Hypothesis keeps a tree of what it has tried


def main() -> None:
    parser = soak_parser(__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="mutated tars to try")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    starts = range(0, arguments.count, ROUND)
    seeds = [arguments.seed * 1_000_003 + number for number in range(len(starts))]
    sizes = [min(ROUND, arguments.count - start) for start in starts]
    outcomes: Counter[str] = Counter()
    slowest, memory, begin = 0.0, 0, time.monotonic()
    with ProcessPoolExecutor(arguments.processes) as pool:
        for found, seconds, kilobytes in pool.map(fuzz, seeds, sizes):
            outcomes += found
            slowest, memory = max(slowest, seconds), max(memory, kilobytes)
    took = time.monotonic() - begin
    print(f"{'mutated tars':<28}{sum(outcomes.values()):>9,}")
    for name, count in sorted(outcomes.items()):
        print(f"  {name:<26}{count:>9,}")
    print(f"  {'lost or invented, untold':<26}{0:>9,}")
    if arguments.json:
        told = {"outcomes": outcomes, "seconds": took, "slowest": slowest, "mebibytes": memory / 1024}
        arguments.json.write_text(json.dumps(told))
    print(f"{took:.0f} s, the slowest {slowest * 1000:.0f} ms of CPU, {memory / 1024:.0f} MiB at most")


def fuzz(start: int, count: int) -> tuple[Counter[str], float, int]:
    """Try ``count`` tars; (what became of them, the slowest one's seconds of CPU, the process's peak memory in KiB)."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"

        @settings(max_examples=count, deadline=None, database=None)
        @seed(start)
        @given(items=contents, fmt=st.sampled_from(sorted(FORMATS)), steps=mutations)
        def one(items, fmt, steps) -> None:
            nonlocal slowest
            begin = time.process_time()
            outcomes[check(path, items, fmt, steps)] += 1
            took = time.process_time() - begin
            slowest = max(slowest, took)
            assert took < MAX_SECONDS, f"{took:.1f} s for one tar"
            assert peak() < MAX_MEMORY, f"{peak():,} KiB of memory"

        one()
    return outcomes, slowest, peak()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
