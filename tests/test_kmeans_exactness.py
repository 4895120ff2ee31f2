"""The same bytes from every way through the same points: files, blocks, bounds, delta updates, the plainest Lloyd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffprune.kmeans_bounds
import diffprune.kmeans_lloyd
from diffprune import kmeans_sums
from diffprune.errors import InputError
from diffprune.kernels import kmeans_assign
from diffprune.kmeans import KMeans
from diffprune.kmeans_points import Part, open_points
from diffprune.kmeans_sums import ClusterSums, total
from tests.kernels.cpp_case import needs_cpp


def cloud(n: int = 1500, d: int = 7, seed: int = 0) -> Tensor:
    """Clusters that run into each other, so that many rounds move points."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, d, generator=generator)
    return centres[torch.randint(0, 12, (n,), generator=generator)] + torch.randn(n, d, generator=generator)


def result(model: KMeans) -> list[Any]:
    arrays = (model.centroids_, model.assignment_, model.distance_)
    return [np.asarray(a).tobytes() for a in arrays] + [model.inertia_, model.n_iter_, model.moved_]


def files(folder: Path, points: Tensor, lengths: list[int]) -> list[Path]:
    paths = []
    for i, part in enumerate(points.split(lengths)):
        paths.append(folder / f"{len(lengths)}-{i}.npy")
        np.save(paths[-1], part.numpy())
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random", "split"])
def test_streamed_from_any_files_is_the_same_bytes(tmp_path: Path, init: str, metric: str, dtype: torch.dtype) -> None:
    points = cloud(700, d=5).to(dtype)
    options: dict[str, Any] = {"init": init, "metric": metric, "max_iter": 6, "tol": 0, "seed": 3}
    expected = result(KMeans(20, **options).fit(points))
    for lengths, memory in (([700], 2000), ([1, 298, 0, 401], 4096), ([350, 350], 10**9)):
        paths = files(tmp_path, points, lengths)
        assert result(KMeans(20, memory=memory, **options).fit(paths)) == expected
    mapped = [np.load(path, mmap_mode="r") for path in paths]
    assert result(KMeans(20, memory=3000, **options).fit(mapped)) == expected


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_bounds_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, metric: str, weighted: bool) -> None:
    monkeypatch.setattr(diffprune.kmeans_bounds, "GROUP_SIZE", 8)
    points = cloud()
    weights = torch.rand(len(points), generator=torch.Generator().manual_seed(1)) if weighted else None
    start = points[:60]
    plain, bounded = (
        KMeans(60, init=start, metric=metric, tol=0, algorithm=name).fit(points, weights=weights)
        for name in ("lloyd", "yinyang")
    )
    assert plain.n_iter_ > 5
    assert result(plain) == result(bounded)


def test_bounds_decide_ties_as_the_op_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a lattice nearly every point is as near to several centroids, which lie in several groups."""
    monkeypatch.setattr(diffprune.kmeans_bounds, "GROUP_SIZE", 3)
    side = torch.arange(9.0)
    points = torch.cartesian_prod(side, side, side)
    start = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:40]]
    plain, bounded = (KMeans(40, init=start, tol=0, algorithm=name).fit(points) for name in ("lloyd", "yinyang"))
    assert result(plain) == result(bounded)


def test_bounds_save_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []

    def counted(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        pairs.append(len(points) * len(centroids))
        return kmeans_assign(points, centroids)

    monkeypatch.setattr(diffprune.kmeans_bounds, "kmeans_assign", counted)
    monkeypatch.setattr(diffprune.kmeans_bounds, "GROUP_SIZE", 8)
    points = cloud(4000)
    model = KMeans(100, init=points[:100], tol=0, algorithm="yinyang").fit(points)
    assert sum(pairs) < 0.5 * (model.n_iter_ + 1) * 4000 * 100


def test_moving_points_between_sums_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delta updates against adding everything anew in every round."""
    points = cloud() * torch.tensor([1e-6, 1, 1e5, 1, 1, 1e-3, 3])
    options: dict[str, Any] = {"init": points[:30], "tol": 0, "algorithm": "lloyd"}
    moved = KMeans(30, **options).fit(points)
    assert moved.n_iter_ > 5 and 0 < moved.moved_[5] < 0.5 * len(points)
    monkeypatch.setattr(diffprune.kmeans_lloyd.Lloyd, "_sweep", diffprune.kmeans_lloyd.Lloyd._sweep_whole)
    anew = KMeans(30, **{**options, "max_iter": moved.n_iter_}).fit(points)
    assert result(anew)[:4] == result(moved)[:4]


