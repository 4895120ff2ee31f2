"""`kmeans_assign` on the CPU against faiss-cpu, scikit-learn and plain PyTorch: one round's assignment, same points.

    python -m pytest benchmarks/bench_kmeans_assign.py --benchmark-enable

N=100,000, D=384, K=1000 (KMEANS_ASSIGN_SIZE=N,D,K for another size), float32. On points like CLIP's embeddings (a
shared mean, decaying variances, clusters, length 1; centroids after two rounds) and on structureless ones (normal), the
hardest for a filter. Every way has to choose centroids that are as near in float64; ours exactly, or no speed is
reported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.clip_like import clip_like
from diffprune.kernels import cpp, kmeans_assign

N, D, K = map(int, os.environ.get("KMEANS_ASSIGN_SIZE", "100000,384,1000").split(","))
ROUNDS = 11
DATA = ("clip-like", "structureless")
seconds: dict[tuple[str, str], float] = {}  # median, by data and way


def structureless(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, generator=generator), torch.randn(K, D, generator=generator)


@pytest.fixture(scope="module", params=DATA)
def problem(request: pytest.FixtureRequest) -> tuple[str, Tensor, Tensor, Tensor]:
    """Name, points, centroids and the float64 distance of the nearest centroid."""
    generator = torch.Generator().manual_seed(0)
    points, centroids = clip_like(generator, N, K, D) if request.param == "clip-like" else structureless(generator)
    exact = centroids.double()
    nearest = [
        torch.cdist(block.double(), exact, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
        for block in points[:: max(1, N // 5000)].split(500)
    ]
    return request.param, points, centroids, torch.cat(nearest)


def ours(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda points, centroids: kmeans_assign(points, centroids, impl=impl)[0].long()


def faiss(points: Tensor, centroids: Tensor) -> Tensor:
    """What its k-means calls each round, on all cores as by default."""
    import faiss

    index = faiss.IndexFlatL2(D)
    index.add(centroids.numpy())
    return torch.from_numpy(index.search(points.numpy(), 1)[1][:, 0])


def scikit_learn(points: Tensor, centroids: Tensor) -> Tensor:
    from sklearn.metrics import pairwise_distances_argmin

    return torch.from_numpy(np.asarray(pairwise_distances_argmin(points.numpy(), centroids.numpy())))


def pytorch(points: Tensor, centroids: Tensor) -> Tensor:
    """`cdist` and `argmin`, in blocks that stay in the cache."""
    return torch.cat([torch.cdist(block, centroids).argmin(dim=1) for block in points.split(1024)])


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "diffprune cpp": (ours("cpp"), cpp.unavailable()),
    "diffprune cpu": (ours("cpu"), None),
    "faiss-cpu": (faiss, None if find_spec("faiss") else "faiss is not installed"),
    "scikit-learn": (scikit_learn, None if find_spec("sklearn") else "scikit-learn is not installed"),
    "PyTorch": (pytorch, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_assign(benchmark, problem, way):
    data, points, centroids, nearest = problem
    function, reason = WAYS[way]
    if reason:
        pytest.skip(reason)
    labels = benchmark.pedantic(function, (points, centroids), rounds=ROUNDS, warmup_rounds=1)
    rows = slice(None, None, max(1, N // 5000))
    chosen = (points[rows].double() - centroids[labels[rows]].double()).norm(dim=1)
    excess = ((chosen - nearest) / nearest).max().item()
    limit = 1e-12 if way.startswith("diffprune") else 1e-4
    assert excess <= limit, f"{way}: a chosen centroid is {excess:.1e} farther than the nearest; no speed is reported"
    if benchmark.enabled:
        seconds[data, way] = benchmark.stats.stats.median
        benchmark.extra_info.update(data=data, giga_operations=2 * N * D * K / 1e9, wrong_by_at_most=excess)


def test_report(capsys):
    if not seconds:
        pytest.skip("timed with --benchmark-enable only")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("faiss-cpu", "scikit-learn", "torch", "numpy"))
    instructions = cpp.instruction_set() if not cpp.unavailable() else "no C++ form"
    lines = [
        f"kmeans_assign, N={N:,}, D={D}, K={K:,}, float32: {2 * N * D * K / 1e9:.1f} GFLOP; median of {ROUNDS}",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {instructions}; {versions}",
    ]
    for data in DATA:
        for (found, way), took in seconds.items():
            if found == data:
                faster = took / seconds.get((data, "diffprune cpp"), took)
                rate = 2 * N * D * K / took / 1e9
                lines.append(f"{data:>14} {way:>14}: {took:7.3f} s {rate:7.1f} GFLOP/s  {faster:5.2f} × ours")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
