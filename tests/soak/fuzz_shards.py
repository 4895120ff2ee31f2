"""The long form of test_shards_fuzz.py: many mutated tars, with time and memory watched.

    python tests/soak/fuzz_shards.py --count 100000

Prints a table of what was tried and what became of it; exits 1 at the first broken promise, with the example that
Hypothesis has shrunk it to. Needs the packages of the extra ``test``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from tar_mutations import FORMATS, check, contents, mutations

MAX_SECONDS = 5.0  # of CPU for one tar of a few kilobytes
MAX_MEMORY = 1 << 20  # KiB
ROUND = 5000  # Hypothesis keeps a tree of what it has tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="mutated tars to try")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    slowest, begin = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"

        def one(items, fmt, steps) -> None:
            nonlocal slowest
            start = time.process_time()
            outcomes[check(path, items, fmt, steps)] += 1
            took = time.process_time() - start
            slowest = max(slowest, took)
            assert took < MAX_SECONDS, f"{took:.1f} s for one tar"
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert memory < MAX_MEMORY, f"{memory:,} KiB of memory"

        for number, start in enumerate(range(0, arguments.count, ROUND)):
            examples = min(ROUND, arguments.count - start)
            options = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=HealthCheck)
            test = given(items=contents, fmt=st.sampled_from(sorted(FORMATS)), steps=mutations)(one)
            options(seed(arguments.seed * 1_000_003 + number)(test))()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = sum(outcomes.values())
    print(f"{'mutated tars':<28}{tried:>9,}")
    for name, count in sorted(outcomes.items()):
        print(f"  {name:<26}{count:>9,}")
    print(f"  {'lost or invented, untold':<26}{0:>9,}")
    print(
        f"{time.monotonic() - begin:.0f} s, the slowest {slowest * 1000:.0f} ms of CPU, {memory / 1024:.0f} MiB at most"
    )


if __name__ == "__main__":
    main()
