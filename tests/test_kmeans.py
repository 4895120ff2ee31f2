"""``KMeans``: exact, deterministic, never an empty cluster."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kmeans import KMeans
from diffprune.kmeans_init import plus_plus
from diffprune.kmeans_points import open_points


def blobs(n: int = 600, k: int = 5, d: int = 8, spread: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator)
    labels = torch.randint(0, k, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, d, generator=generator)


def check(model: KMeans, points: Tensor) -> None:
    """The results belong together: every label is the float64 nearest of the final centroids, no cluster is empty."""
    assert model.centroids_.dtype == model.distance_.dtype == torch.float32
    assert model.assignment_.dtype == torch.int32
    distances = torch.cdist(points.double(), model.centroids_.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, model.assignment_.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(model.distance_.double(), chosen, rtol=1e-6, atol=1e-20)
    assert model.inertia_ == pytest.approx(float(chosen.square().sum()), rel=1e-6)
    assert model.assignment_.unique().tolist() == list(range(model.k))


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("max_iter", [1, 100])
def test_results_belong_together(k: int, max_iter: int) -> None:
    points = blobs()
    model = KMeans(k, max_iter=max_iter).fit(points)
    check(model, points)
    assert 1 <= model.n_iter_ <= max_iter


def test_converged_centroids_are_the_means() -> None:
    points = blobs() + 1e3
    model = KMeans(6, tol=0).fit(points)
    assert model.n_iter_ < 100
    for cluster in range(6):
        mean = points[model.assignment_ == cluster].double().mean(dim=0)
        assert torch.equal(model.centroids_[cluster], mean.float())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_finds_separate_blobs(metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.eye(6)[:4] * 10
    labels = torch.arange(200) % 4
    points = centres[labels] + 0.1 * torch.randn(200, 6, generator=generator)
    model = KMeans(4, metric=metric, n_init=3).fit(points)
    assert len({(a, b) for a, b in zip(labels.tolist(), model.assignment_.tolist(), strict=True)}) == 4


def test_same_bytes_for_a_seed_and_any_number_of_threads() -> None:
    points = blobs(5000, k=9, d=12, spread=0.8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            model = KMeans(15, seed=4, max_iter=20).fit(points)
            results.append((model.centroids_.numpy().tobytes(), model.distance_.numpy().tobytes(), model.inertia_))
    finally:
        torch.set_num_threads(before)
    assert results[1:] == results[:1] * 3
    assert KMeans(15, seed=5, max_iter=20).fit(points).centroids_.numpy().tobytes() != results[0][0]


def test_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    KMeans(3).fit(blobs(50))
    assert torch.equal(torch.get_rng_state(), state)


def test_n_init_keeps_the_best_start() -> None:
    points = blobs(300, k=20, spread=0.1)
    single = [KMeans(20, seed=seed).fit(points).inertia_ for seed in range(4)]
    many = [KMeans(20, seed=seed, n_init=5).fit(points) for seed in range(4)]
    assert all(several.inertia_ <= one for several, one in zip(many, single, strict=True))
    assert sum(fit.inertia_ for fit in many) < 0.95 * sum(single)
    check(many[0], points)


def test_tol_is_relative_to_the_variance() -> None:
    points = blobs(1000, k=5, spread=1.0)
    rounds = [KMeans(10, tol=tol, seed=1).fit(points).n_iter_ for tol in (0.0, 1e-2, 1e9)]
    assert rounds[0] > rounds[1] > rounds[2] == 1
    assert KMeans(10, tol=1e-2, seed=1).fit(points * 1024).n_iter_ == rounds[1]


def test_kmeans_plus_plus_samples_by_squared_distance() -> None:
    """Two points in 0, one in 1, one in 3. With the first centroid in 0 (half the seeds) 3 follows with 9/10."""
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    held = open_points(points, metric="euclidean")
    starts = [plus_plus(held, 2, torch.Generator().manual_seed(seed)).flatten().tolist() for seed in range(1000)]
    assert all(first != second for first, second in starts)
    seconds = [second for first, second in starts if first == 0]
    assert abs(len(seconds) / 1000 - 1 / 2) < 0.05
    assert abs(seconds.count(3.0) / len(seconds) - 9 / 10) < 0.04
    seconds = [second for first, second in starts if first == 3]
    assert abs(seconds.count(0.0) / len(seconds) - 18 / 22) < 0.07


def test_empty_clusters_restart_at_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [50.0], [50.0]])
    init = torch.tensor([[0.0], [99.0], [-500.0], [-600.0]])
    model = KMeans(4, init=init, max_iter=1).fit(points)
    check(model, points)
    # The 50s are 49 from 99: -500 restarts there. The next farthest, 11 at 11 from 0, gets -600.
    # Then 99 has lost all its points and restarts at 2. Means: 0.5, 2, 50, 10.5.
    assert model.centroids_.flatten().tolist() == [0.5, 2.0, 50.0, 10.5]
    assert model.assignment_.tolist() == [0, 0, 1, 3, 3, 2, 2]


def test_same_init_for_all_still_fills_every_cluster() -> None:
    points = blobs(100)
    model = KMeans(20, init=points[:1].expand(20, -1)).fit(points)
    check(model, points)


def test_every_distinct_point_its_own_cluster() -> None:
    points = blobs(30).repeat(3, 1)
    model = KMeans(30).fit(points)
    check(model, points)
    assert torch.equal(model.distance_, torch.zeros(90))
    assert model.inertia_ == 0


@pytest.mark.parametrize("init", ["k-means++", torch.arange(31 * 8.0).view(31, 8)])
def test_more_clusters_than_distinct_points(init: Any) -> None:
    points = blobs(30).repeat(3, 1)
    with pytest.raises(InputError, match=r"at least k=31 distinct points, got 30 \(90 rows\)"):
        KMeans(31, init=init).fit(points)


def test_more_clusters_than_rows() -> None:
    with pytest.raises(InputError, match=r"at least k=4 distinct points, got 2 \(3 rows\)"):
        KMeans(4).fit(torch.tensor([[1.0], [2.0], [1.0]]))
    with pytest.raises(InputError, match=r"at least k=1 distinct points, got 0 \(0 rows\)"):
        KMeans(1).fit(torch.empty(0, 3))


def test_cosine() -> None:
    points = blobs(300, d=5) * (1 + 100 * torch.rand(300, 1, generator=torch.Generator().manual_seed(1)))
    model = KMeans(6, metric="cosine").fit(points)
    torch.testing.assert_close(model.centroids_.double().norm(dim=1), torch.ones(6).double(), rtol=1e-6, atol=0)
    unit = points.double() / points.double().norm(dim=1, keepdim=True)
    cosine = unit @ model.centroids_.double().T
    assert torch.equal(cosine.argmax(dim=1).int(), model.assignment_)
    torch.testing.assert_close(model.distance_.double(), (2 - 2 * cosine.amax(dim=1)).sqrt(), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.predict(points * 7), model.assignment_)


def test_cosine_of_vectors_that_cancel_or_are_tiny() -> None:
    points = torch.tensor([[1e-30, 0.0], [-2e30, 0.0]])
    model = KMeans(1, metric="cosine").fit(points)
    assert model.centroids_.norm() == 1
    assert sorted(model.distance_.tolist()) == [0, 2]
    assert KMeans(2, metric="cosine").fit(points).distance_.tolist() == [0, 0]


def test_predict() -> None:
    points, others = blobs(), blobs(seed=9)
    model = KMeans(5).fit(points)
    assert torch.equal(model.predict(points), model.assignment_)
    distances = torch.cdist(others.double(), model.centroids_.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(model.predict(others).long(), distances.argmin(dim=1))
    with pytest.raises(InputError, match=r"expected points \[M, 8\], got \(3, 2\)"):
        model.predict(torch.ones(3, 2))
    with pytest.raises(InputError, match="call fit first"):
        KMeans(5).predict(points)


@pytest.mark.filterwarnings("error")
def test_numpy_in_numpy_out(tmp_path: Path) -> None:
    points = blobs(200)
    expected = KMeans(4).fit(points.half())
    np.save(tmp_path / "points.npy", points.half().numpy())
    model = KMeans(4).fit(np.load(tmp_path / "points.npy", mmap_mode="r"))
    assert isinstance(model.centroids_, np.ndarray)
    assert isinstance(model.predict(points.numpy()), np.ndarray)
    assert (model.assignment_.dtype, model.distance_.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(model.centroids_, expected.centroids_.numpy())
    np.testing.assert_array_equal(model.assignment_, expected.assignment_.numpy())


def test_half_points_are_taken_at_their_own_values() -> None:
    points = blobs(200).half()
    half, single = KMeans(4).fit(points), KMeans(4).fit(points.float())
    assert torch.equal(half.centroids_, single.centroids_)
    assert torch.equal(half.distance_, single.distance_)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_points_that_are_not_finite(metric: str) -> None:
    points = blobs(50)
    points[[3, 17], 2] = torch.nan
    points[40, 0] = -torch.inf
    with pytest.raises(InputError, match="3 of 50 points have NaN or infinity: rows 3, 17, 40; leave them out"):
        KMeans(2, metric=metric).fit(points)


def test_cosine_refuses_zero_vectors() -> None:
    points = blobs(50)
    points[::4] = 0
    with pytest.raises(InputError, match=r"13 of 50 points have length 0.*: rows 0, 4, 8, .*36, \.\.\.; leave"):
        KMeans(2, metric="cosine").fit(points)


@pytest.mark.parametrize(("scale", "message"), [(1e25, "overflow float32"), (1e-30, "vanish in float32")])
def test_distances_that_leave_float32(scale: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KMeans(2).fit(blobs(20) * scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "got 0, 100, 1"),
        ({"k": 2, "max_iter": 0}, "got 2, 0, 1"),
        ({"k": 2, "n_init": 0}, "got 2, 100, 0"),
        ({"k": 2, "tol": -1.0}, "expected tol of at least 0, got -1.0"),
        ({"k": 2, "tol": float("nan")}, "expected tol of at least 0, got nan"),
        ({"k": 2, "metric": "l1"}, "expected metric to be one of euclidean, cosine, got 'l1'"),
        ({"k": 2, "init": "grid"}, "expected init to be .*, random, split or centroids \\[k, D\\], got 'grid'"),
        ({"k": 2, "algorithm": "elkan"}, "expected algorithm to be one of auto, lloyd, yinyang, got 'elkan'"),
        ({"k": 2, "batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"k": 2, "init": torch.ones(2, 8), "n_init": 2}, "expected n_init 1, got 2"),
        ({"k": 2, "init": torch.ones(3, 8)}, r"expected init \[2, 8\], got \[3, 8\]"),
        ({"k": 2, "init": torch.full((2, 8), torch.nan)}, "2 of 2 init have NaN or infinity: rows 0, 1"),
        ({"k": 2, "init": torch.ones(2)}, r"expected init \[N, D\] of a floating dtype .*, got \[2\]"),
        ({"k": 5.0}, "expected k as an integer, got 5.0"),
        ({"k": True}, "expected k as an integer, got True"),
        ({"k": 2, "max_iter": 2.5}, "expected max_iter as an integer, got 2.5"),
        ({"k": 2, "batch_size": 9.5}, "expected batch_size as an integer, got 9.5"),
        ({"k": 2, "seed": None}, "expected seed as an integer, got None"),
        ({"k": 2, "seed": 0.5}, "expected seed as an integer, got 0.5"),
        ({"k": 2, "seed": 2**70}, "expected a seed of 64 bits, got 1180591620717411303424"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KMeans(**options).fit(blobs(50))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.ones(3), r"expected points \[N, D\] of a floating dtype \(float16, .*\), got \[3\] torch.float32"),
        (torch.ones(3, 0), r"got \[3, 0\] torch.float32"),
        (torch.ones(3, 2, dtype=torch.int64), r"got \[3, 2\] torch.int64"),
        ([[1.0]], "expected a torch tensor, a NumPy or DLPack array, or a list of arrays .*, got a list of list"),
        (3, "expected points as a torch tensor, .* got int"),
        ([], "expected arrays of equal width, got none"),
        (torch.ones(3, 2).to_sparse(), "expected points as a dense tensor, got torch.sparse_coo"),
        (torch.ones(3, 2, device="meta"), "expected points as a dense tensor, got a meta tensor"),
        (torch.ones(3, 2).to(torch.float8_e4m3fn), r"floating dtype \(float16, .*\), got \[3, 2\] torch.float8_e4m3fn"),
        (np.ones((3, 2), np.longdouble), "expected points of a dtype that torch has, got float128"),
        (np.zeros(3, [("x", "f4")]), r"expected points of a dtype that torch has, got \[\('x', '<f4'\)\]"),
        ([np.ones((3, 2), np.longdouble)], "expected points of a dtype that torch has, got float128"),
        (np.ma.masked_greater(np.eye(3), 0.5), "expected points without a mask, got 3 masked values"),
        ([np.ma.masked_greater(np.eye(3), 0.5)], "expected points without a mask, got 3 masked values"),
        ([np.ones((3, 2)), np.ones((3, 3))], r"equal width, got \[n, 2\] and \[n, 3\]"),
        ([np.ones((3, 2)), np.ones(3)], r"expected points \[N, D\] of a floating dtype .*, got \[3\] torch.float64"),
    ],
)
def test_bad_points(points: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KMeans(1).fit(points)


def test_any_byte_order_and_integer_seed(tmp_path: Path) -> None:
    points = blobs(200).numpy()
    expected = KMeans(4, seed=3).fit(points)
    np.save(tmp_path / "points.npy", points.astype(">f4"))
    swapped = points.astype(">f4"), [points[:90], points[90:].astype(">f4")], tmp_path / "points.npy"
    for model in [KMeans(4, seed=np.int64(3)).fit(given) for given in (*swapped, np.ma.masked_array(points))]:
        np.testing.assert_array_equal(model.centroids_, expected.centroids_)
        np.testing.assert_array_equal(model.predict(swapped[0]), expected.assignment_)
    streamed = KMeans(4, seed=3, memory=1000).fit(tmp_path / "points.npy")
    np.testing.assert_array_equal(streamed.centroids_, expected.centroids_)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_centroids_may_be_set(metric: str) -> None:
    points = blobs(100)
    others = 1.25 * points[:4]
    expected = KMeans(4, metric=metric, init=others, max_iter=0).fit(points)
    fitted = KMeans(4, metric=metric).fit(points)
    for model in (fitted, KMeans(4, metric=metric)):
        for given in (others, others.numpy(), others.numpy().astype(">f8")):
            model.centroids_ = given
            assert torch.equal(model.predict(points), expected.assignment_)
            assert torch.equal(model.transform(points), expected.transform(points))
            np.testing.assert_array_equal(np.asarray(model.centroids_), expected.centroids_.numpy())
    model.centroids_ = others[[1, 0, 2, 3]]
    model.centroids_[[0, 1]] = model.centroids_[[1, 0]]
    assert torch.equal(model.predict(points), expected.assignment_)
    for bad, message in (
        (others[:3], r"expected centroids_ \[4, D\], got \[3, 8\]"),
        (others[0], r"expected centroids_ \[N, D\] of a floating dtype .*, got \[8\]"),
        (others * torch.nan, "4 of 4 centroids_ have NaN or infinity"),
        (None, "expected centroids_ as a torch tensor, .*, got NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            model.centroids_ = bad
    assert torch.equal(model.predict(points), expected.assignment_)
    with pytest.raises(AttributeError, match="no centroids_ before fit"):
        KMeans(4).centroids_  # noqa: B018 (the error is what is asked)


def test_pickled_and_copied() -> None:
    points = blobs(100).numpy()
    model = KMeans(4).fit(points)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(other.predict(points), model.assignment_)
        other.centroids_[:] = other.centroids_[::-1].copy()
        np.testing.assert_array_equal(other.predict(points), 3 - model.assignment_)


def test_parameters_are_kept_as_given() -> None:
    given = {"k": np.int64(3), "init": blobs(3), "weights": [1.0] * 50, "seed": np.int32(4), "tol": 0.0}
    model = KMeans(**given)
    params = model.get_params()
    assert all(params[name] is value for name, value in given.items())
    assert (params["metric"], params["memory"]) == ("euclidean", None) and len(params) == 11
    assert model.set_params(metric="cosine", init="random") is model and model.get_params()["init"] == "random"
    for bad, message in (
        ({"n_clusters": 3}, "expected parameters among k, init, .*, memory, got n_clusters"),
        ({"metric": "l1", "k": 9}, "expected metric to be one of"),
    ):
        with pytest.raises(InputError, match=message):
            model.set_params(**bad)
    assert (model.k, model.metric) == (3, "cosine")


def test_labels_are_no_weights() -> None:
    points, labels = blobs(100), torch.arange(100) % 2
    assert torch.equal(KMeans(4).fit(points, labels).centroids_, KMeans(4).fit(points).centroids_)
    weighted = KMeans(4).fit(points, labels, weights=labels)
    assert torch.equal(weighted.centroids_, KMeans(4, weights=labels).fit(points).centroids_)
    assert not torch.equal(weighted.centroids_, KMeans(4).fit(points).centroids_)


def test_a_step_of_scikit_learns_pipelines() -> None:
    base = pytest.importorskip("sklearn.base")
    pipeline, preprocessing = (pytest.importorskip(f"sklearn.{name}") for name in ("pipeline", "preprocessing"))
    points, labels = blobs(200).numpy(), np.arange(200) % 2
    scaled = preprocessing.StandardScaler().fit_transform(points)
    expected = KMeans(5, seed=2).fit(scaled)
    steps = pipeline.make_pipeline(preprocessing.StandardScaler(), KMeans(5, seed=2))
    for given in ((points, labels), (points,)):
        fitted = base.clone(steps).fit(*given)
        np.testing.assert_array_equal(fitted[-1].centroids_, expected.centroids_)
        np.testing.assert_array_equal(fitted.predict(points), expected.assignment_)
        np.testing.assert_array_equal(fitted.transform(points), expected.transform(scaled))
    weighted = steps.set_params(kmeans__k=3).fit(points, labels, kmeans__weights=labels)
    np.testing.assert_array_equal(weighted[-1].centroids_, KMeans(3, seed=2, weights=labels).fit(scaled).centroids_)
    assert "KMeans" in repr(steps) and "KMeans" in steps._repr_html_()
    again = base.clone(KMeans(5, init=points[:5], weights=labels, metric="cosine"))
    np.testing.assert_array_equal(again.get_params()["init"], points[:5])
    assert base.is_clusterer(again) and again.fit(points).k == 5
    with pytest.raises(Exception, match="not fitted"):
        base.clone(steps).predict(points)


def test_imports_no_scikit_learn() -> None:
    code = "import sys, diffprune, numpy as np; m = diffprune.KMeans(2).fit(np.eye(3)); m.set_params(**m.get_params())"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('sklearn' in sys.modules)"], capture_output=True)
    assert done.stdout.split() == [b"False"], done.stderr


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points = blobs(800, k=6, spread=0.6, seed=seed)
    init = points[torch.randperm(800, generator=torch.Generator().manual_seed(seed))[:9]]
    ours = KMeans(9, init=init, tol=0, max_iter=500).fit(points)
    theirs = cluster.KMeans(9, init=init.numpy(), n_init=1, tol=0, max_iter=500, algorithm="lloyd").fit(
        points.double().numpy()
    )
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-6)
    np.testing.assert_array_equal(ours.assignment_.numpy(), theirs.labels_)
