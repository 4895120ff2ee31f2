"""Starts for many clusters, minibatches, clusters of clusters, faiss to compare with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffprune.kmeans_init
from diffprune.errors import InputError
from diffprune.hierarchical_kmeans import HierarchicalKMeans
from diffprune.kernels import kmeans_assign
from diffprune.kmeans import KMeans
from diffprune.kmeans_faiss import faiss_centroids
from diffprune.kmeans_init import draw_rows, parallel, random_rows, shares
from diffprune.kmeans_minibatch import minibatch
from diffprune.kmeans_points import open_points


def grid_of_blobs(clusters: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of well separated clusters in random order, and their clusters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(clusters * each, generator=generator) % clusters
    centres = 20 * torch.stack([labels // 8, labels % 8], dim=1).float()
    return centres + torch.randn(len(labels), 2, generator=generator), labels


def test_rows_are_drawn_by_their_shares() -> None:
    mass = torch.tensor([0.0, 1.0, 0.0, 3.0, 1e-30, 4.0, 0.0])
    chances = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    counts = draw_rows(chances, mass).bincount(minlength=7)
    assert counts.tolist() == [0, 1000, 0, 3000, 0, 4000, 0]
    assert draw_rows(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), mass).tolist() == [1, 5]
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.75, 1.0])
    assert draw_rows(chances, mass, weights).bincount(minlength=7).tolist() == [0, 0, 0, 4000, 0, 4000, 0]


@pytest.mark.parametrize("largest", [1e-40, 1.0, 3e38])
def test_shares_are_whole_numbers_that_float64_adds_exactly(largest: float) -> None:
    mass = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * largest
    mass[3] = 0
    found = shares(mass)
    assert found.dtype == torch.int64 and found[3] == 0 and (found[mass > 0] > 0).all()
    assert 2**40 < int(found.sum()) <= 2**53
    expected = mass.double() / mass.double().sum()
    torch.testing.assert_close(found.double() / found.sum(), expected, rtol=1e-6, atol=1e-12)


def test_parallel_start_takes_candidates_with_the_right_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round from a known first point: min(1, l·D²/ΣD²) each."""
    monkeypatch.setattr(diffprune.kmeans_init, "PARALLEL_ROUNDS", 1)
    monkeypatch.setattr(diffprune.kmeans_init, "plus_plus", lambda points, *_: points.data)  # all candidates
    monkeypatch.setattr(diffprune.kmeans_init.Lloyd, "run", lambda self, start, *_: type("", (), {"centroids": start}))
    values = torch.tensor([0.0] * 200 + [1.0] * 40 + [2.0] * 40)[:, None]
    points = open_points(values, metric="euclidean")
    found = {1.0: [], 2.0: []}
    for seed in range(300):
        candidates = parallel(points, 2, torch.Generator().manual_seed(seed), 2.0).flatten()
        if candidates[0] == 0:
            for value, counts in found.items():
                counts.append(int((candidates == value).sum()))
    assert 150 < len(found[1.0]) < 270
    for value, counts in found.items():
        expected = 40 * min(1, 16 * value**2 / (40 * 1 + 40 * 4))
        assert np.mean(counts) == pytest.approx(expected, abs=4 * math.sqrt(expected / len(counts)))


def test_how_many_rows_are_drawn_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    expected = KMeans(9, init="k-means||", max_iter=1, seed=3).fit(points).centroids_
    monkeypatch.setattr(diffprune.kmeans_init, "DRAWN_AT_A_TIME", 7)
    assert torch.equal(KMeans(9, init="k-means||", max_iter=1, seed=3).fit(points).centroids_, expected)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "split"])
def test_starts_find_most_clusters(init: str) -> None:
    """Random rows hit 63 % of 64 equal clusters on average; these hit nearly all."""
    points, labels = grid_of_blobs(64, 30)
    found = {}
    for name in (init, "random"):
        model = KMeans(64, init=name, max_iter=2).fit(points)
        found[name] = sum(len(labels[model.assignment_ == c].unique()) == 1 for c in range(64))
    assert found[init] >= 60 and found["random"] < 60


def test_random_rows_differ() -> None:
    points = open_points(torch.arange(50.0)[:, None], metric="euclidean")
    rows = random_rows(points, 50, torch.Generator().manual_seed(0)).flatten()
    assert sorted(rows.tolist()) == list(range(50)) and rows.tolist() != list(range(50))


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random", "split"])
def test_as_many_clusters_as_distinct_points(init: str) -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    assert KMeans(40, init=init).fit(points).inertia_ == 0
    with pytest.raises(InputError, match=r"distinct points, got 40"):
        KMeans(41, init=init).fit(points)
    with pytest.raises(InputError, match=r"at least k=2 distinct points, got 1 \(9 rows\)"):
        KMeans(2, init=init).fit(torch.ones(9, 3))
    assert KMeans(1, init=init).fit(torch.ones(9, 3)).inertia_ == 0


