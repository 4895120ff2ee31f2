"""Precision, recall, density, coverage and Fréchet distance, beside prdc and scipy: time and peak memory.

    python -m pytest benchmarks/bench_evaluation.py --benchmark-enable  # against the others, at a size they can do
    python -m benchmarks.bench_evaluation                               # what 50,000 × 50,000 × 2,048 would take
    python -m benchmarks.bench_evaluation --big                         # and that, run

Features are those of a made-up encoder: 2,048 non-negative numbers with a spectrum that falls off, as Inception's.
Each way runs in a process of its own; memory is its peak (Linux tells it) less what it held before. On a machine that
does other work at the same time set OMP_NUM_THREADS and OPENBLAS_NUM_THREADS to 1: threads that wait for each other
then decide the figures. Without --benchmark-enable only the check runs, at a small size: results must agree, or no
speed is reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

K = 3
SIZE = {"quick": (300, 280, 64), "full": (4000, 4000, 2048)}  # samples, reference images, dimensions
BIG = (50_000, 50_000, 2048)
WAYS = {
    "precision, recall, density, coverage": ("diffprune", "prdc"),
    "Fréchet distance": ("diffprune", "scipy"),
}


def features(count: int, dimensions: int, seed: int) -> np.ndarray:
    """float32 [count, dimensions]; the same for a count's first rows whatever the count."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(64, dimensions)).astype(np.float32) / np.arange(1, 65, dtype=np.float32)[:, None] ** 0.5
    rng = np.random.default_rng(seed)
    rows = [
        np.abs(rng.normal(size=(min(1000, count - start), 64)).astype(np.float32) @ mixing + 0.1 * seed)
        + rng.random((min(1000, count - start), dimensions), dtype=np.float32)
        for start in range(0, count, 1000)
    ]
    return np.concatenate(rows) * np.float32(0.4)


