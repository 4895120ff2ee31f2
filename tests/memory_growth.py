"""The memory that a block of code takes in a process of its own, at its peak, beyond what was held before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
STATUS = Path("/proc/self/status")


@contextmanager
def growth(*kinds: str) -> Iterator[list[int]]:
    """Bytes, in the list once the block is done; ``kinds`` as in /proc: RssAnon, and RssFile for mapped pages."""

    def held() -> int:
        fields = dict(line.split(":") for line in STATUS.read_text().splitlines() if line.startswith(kinds))
        return sum(int(value.split()[0]) for value in fields.values()) << 10

    before, done, grown = held(), threading.Event(), []
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()
        grown.append(peak - before)


def numbers_of(script: str, arguments: Sequence[str | os.PathLike]) -> list[int]:
    """The numbers in the last line that the script prints, with these ``sys.argv[1:]``."""
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return [int(word) for word in found.stdout.splitlines()[-1].split()]