def test_many_empty_clusters_restart_farthest_first() -> None:
    """Against the plain loop: one restart at a time, each at the point farthest from all centroids so far."""
    points = torch.randn(3000, 3, generator=torch.Generator().manual_seed(4))
    points[200:230] = points[5]
    centroids = [torch.zeros(3), *(torch.full((3,), 1e3 + i) for i in range(99))]
    model = KMeans(100, init=torch.stack(centroids), max_iter=0).fit(points)
    expected = [centroids[0]]
    for _ in range(99):
        distance = kmeans_assign(points, torch.stack(expected))[1]
        expected.append(points[int((distance == distance.max()).nonzero()[0])])
    assert torch.equal(model.centroids_, torch.stack(expected))
    assert torch.equal(model.assignment_, kmeans_assign(points, model.centroids_)[0])
    assert torch.equal(model.distance_, kmeans_assign(points, model.centroids_)[1].sqrt())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_minibatches(metric: str) -> None:
    points, _ = grid_of_blobs(16, 100)
    points = points + 5
    full = KMeans(16, metric=metric).fit(points)
    quick, again, other = (
        KMeans(16, metric=metric, batch_size=100, max_iter=5, seed=seed).fit(points) for seed in (0, 0, 1)
    )
    assert quick.n_iter_ <= 80
    assert quick.inertia_ < 1.6 * full.inertia_
    assert torch.equal(quick.centroids_, again.centroids_) and not torch.equal(quick.centroids_, other.centroids_)
    assert torch.equal(quick.assignment_, quick.predict(points))  # exact, of the final centroids
    assert quick.assignment_.unique().tolist() == list(range(16))
    huge, whole = (KMeans(16, metric=metric, batch_size=size).fit(points) for size in (1 << 40, len(points)))
    assert torch.equal(huge.centroids_, whole.centroids_)  # and not so many rows at a time


def test_transform() -> None:
    points, _ = grid_of_blobs(9, 20)
    points = points + 1000
    model = KMeans(9).fit(points)
    found = model.transform(points[:50].numpy())
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    expected = (points[:50, None].double() - model.centroids_.double()).square().sum(dim=2).sqrt()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert KMeans(180, init=points).fit(points).transform(points).diagonal().tolist() == [0] * 180
    with pytest.raises(InputError, match="transform needs centroids"):
        KMeans(2).transform(points)


def skewed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 2000 + [1] * 150 + [2] * 40)
    return 6.0 * torch.nn.functional.one_hot(labels, 3) + torch.randn(2190, 3, generator=generator), labels


@pytest.mark.parametrize("resample", [0, 2])
def test_levels_belong_together(resample: int) -> None:
    points, _ = skewed()
    model = HierarchicalKMeans((120, 20, 3), resample=resample, seed=1).fit(points)
    below: Any = points
    for level, k, labels in zip(model.levels_, (120, 20, 3), model.assignments_, strict=True):
        nearest, square = kmeans_assign(below, level.centroids)
        assert torch.equal(level.assignment, nearest) and torch.equal(level.distance, square.sqrt())
        assert level.assignment.unique().tolist() == list(range(k))
        assert labels.shape == (2190,)
        below = level.centroids
    chain = model.levels_[2].assignment[model.levels_[1].assignment[model.assignments_[0].long()].long()]
    assert torch.equal(chain, model.assignments_[2])


@pytest.mark.parametrize("part", ["random", "nearest", "farthest"])
def test_balanced_sampling_flattens_the_skew(part: str) -> None:
    points, labels = skewed()
    model = HierarchicalKMeans((120, 20, 3), seed=1).fit(points.numpy())
    rows = model.sample(300, part=part)
    assert len(set(rows.tolist())) == 300 and (np.diff(rows) > 0).all()
    counts = labels[torch.from_numpy(rows)].bincount(minlength=3)
    assert counts[2] >= 20 and counts[1] >= 90  # of 300 random rows they would be 5 and 21
    assert np.array_equal(rows, model.sample(300, part=part))
    assert model.sample(2190).tolist() == list(range(2190))
    assert len(model.sample(0)) == 0
    with pytest.raises(InputError, match="a count from 0 to the 2190 points, got 2191"):
        model.sample(2191)


