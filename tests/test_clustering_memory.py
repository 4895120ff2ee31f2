"""k-means over files larger than the memory it is given keeps to what docs/scale.md says a process needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from memory_growth import STATUS, numbers_of

SCRIPT = """
import sys
from memory_growth import growth
from diffprune import KMeans

def fit(files, memory):
    return KMeans(16, max_iter=2, seed=0, init=sys.argv[2], memory=memory).fit(files)

fit([sys.argv[1]], 1 << 30)  # what libraries need once
with growth("RssAnon") as grown:
    fit([sys.argv[1]] * 80, 8 << 20)
print(*grown)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
@pytest.mark.parametrize(("init", "bytes_per_row"), [("k-means||", 48), ("k-means++", 24), ("random", 24)])
def test_the_memory_that_is_stated_is_kept(tmp_path: Path, init: str, bytes_per_row: int) -> None:
    n, slack = 80 * 40_000, 56 << 20
    points = np.random.default_rng(0).normal(size=(n // 80, 32)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    [grown] = numbers_of(SCRIPT, [tmp_path / "points.npy", init])
    assert 0 < grown < (8 << 20) + bytes_per_row * n + slack, f"{grown / 2**20:.0f} MiB"