def measure(metric: str, way: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds, peak MiB beside the features, and the result of one way; in a fresh process."""
    # Not a Pool: joblib, which prdc calls, starts no threads in a daemon.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, metric, way, size).result()


def _measure(metric: str, way: str, size: tuple[int, int, int]) -> dict[str, Any]:
    samples, reference, dimensions = size
    x, y = features(samples, dimensions, 1), features(reference, dimensions, 2)
    call = _prepare(metric, way, x, y)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start, busy = time.perf_counter(), time.process_time()
    result = call()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": busy, "mebibytes": _resident("VmHWM") - before, "result": result}


def _resident(field: str) -> float:
    """VmRSS (now) or VmHWM (at its peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _prepare(metric: str, way: str, x: np.ndarray, y: np.ndarray) -> Any:
    """The call, with everything imported and warmed up on a few rows."""
    if way == "diffprune":
        from diffprune.evaluation import frechet_distance, precision_recall

        a, b = torch.from_numpy(x), torch.from_numpy(y)
        if metric == "Fréchet distance":
            frechet_distance(a[:64, :8], b[:64, :8])
            return lambda: {"distance": frechet_distance(a, b)}
        precision_recall(a[:64], b[:64], K)
        return lambda: precision_recall(a, b, K)
    if way == "prdc":
        import contextlib
        import io

        from prdc import compute_prdc

        def quiet(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
            with contextlib.redirect_stdout(io.StringIO()):
                return compute_prdc(real_features=real, fake_features=fake, nearest_k=K)

        quiet(y[:64], x[:64])
        return lambda: quiet(y, x)
    from scipy.linalg import sqrtm

    def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.real(sqrtm(first @ second))
        return {
            "distance": float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)),
        }

    distance(x[:64, :8], y[:64, :8])
    return lambda: distance(x, y)


def check_same(metric: str, found: dict[str, dict[str, float]]) -> None:
    """Fail where the ways disagree: a wrong result has no speed."""
    ours, other = found["diffprune"], next(value for way, value in found.items() if way != "diffprune")
    # prdc's distances are float32, so a few of its pairs at a ball's edge fall on the other side.
    tolerance = {"rel": 1e-3} if metric == "Fréchet distance" else {"abs": 2e-3}
    for name, value in other.items():
        if ours[name] != pytest.approx(value, **tolerance):
            pytest.fail(f"{metric}: {name} is {ours[name]!r}, but {value!r} elsewhere; no speed is reported")


@pytest.mark.parametrize("metric", WAYS)
def test_results_agree(metric: str) -> None:
    pytest.importorskip("prdc")
    found = {way: _measure(metric, way, SIZE["quick"])["result"] for way in WAYS[metric]}
    check_same(metric, found)


@pytest.mark.parametrize("metric", WAYS)
def test_time_and_memory(benchmark: Any, capsys: Any, metric: str) -> None:
    pytest.importorskip("prdc")
    if not benchmark.enabled:
        pytest.skip("timed with --benchmark-enable only")
    size, runs = SIZE["full"], {way: [] for way in WAYS[metric]}
    for _ in range(3):
        for way in runs:
            runs[way].append(measure(metric, way, size))
    check_same(metric, {way: taken[0]["result"] for way, taken in runs.items()})
    medians = {way: float(np.median([run["seconds"] for run in taken])) for way, taken in runs.items()}
    busy = {way: float(np.median([run["cpu_seconds"] for run in taken])) for way, taken in runs.items()}
    benchmark.extra_info.update(seconds=medians, cpu_seconds=busy)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(f"\n\n{metric}: {size[0]:,} samples, {size[1]:,} reference images, {size[2]:,} dimensions\n{machine()}")
        for way, taken in runs.items():
            spread = max(run["seconds"] for run in taken) - min(run["seconds"] for run in taken)
            memory = max(run["mebibytes"] for run in taken)
            print(
                f"{way:>10}: {medians[way]:7.2f} s (spread {spread:.2f}), {busy[way]:7.2f} s of CPU, "
                f"{memory:7,.0f} MiB beside the features"
            )
        other = WAYS[metric][1]
        wall, cpu = (values[other] / values["diffprune"] for values in (medians, busy))
        print(f"diffprune takes 1/{wall:.2f} of {other}'s time and 1/{cpu:.2f} of its CPU time;", end=" ")
        print(f"{operations(metric, size) / busy['diffprune'] / 1e9:.1f} GFLOP per second of CPU")


def operations(metric: str, size: tuple[int, int, int]) -> float:
    """Of the matrix products over the features; 2 per multiply-add."""
    n, m, d = size
    return 2 * d * (n * n + m * m + n * m) if metric != "Fréchet distance" else 2 * d * d * (n + m)


def machine() -> str:
    """What it ran on."""
    return (
        f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    """Measure a part of the big problem and say what all of it would take; with --big, take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", action="store_true", help="run all of it")
    parser.add_argument("--part", type=int, default=5, help="measure 1/PART of each set first")
    arguments = parser.parse_args()
    part = (BIG[0] // arguments.part, BIG[1] // arguments.part, BIG[2])
    print(machine())
    for metric in WAYS:
        taken = measure(metric, "diffprune", part)
        cost = f"{taken['seconds']:.1f} s, {taken['mebibytes']:,.0f} MiB beside the features"
        print(f"{metric}, {part[0]:,} × {part[1]:,} × {part[2]:,}: {cost}")
        if arguments.big:
            taken = measure(metric, "diffprune", BIG)
            what = "measured"
        else:  # a Fréchet distance's eigenvalues do not grow, so this errs on the long side
            taken["seconds"] *= operations(metric, BIG) / operations(metric, part)
            what = "an estimate, by operations; memory beside the features does not grow with their number"
        print(f"{metric}, {BIG[0]:,} × {BIG[1]:,} × {BIG[2]:,}: {taken['seconds']:.0f} s ({what})")
        if arguments.big:
            print(f"    {taken['mebibytes']:,.0f} MiB beside the features; {taken['result']}")


if __name__ == "__main__":
    main()