def test_agrees_with_the_plainest_lloyd() -> None:
    """Float64 distances, a loop over clusters, no empty cluster on the way: the labels of all rounds."""
    points = cloud(600, d=4)
    centroids = points[:8].double()
    for rounds in range(1, 6):
        labels = (points.double()[:, None] - centroids.float().double()).square().sum(dim=2).argmin(dim=1)
        centroids = torch.stack([points[labels == c].double().mean(dim=0) for c in range(8)])
        model = KMeans(8, init=points[:8], max_iter=rounds, tol=0).fit(points)
        torch.testing.assert_close(model.centroids_, centroids.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("check_every", [2, 3, 8])
def test_a_host_that_looks_rarely_gets_the_same(monkeypatch: pytest.MonkeyPatch, check_every: int) -> None:
    """As on a GPU: rounds past convergence change nothing, and empty clusters are filled before the end."""
    points = torch.cat([cloud(300), 100 + cloud(5, seed=1)])
    init = torch.cat([points[:10], torch.full((1, 7), 1e4)])
    plain = KMeans(11, init=init, tol=1e-3).fit(points[:300])
    run = diffprune.kmeans_lloyd.Lloyd.run

    def rarely(self: Any, *args: Any) -> Any:
        self.check_every = check_every
        self._sweep = self._sweep_whole
        return run(self, *args)

    monkeypatch.setattr(diffprune.kmeans_lloyd.Lloyd, "run", rarely)
    model = KMeans(10, init=points[:10], tol=1e-3).fit(points[:300])
    monkeypatch.undo()
    expected = KMeans(10, init=points[:10], tol=1e-3).fit(points[:300])
    assert torch.equal(model.centroids_, expected.centroids_)
    assert torch.equal(model.assignment_, expected.assignment_)
    monkeypatch.setattr(diffprune.kmeans_lloyd.Lloyd, "run", rarely)
    assert KMeans(11, init=init, tol=1e-3).fit(points).assignment_.unique().tolist() == list(range(11))
    assert plain.k == 11


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_sums_do_not_depend_on_order_and_are_right(scale: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 5, generator=generator) * torch.logspace(-4, 2, 5) * scale
    points[17] *= 1e4
    assignment = torch.randint(0, 6, (3000,), generator=generator, dtype=torch.int32)
    weights = torch.rand(3000, generator=generator, dtype=torch.float64) if weighted else None
    found = []
    for order in (torch.arange(3000), torch.randperm(3000, generator=generator)):
        sums = ClusterSums(6, open_points(points, metric="euclidean"), float(points.abs().max()), weights)
        for rows in order.split(701):
            sums.add(points[rows], rows, assignment[rows])
        found.append(sums.means())
    assert torch.equal(*found)
    for c in range(6):
        own = (assignment == c).nonzero().flatten().tolist()
        masses = [1.0] * len(own) if weights is None else weights[own].tolist()
        for d in range(5):
            terms = [w * float(points[row, d]) for row, w in zip(own, masses, strict=True)]
            tolerance = 1e-13 * max(map(abs, terms))
            assert math.isclose(
                float(found[0][c, d]), math.fsum(terms) / math.fsum(masses), rel_tol=0, abs_tol=tolerance
            )


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [3, 0, 2000])
def test_cpp_and_torch_sum_the_same_bits(dtype: torch.dtype, weighted: bool, rows: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    points = (torch.randn(2000, 19, generator=generator) * torch.logspace(-6, 3, 19)).to(dtype)
    points[5, ::2] = 0.5 * points[6, ::2]
    weights = torch.rand(2000, generator=generator, dtype=torch.float64) if weighted else None
    old, new = (torch.randint(0, 7, (2000,), generator=generator, dtype=torch.int32) for _ in range(2))
    moved = torch.randperm(2000, generator=generator)[:rows]
    found = []
    for in_cpp in (True, False):
        monkeypatch.setattr(kmeans_sums, "_in_cpp", lambda values, in_cpp=in_cpp: in_cpp)
        sums = ClusterSums(7, open_points(points, metric="euclidean"), float(points.float().abs().max()), weights)
        sums.add(points, slice(0, 2000), old)
        sums.move(points, moved, moved, old[moved], new[moved])
        found.append(sums.total.bins)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_half_sums_are_exact_without_a_split() -> None:
    points = cloud(500).half()
    sums = ClusterSums(1, open_points(points, metric="euclidean"), float(points.abs().max()))
    sums.add(points, slice(0, 500), torch.zeros(500, dtype=torch.int32))
    assert len(sums.total.bins) == 1
    assert sums.sums()[0].tolist() == [math.fsum(column) for column in points.T.tolist()]


def test_weights_count_as_copies() -> None:
    points = cloud(200)
    copies = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(2))
    start = points[copies > 0][:9]
    weighted = KMeans(9, init=start, tol=0, weights=copies).fit(points)
    repeated = KMeans(9, init=start, tol=0).fit(points.repeat_interleave(copies, dim=0))
    assert torch.equal(weighted.centroids_, repeated.centroids_)
    assert torch.equal(weighted.assignment_.repeat_interleave(copies), repeated.assignment_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-12)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random", "split"])
