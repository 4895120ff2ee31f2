"""Seconds and peak memory of k-means from the same start: diffprune, faiss and scikit-learn; from disk; and growth.

    python -m benchmarks.bench_kmeans                       # N=200,000, D=384, K=1000, 10 rounds: some minutes
    python -m benchmarks.bench_kmeans --n 20000 --k 200     # smaller
    python -m pytest benchmarks/bench_kmeans.py             # tiny: only that the engines agree

Every engine runs in a process of its own, in turns, and ends with centroids and the labels that belong to them. No
speed is reported where labels are not the float64 nearest, or the inertia, computed here from each engine's centroids
in float64, is higher than the lowest by more than 1 in 10,000: engines add in different orders, and ties of float32
distances fall differently.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

ENGINES = {"diffprune": None, "faiss": "faiss", "scikit-learn": "sklearn"}
"""The engines, and the package that each needs."""

LABELS_CHECKED = 500
INERTIA_TOLERANCE = 1e-4
STREAM_FACTOR = 5
"""Points from disk are so many times the memory allowed."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what was measured."""
    parser = argparse.ArgumentParser(description="k-means: time and peak memory of each engine")
    for name, value in (("n", 200_000), ("d", 384), ("k", 1000), ("rounds", 10), ("repeats", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="with N, K and D")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(*options.worker, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(Path(folder), options)
    print("\n".join(_lines(measured)))
    return measured


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    size = {"n": options.n, "d": options.d, "k": options.k, "rounds": options.rounds}
    points = write_problem(folder, options.n, options.d, options.k, options.seed)
    engines = [name for name, package in ENGINES.items() if package is None or find_spec(package)]
    runs = _in_turns(folder, [*engines, "diffprune from disk"], options)
    found = {name: _summary(points, folder, name, values) for name, values in runs.items()}
    for name in found:
        _refuse_wrong(points, folder, name, found)
    measured = {"size": size, "engines": found, "missing": sorted(set(ENGINES) - set(engines)), "growth": []}
    if options.growth:
        for axis in ("n", "k", "d"):
            for factor in (0.25, 0.5, 1):
                smaller = argparse.Namespace(**vars(options) | {axis: max(8, int(getattr(options, axis) * factor))})
                smaller.repeats = 1
                with tempfile.TemporaryDirectory() as other:
                    write_problem(Path(other), smaller.n, smaller.d, smaller.k, options.seed)
                    seconds = _in_turns(Path(other), ["diffprune"], smaller)["diffprune"][0]["seconds"]
                growth = {name: getattr(smaller, name) for name in "nkd"}
                measured["growth"].append({"axis": axis, **growth, "seconds_per_round": seconds / (options.rounds + 1)})
    return measured


def write_problem(folder: Path, n: int, d: int, k: int, seed: int) -> np.ndarray:
    """Points like embeddings: a mixture of 4·k overlapping clusters of uneven sizes, of length 1. [N, D] float32."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4 * k, d), dtype=np.float32)
    shares = rng.gamma(1.0, size=4 * k)
    labels = rng.choice(4 * k, n, p=shares / shares.sum())
    points = centres[labels]
    for block in np.array_split(points, max(1, n // 10_000)):
        block += 1.2 * rng.standard_normal(block.shape, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    np.save(folder / "points.npy", points)
    np.save(folder / "start.npy", points[rng.permutation(n)[:k]])
    return points


def _in_turns(folder: Path, engines: Sequence[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(options.repeats):
        for engine, values in runs.items():
            command = [sys.executable, "-m", "benchmarks.bench_kmeans", "--rounds", str(options.rounds)]
            done = subprocess.run([*command, "--worker", engine, str(folder)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{engine}: {done.stderr[-2000:]}")
            values.append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def _work(engine: str, folder: str, rounds: int) -> dict[str, Any]:
    """One engine, once, in this process."""
    path = Path(folder)
    start = np.load(path / "start.npy")
    warm = np.random.default_rng(0).standard_normal((4 * len(start), start.shape[1]), dtype=np.float32)
    run: Callable[..., tuple[Any, Any]] = _ENGINES[engine]
    stored = path / "points.npy"
    limit = stored.stat().st_size // STREAM_FACTOR
    points = [stored] if engine.endswith("from disk") else np.load(stored)
    run(warm, warm[: len(start)], 1, limit)  # imports and pools of threads
    before = _peak()
    began = time.perf_counter()
    centroids, labels = run(points, start, rounds, limit)
    seconds = time.perf_counter() - began
    np.save(path / f"{engine}.centroids.npy", centroids)
    np.save(path / f"{engine}.labels.npy", labels)
    result = {"seconds": seconds, "peak": _peak(), "peak_before": before}
    print(json.dumps(result))
    return result


def _peak() -> int:
    """Most bytes that this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _diffprune(points: Any, start: np.ndarray, rounds: int, limit: int) -> tuple[Any, Any]:
    from diffprune import KMeans

    fitted = KMeans(len(start), init=start, max_iter=rounds, tol=0, memory=limit).fit(points)
    return fitted.centroids_, fitted.assignment_


def _faiss(points: np.ndarray, start: np.ndarray, rounds: int, _: int) -> tuple[Any, Any]:
    import faiss

    k, d = start.shape
    fitted = faiss.Kmeans(d, k, niter=rounds, max_points_per_centroid=len(points), min_points_per_centroid=1)
    fitted.train(points, init_centroids=start)
    return fitted.centroids, fitted.index.search(points, 1)[1][:, 0]


def _scikit_learn(points: np.ndarray, start: np.ndarray, rounds: int, _: int) -> tuple[Any, Any]:
    from sklearn.cluster import KMeans

    fitted = KMeans(len(start), init=start, n_init=1, max_iter=rounds, tol=0, algorithm="lloyd").fit(points)
    return fitted.cluster_centers_, fitted.labels_


_ENGINES = {
    "diffprune": _diffprune,
    "diffprune from disk": _diffprune,
    "faiss": _faiss,
    "scikit-learn": _scikit_learn,
}


def _summary(points: np.ndarray, folder: Path, engine: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    centroids, labels = _result(folder, engine)
    inertia = 0.0
    for own in np.array_split(np.arange(len(points)), max(1, len(points) // 5_000)):
        inertia += float(((points[own].astype(np.float64) - centroids[labels[own]]) ** 2).sum())
    peaks = {name: max(run[name] for run in runs) for name in ("peak", "peak_before")}
    return {"seconds": median(seconds), "spread": [min(seconds), max(seconds)], "inertia": inertia, **peaks}


def _refuse_wrong(points: np.ndarray, folder: Path, engine: str, found: dict[str, dict[str, Any]]) -> None:
    """Fails the benchmark: a wrong result has no speed."""
    centroids, labels = _result(folder, engine)
    rows = np.random.default_rng(1).permutation(len(points))[:LABELS_CHECKED]
    squares = np.stack([((centroids - point) ** 2).sum(axis=1) for point in points[rows].astype(np.float64)])
    excess = squares[np.arange(len(rows)), labels[rows]] - squares.min(axis=1)
    allowed = 0.0 if engine.startswith("diffprune") else 1e-5  # the others' labels are nearest in float32
    if excess.max() > allowed:
        raise AssertionError(f"{engine}: a label is not the nearest centroid, by {excess.max():.1e}; no speed")
    least = min(one["inertia"] for one in found.values())
    if found[engine]["inertia"] > least * (1 + INERTIA_TOLERANCE):
        raise AssertionError(f"{engine}: inertia {found[engine]['inertia']}, another has {least}; no speed is reported")
    if engine.endswith("from disk"):
        for one, other in zip(_result(folder, engine), _result(folder, "diffprune"), strict=True):
            if one.tobytes() != other.tobytes():
                raise AssertionError("diffprune from disk: other bytes than in memory; no speed is reported")


def _result(folder: Path, engine: str) -> tuple[np.ndarray, np.ndarray]:
    centroids = np.load(folder / f"{engine}.centroids.npy").astype(np.float64)
    return centroids, np.load(folder / f"{engine}.labels.npy").astype(np.int64)


def _lines(measured: dict[str, Any]) -> list[str]:
    size, found = measured["size"], measured["engines"]
    operations = 2 * size["n"] * size["k"] * size["d"] * (size["rounds"] + 1)
    bytes_read = 4 * size["n"] * size["d"] * (size["rounds"] + 1)
    packages = ("torch", "numpy", "faiss-cpu", "scikit-learn")
    versions = [f"{name} {version(name)}" for name in packages if _installed(name)]
    lines = [
        f"k-means, N={size['n']:,} D={size['d']} K={size['k']:,} float32, {size['rounds']} rounds and a last "
        f"assignment, from the same start: {operations / 1e12:.2f} TFLOP if every distance is computed, "
        f"{bytes_read / 1e9:.1f} GB if points are read once a round",
        f"{platform.processor() or 'CPU'}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(versions),
        f"{'':>20}  {'seconds':>8} (fastest to slowest)  {'inertia':>12}  {'peak':>9}  {'of it by fitting':>16}",
    ]
    for name, one in found.items():
        spread = f"({one['spread'][0]:.2f} to {one['spread'][1]:.2f})"
        lines.append(
            f"{name:>20}  {one['seconds']:8.2f} {spread:>20}  {one['inertia']:12.6g}  {one['peak'] / 1e6:6.0f} MB  "
            f"{(one['peak'] - one['peak_before']) / 1e6:13.0f} MB"
        )
    ours = found["diffprune"]["seconds"]
    for name in ("faiss", "scikit-learn"):
        if name in found:
            lines.append(f"diffprune is {found[name]['seconds'] / ours:.2f} times as fast as {name}")
    disk = found["diffprune from disk"]["seconds"] / ours
    lines.append(f"from disk, at {STREAM_FACTOR} times the memory allowed, it takes {disk:.2f} times as long")
    lines += [f"not installed: {name}" for name in measured["missing"]]
    for one in measured["growth"]:
        shape = f"N={one['n']:,} K={one['k']:,} D={one['d']}"
        lines.append(f"growth with {one['axis'].upper()}: {shape:>32}  {one['seconds_per_round']:.3f} s per round")
    return lines


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def test_kmeans_engines(benchmark, capsys):
    """Tiny without --benchmark-enable; with it, the real size."""
    small = ["--n", "1500", "--d", "12", "--k", "20", "--rounds", "3", "--repeats", "1", "--no-growth"]
    measured = benchmark.pedantic(main, args=([] if benchmark.enabled else small,), rounds=1)
    printed = capsys.readouterr().out
    with capsys.disabled():
        print("\n\n" + printed if benchmark.enabled else "")
    assert set(measured["engines"]) | set(measured["missing"]) == {*ENGINES, "diffprune from disk"}
    assert "times as long" in printed


def test_a_wrong_result_has_no_speed(tmp_path):
    points = write_problem(tmp_path, 200, 4, 5, seed=0)
    _work("diffprune", str(tmp_path), 2)
    found = {"diffprune": _summary(points, tmp_path, "diffprune", [{"seconds": 1, "peak": 1, "peak_before": 1}])}
    _refuse_wrong(points, tmp_path, "diffprune", found)
    labels = np.load(tmp_path / "diffprune.labels.npy")
    np.save(tmp_path / "diffprune.labels.npy", (labels + 1) % 5)
    with pytest.raises(AssertionError, match="not the nearest centroid"):
        _refuse_wrong(points, tmp_path, "diffprune", found)
    np.save(tmp_path / "diffprune.labels.npy", labels)
    found["faiss"] = {"inertia": found["diffprune"]["inertia"] * 0.99}
    with pytest.raises(AssertionError, match="no speed is reported"):
        _refuse_wrong(points, tmp_path, "diffprune", found)


if __name__ == "__main__":
    main()
