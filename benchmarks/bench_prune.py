"""`prune` of half the samples against `cp` of the same bytes, on the same disk, both flushed to it.

    python -m pytest benchmarks/bench_prune.py --benchmark-enable --basetemp=DIR_ON_THAT_DISK

40 shards of 500 samples, about 100 KB each (of random bytes: nothing is decoded), a random half is kept. `cp` copies
the pruned shards and `sync` flushes each of them, as prune does. Sources are in the page cache for both, and what the
round before has written is deleted before the clock starts. No speed is reported unless the pruned shards hold the
selected samples' bytes.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diffprune.pruning import prune
from diffprune.shards import index_shard, list_shards
from diffprune.tables import write_table

SHARDS, SAMPLES, BYTES = 40, 500, 100_000
seconds: dict[str, list[float]] = {}


class Problem:
    """Shards, half of their samples, and two ways to copy them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        (folder / "in").mkdir()
        for shard in range(SHARDS):
            with tarfile.open(folder / f"in/t-{shard:04d}.tar", "w") as tar:
                for sample in range(SAMPLES):
                    for extension, data in (
                        ("jpg", rng.bytes(int(rng.integers(BYTES // 2, BYTES * 3 // 2)))),
                        ("cls", b"1"),
                    ):
                        info = tarfile.TarInfo(f"{shard:04d}{sample:04d}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        rows = [(path.name, s) for path in list_shards(folder / "in") for s in index_shard(path).samples]
        self.rows = [rows[i] for i in np.sort(rng.permutation(len(rows))[: len(rows) // 2])]
        columns = {
            "key": [sample.key for _, sample in self.rows],
            "shard": [name for name, _ in self.rows],
            "offset": [sample.offset for _, sample in self.rows],
            "size": [sample.size for _, sample in self.rows],
        }
        write_table(folder / "kept.parquet", pa.table(columns), {"stage": "select"})
        self.prune()
        self.bytes = sum(path.stat().st_size for path in self.pruned())

    def clear(self, folder: str) -> None:
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        os.sync()

    def prune(self) -> None:
        prune(self.folder / "kept.parquet", self.folder / "in", self.folder / "pruned")

    def pruned(self) -> list[Path]:
        return list_shards(self.folder / "pruned")

    def cp(self) -> None:
        (self.folder / "copy").mkdir()
        subprocess.run(["cp", *self.pruned(), self.folder / "copy"], check=True)
        subprocess.run(["sync", *(self.folder / "copy").iterdir()], check=True)

    def is_right(self) -> bool:
        found = b"".join(path.read_bytes()[:-1024] for path in self.pruned())
        data = {path.name: path.read_bytes() for path in list_shards(self.folder / "in")}
        return found == b"".join(data[name][s.offset : s.offset + s.size] for name, s in self.rows)


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Problem:
    problem = Problem(tmp_path_factory.mktemp("prune"))
    if not problem.is_right():
        pytest.fail("the pruned shards hold other bytes than the selected samples'; no speed is reported")
    return problem


@pytest.mark.parametrize("way", ["prune", "cp"])
def test_copy(benchmark, problem, way):
    before = {"prune": "pruned", "cp": "copy"}[way]
    benchmark.pedantic(getattr(problem, way), setup=lambda: problem.clear(before), rounds=7, warmup_rounds=1)
    if benchmark.enabled:
        seconds[way] = sorted(benchmark.stats.stats.data)


def test_report(problem, capsys):
    if len(seconds) < 2:
        pytest.skip("timed with --benchmark-enable only")
    file_system = subprocess.run(["stat", "-f", "-c", "%T", problem.folder], capture_output=True, text=True).stdout
    lines = [
        f"{problem.bytes / 1e6:.0f} MB, half of {SHARDS * SAMPLES} samples in {SHARDS} shards, {file_system.strip()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}"
    ]
    for way, took in seconds.items():
        middle = took[len(took) // 2]
        lines.append(
            f"{way:>6}: {problem.bytes / middle / 1e6:8.0f} MB/s   median {middle:.3f} s, "
            f"{took[0]:.3f} to {took[-1]:.3f}"
        )
    ratio = seconds["cp"][len(seconds["cp"]) // 2] / seconds["prune"][len(seconds["prune"]) // 2]
    lines.append(f"prune reads the selection, checks every shard and copies at {ratio:.2f} times cp's throughput")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