def test_nearest_and_farthest_of_a_sample() -> None:
    points, _ = grid_of_blobs(8, 25)
    model = HierarchicalKMeans((8, 2)).fit(points)
    labels, distance = model.assignments_[0], model.levels_[0].distance
    for part, choose in (("nearest", torch.argmin), ("farthest", torch.argmax)):
        expected = {int((labels == c).nonzero().flatten()[choose(distance[labels == c])]) for c in range(8)}
        assert set(model.sample(8, part=part).tolist()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": (5, 5)}, r"expected falling numbers of clusters, got \[5, 5\]"),
        ({"ks": ()}, r"falling numbers of clusters, got \[\]"),
        ({"ks": (5, 2), "resample": -1}, "resample of at least 0"),
        ({"ks": (5, 2), "resample_share": 0}, r"a share in \(0, 1\]"),
    ],
)
def test_bad_hierarchies(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HierarchicalKMeans(**options)


def test_faiss_starts_nothing_it_leaves_out() -> None:
    """On all points: with its default of 256 points per centroid the result would be another one."""
    pytest.importorskip("faiss")
    points, _ = grid_of_blobs(4, 1000)
    centroids = faiss_centroids(points.numpy(), 4, max_iter=30, seed=0)
    labels = kmeans_assign(points, torch.from_numpy(centroids))[0]
    means = torch.stack([points[labels == c].mean(dim=0) for c in range(4)])
    np.testing.assert_allclose(centroids, means.numpy(), rtol=1e-4)
    with pytest.raises(InputError, match="at least k=5 points, got 4"):
        faiss_centroids(points[:4], 5, max_iter=1, seed=0)


def test_minibatch_centroids_are_means_of_all_points_seen() -> None:
    points = open_points(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), metric="euclidean")
    found, batches = minibatch(points, torch.zeros(1, 3), 20, 2, 0.0, torch.Generator().manual_seed(7))
    generator, seen = torch.Generator().manual_seed(7), []
    for _ in range(batches):
        seen.append(draw_rows(torch.rand(20, generator=generator, dtype=torch.float64), torch.ones(200)))
    assert batches > 1
    torch.testing.assert_close(found[0], points.data[torch.cat(seen)].mean(dim=0))


def test_resampling_takes_as_many_from_each_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = skewed()
    fit, sizes = KMeans.fit, []

    def counted(self: KMeans, elements: Any, **options: Any) -> KMeans:
        sizes.append(len(elements))
        return fit(self, elements, **options)

    monkeypatch.setattr(KMeans, "fit", counted)
    HierarchicalKMeans((100, 10), resample=1, resample_share=0.5).fit(points)
    kept = sizes[2]
    before = fit(KMeans(10, seed=1, max_iter=50), fit(KMeans(100, max_iter=50), points).centroids_)
    assert sizes == [2190, 100, kept, 100]
    assert kept == int(before.assignment_.bincount().clamp(max=5).sum()) < 100


def test_resampling_moves_centroids_out_of_dense_regions() -> None:
    """Into a thin background. When each repeat began with the centroids of the one before, none left the blob."""
    generator = torch.Generator().manual_seed(0)
    blob = 0.25 + 0.07 * torch.randn(9000, 2, generator=generator)
    points = torch.cat([blob, torch.rand(3000, 2, generator=generator)])

    def inside(resample: int) -> float:
        models = [HierarchicalKMeans((600, 40), resample=resample, seed=seed).fit(points) for seed in range(3)]
        far = [torch.linalg.vector_norm(model.levels_[1].centroids - 0.25, dim=1) for model in models]
        return float((torch.stack(far) < 0.16).double().mean())

    assert inside(3) < 0.75 * inside(0)


def test_a_sample_smaller_than_the_tree_is_not_of_its_largest_clusters() -> None:
    """What a share does not divide went to the largest, which are those of the blob: half of 20 points and not 3."""
    generator = torch.Generator().manual_seed(0)
    blob = 0.25 + 0.07 * torch.randn(9000, 2, generator=generator)
    points = torch.cat([blob, torch.rand(3000, 2, generator=generator)])
    model = HierarchicalKMeans((600, 40), seed=0).fit(points)
    for count in (20, 100, 300):
        rows = [model.sample(count, seed=seed) for seed in range(8)]
        assert all(len(set(found.tolist())) == count for found in rows)
        inside = (torch.linalg.vector_norm(points[np.concatenate(rows)] - 0.25, dim=1) < 0.16).double().mean()
        assert inside < 0.22
    assert not np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], model.sample(300))