def test_points_without_weight_found_no_cluster(init: str) -> None:
    points = torch.cat([cloud(60), 50 + cloud(60)])
    weights = torch.cat([torch.ones(60), torch.zeros(60)])
    model = KMeans(6, init=init, weights=weights).fit(points)
    assert float(model.centroids_.max()) < 20
    assert sorted(set(model.assignment_[:60].tolist())) == list(range(6))
    with pytest.raises(InputError, match=r"at least k=61 distinct points of a weight above 0, got 60 \(120 rows\)"):
        KMeans(61, init=points[:61], weights=weights).fit(points)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(9), r"expected weights \[10\], one for each point, got \[9\]"),
        ([1.0] * 9 + [-0.5], "1 of 10 weights have a value that is negative or not finite: rows 9"),
        (np.array([1.0, np.nan, np.inf] + [1.0] * 7), "2 of 10 weights have .*: rows 1, 2"),
        (torch.zeros(10), "expected a weight above 0, got only zeros"),
        (torch.ones(10).to_sparse(), "expected weights as a dense tensor, got torch.sparse_coo"),
        (np.ma.masked_less(np.arange(10.0), 3), "expected weights without a mask, got 3 masked values"),
        (np.ones(10, complex), "expected real weights, got torch.complex128"),
        ([1.0, [2.0]], "expected weights .N. as an array or list of numbers"),
        (["a"] * 10, "expected weights of a dtype that torch has, got <U1"),
    ],
)
def test_bad_weights(weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KMeans(2).fit(cloud(10), weights=weights)
    with pytest.raises(InputError, match=message):
        KMeans(2, weights=weights).fit(cloud(10))


@pytest.mark.parametrize("exponent", [-1060, -133, -120, 900, 1020])  # as densities are, and sums of their inverses
@pytest.mark.parametrize("batch_size", [None, 100])
def test_only_ratios_of_weights_count(exponent: int, batch_size: int | None) -> None:
    points = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    weights = np.arange(300.0) % 7
    fits = [KMeans(9, weights=w, batch_size=batch_size).fit(points) for w in (weights, np.ldexp(weights, exponent))]
    for name in ("centroids_", "assignment_", "distance_"):
        assert torch.equal(*(getattr(fit, name) for fit in fits))
    assert fits[1].inertia_ == pytest.approx(fits[0].inertia_ * 2.0**exponent, rel=1e-4)


def test_weights_go_by_position() -> None:
    pandas = pytest.importorskip("pandas")
    points, weights = cloud(200), np.arange(200.0)
    expected = result(KMeans(5, weights=weights).fit(points))
    for index in (range(5, 205), range(199, -1, -1), [f"photo-{i}" for i in range(200)]):
        assert result(KMeans(5).fit(points, weights=pandas.Series(weights, index=index))) == expected
    assert result(KMeans(5, weights=weights.tolist()).fit(points)) == expected
    assert result(KMeans(5, weights=weights.astype(">f4")).fit(points)) == expected


def test_parts_leave_rows_out(tmp_path: Path) -> None:
    points = cloud(300)
    (path,) = files(tmp_path, points, [300])
    rows = np.flatnonzero(np.arange(300) % 7 != 3)
    expected = result(KMeans(5).fit(points[torch.from_numpy(rows)]))
    part = Part(np.load(path, mmap_mode="r"), rows)
    assert result(KMeans(5, memory=1000).fit([part])) == expected


def test_a_mapped_slice_is_its_own_rows(tmp_path: Path) -> None:
    """A slice of a memory map keeps the file's name and offset; its rows must not be read from the start."""
    points = cloud(300)
    (path,) = files(tmp_path, points, [300])
    mapped = np.load(path, mmap_mode="r")
    for view in (mapped[100:], mapped[::3], mapped[:, 1:4]):
        expected = torch.from_numpy(np.array(view))
        assert result(KMeans(5, memory=700).fit([view])) == result(KMeans(5).fit(expected))


def test_streamed_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    points = cloud(100)
    points[[30, 71], 2] = torch.nan
    keys = [f"photo-{i:03d}" for i in range(100)]
    with pytest.raises(InputError, match="2 of 100 points have NaN or infinity: keys 'photo-030', 'photo-071'; leave"):
        KMeans(3, memory=500).fit(files(tmp_path, points, [50, 50]), keys=keys)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "2-0.npy").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cut.npy: not a readable .npy file"):
        KMeans(3).fit([tmp_path / "cut.npy"])


