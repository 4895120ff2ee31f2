"""k-means over files larger than the memory it is given keeps to what docs/scale.md says a process needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import sys, threading
from diffprune import KMeans

def held():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) << 10

def fit(files, memory):
    return KMeans(16, max_iter=2, seed=0, init=sys.argv[2], memory=memory).fit(files)

fit([sys.argv[1]], 1 << 30)  # what libraries need once
before, peak, done = held(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())

watcher = threading.Thread(target=watch)
watcher.start()
fit([sys.argv[1]] * 80, 8 << 20)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("init", "bytes_per_row"), [("k-means||", 48), ("k-means++", 24), ("random", 24)])
def test_the_memory_that_is_stated_is_kept(tmp_path: Path, init: str, bytes_per_row: int) -> None:
    n, slack = 80 * 40_000, 56 << 20
    points = np.random.default_rng(0).normal(size=(n // 80, 32)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "points.npy"), init],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < (8 << 20) + bytes_per_row * n + slack, f"{int(done.stdout) / 2**20:.0f} MiB"
