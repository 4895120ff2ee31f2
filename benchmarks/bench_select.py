"""Every order over 1.3 million rows: ImageNet's number, from score tables in memory, and `select` from 1,281 files.

    python -m pytest benchmarks/bench_select.py --benchmark-enable

Orders of score tables alone run over all rows and keep a tenth. Those of embeddings (k-center, herding, dedup) grow
with N·D·count or with the clusters' sizes, so they are timed on 100,000 rows of 128 dimensions, with their operations.
Counts are checked, and a ranking against Python's sorted on a sample, before any speed is reported.
"""

from __future__ import annotations

import os
import platform
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diffprune.choosing import choose
from diffprune.files import write_json
from diffprune.selection import select
from diffprune.tables import BASE_SCHEMA, write_table

ROWS, SHARDS, CLUSTERS, CLASSES = 1_281_167, 1281, 1000, 1000
POINTS, DIMENSIONS = 100_000, 128
GOAL = 5.0  # seconds for any order of score tables
TABLE_ORDERS = {
    "highest": {"order": "highest", "by": "grand"},
    "lowest": {"order": "lowest", "by": "grand"},
    "middle": {"order": "middle", "by": "grand"},
    "random": {"order": "random"},
    "cluster-nearest": {"order": "cluster-nearest"},
    "cluster-farthest": {"order": "cluster-farthest"},
    "cluster-middle": {"order": "cluster-middle"},
    "cluster-random": {"order": "cluster-random"},
    "balanced": {"order": "balanced"},
    "equal": {"order": "equal"},
    "drop-clusters": {"order": "drop-clusters"},
    "grand + el2n": {"order": "highest", "by": "grand + el2n"},
    "grand & cluster": {"order": "highest", "by": "grand & cluster"},
    "balanced per label": {"order": "equal", "per": "label"},
    "random, quota per label": {"order": "random", "per": "label", "quota": {"*": 100}},
}
POINT_ORDERS = {  # with the multiply-adds that they need
    "k-center, 1,000 of 100,000": ({"order": "k-center"}, 1000, POINTS * DIMENSIONS * 1000),
    "herding, 1,000 of 100,000": ({"order": "herding"}, 1000, POINTS * 512 * (DIMENSIONS + 1000)),
    "cluster-herding, 10,000": ({"order": "cluster-herding"}, 10_000, POINTS * 512 * (DIMENSIONS + 100)),
    "balanced, herding, 10,000": (
        {"order": "equal", "within": "herding"},
        10_000,
        POINTS * 512 * (DIMENSIONS + 100),
    ),
    "dedup 0.05": ({"order": "random", "dedup": 0.05}, None, POINTS * (POINTS // 100) * DIMENSIONS),
}
seconds: dict[str, float] = {}


def columns(rows: int, clusters: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "label": rng.integers(0, CLASSES, rows),
        "grand": rng.normal(size=rows),
        "el2n": rng.normal(size=rows),
        "cluster": rng.integers(0, clusters, rows).astype(np.int32),
        "distance": rng.random(rows),
    }


def keys(rows: int) -> list[str]:
    return [f"n{i // 1300:08d}_{i}" for i in np.random.default_rng(1).permutation(rows).tolist()]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """In no order of keys, as shuffled shards are."""
    table = pa.table({"key": keys(ROWS), "status": pa.array(["ok"]).take(pa.array(np.zeros(ROWS, np.int64)))})
    for name, values in columns(ROWS, CLUSTERS).items():
        table = table.append_column(name, pa.array(values))
    return table


@pytest.fixture(scope="module")
def points() -> tuple[pa.Table, np.ndarray]:
    table = pa.table({"key": keys(POINTS), "status": ["ok"] * POINTS})
    for name, values in columns(POINTS, 100).items():
        table = table.append_column(name, pa.array(values))
    rng = np.random.default_rng(2)
    centers = rng.normal(size=(100, DIMENSIONS))
    values = centers[table["cluster"].to_numpy()] + rng.normal(size=(POINTS, DIMENSIONS)) * 0.7
    return table, (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One score table per shard, as `score` writes them."""
    folder = tmp_path_factory.mktemp("scores")
    values, names = columns(ROWS, CLUSTERS), keys(ROWS)
    bounds = np.linspace(0, ROWS, SHARDS + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        size = stop - start
        base = {
            "key": names[start:stop],
            "shard": [f"t-{number:06d}.tar"] * size,
            "index": np.arange(size),
            "offset": np.arange(size) * 110_592,
            "size": np.full(size, 110_592),
            "uid": [None] * size,
            "label": values["label"][start:stop],
            "status": ["ok"] * size,
            "error": [None] * size,
        }
        table = pa.table([pa.array(base[field.name], field.type) for field in BASE_SCHEMA], schema=BASE_SCHEMA)
        for name in ("grand", "el2n", "cluster", "distance"):
            table = table.append_column(name, pa.array(values[name][start:stop]))
        write_table(folder / f"t-{number:06d}.parquet", table, {"stage": "score"})
    stage = {"stage": "score", "fingerprint": "x", "shards": [f"t-{number:06d}" for number in range(SHARDS)]}
    write_json(folder / "stage.json", stage)
    return folder


def check(table: pa.Table) -> None:
    """Fails where a ranking is not Python's: a wrong answer has no speed."""
    small = table.slice(0, 3000)
    rows = small.to_pylist()
    expected = sorted(range(3000), key=lambda row: (-rows[row]["grand"], rows[row]["key"]))[:300]
    if choose(small, "highest", 300, by="grand").tolist() != sorted(expected):
        pytest.fail("highest differs from a plain sort; no speed is reported")


@pytest.mark.parametrize("name", TABLE_ORDERS)
def test_orders_of_score_tables(benchmark, table, name):
    check(table)
    arguments = dict(TABLE_ORDERS[name])
    count = None if "quota" in arguments else ROWS // 10
    rows = benchmark.pedantic(lambda: choose(table, count=count, **arguments), rounds=3)
    assert len(rows) == (count or 100 * CLASSES)
    if benchmark.enabled:
        seconds[name] = benchmark.stats.stats.median


@pytest.mark.parametrize("name", POINT_ORDERS)
def test_orders_of_embeddings(benchmark, points, name):
    table, values = points
    arguments, count, _ = POINT_ORDERS[name]
    rows = benchmark.pedantic(
        lambda: choose(table, count=count, embeddings=values, device="cpu", **arguments), rounds=1
    )
    assert len(rows) == count if count else 0 < len(rows) <= POINTS
    if benchmark.enabled:
        seconds[name] = benchmark.stats.stats.median


@pytest.mark.parametrize("order", ["highest", "balanced"])
def test_select_from_files(benchmark, folder, order):
    arguments = {"order": order} | ({"by": "grand"} if order == "highest" else {})
    result = benchmark.pedantic(
        lambda: select(folder, folder.parent / "kept.parquet", prune=0.9, **arguments), rounds=3
    )
    assert result["count"] == round(ROWS / 10)
    if benchmark.enabled:
        seconds[f"select {order}, from {SHARDS} files"] = benchmark.stats.stats.median


def test_report(capsys):
    if not seconds:
        pytest.skip("timed with --benchmark-enable only")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    lines = [
        f"{ROWS:,} rows, {CLUSTERS} clusters, a tenth kept; {platform.processor() or 'CPU'}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, NumPy {np.__version__}, pyarrow {pa.__version__}; peak memory {peak:.1f} GiB"
    ]
    for name, took in seconds.items():
        rate = POINT_ORDERS[name][2] * 2 / took / 1e9 if name in POINT_ORDERS else None
        told = f"   {rate:.0f} GFLOP/s" if rate else "   over the goal" if took > GOAL else ""
        lines.append(f"{name:>40}: {took:7.2f} s{told}")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