def test_dlpack_in_dlpack_out() -> None:
    """What CuPy has: __dlpack__ on arrays, from_dlpack in the module. Stands in for it, where there is no GPU."""
    points = cloud(90)
    assert open_points(_Foreign(points), metric="euclidean").like(points).__class__ is _Foreign
    model = KMeans(4).fit(_Foreign(points))
    assert isinstance(model.assignment_, _Foreign)
    assert torch.equal(model.centroids_.tensor, KMeans(4).fit(points).centroids_)
    assert torch.equal(model.predict(_Foreign(points)).tensor, model.assignment_.tensor)


class _Foreign:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def from_dlpack(array: Any) -> _Foreign:
    return _Foreign(torch.from_dlpack(array))


def test_half_and_single_files_are_read_as_single() -> None:
    points = cloud(200).half()
    mixed = [points[:90].numpy(), points[90:].float().numpy()]
    assert result(KMeans(5, memory=900).fit(mixed)) == result(KMeans(5).fit(points.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_are_exact_and_leave_the_values_alone(dtype: torch.dtype) -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = (values * torch.logspace(-12, 6, 5000, dtype=torch.float64)).to(dtype)
    before = values.clone()
    expected = math.fsum(values.tolist())
    assert total(values) == pytest.approx(expected, rel=1e-15)
    shuffled = values[torch.randperm(5000, generator=torch.Generator().manual_seed(4))]
    assert total(shuffled) == total(values)
    assert torch.equal(values, before)
    assert (
        total(torch.zeros(3)) == 0 and total(torch.tensor([1.0, math.inf])) == math.inf and total(torch.zeros(0)) == 0
    )
