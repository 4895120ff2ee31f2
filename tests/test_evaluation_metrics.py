"""Every metric against an independent float64 computation: scipy's matrix root, N×N brute force, numpy eigenvalues."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.linalg
import torch

from diffprune.errors import InputError
from diffprune.evaluation import (
    Gaussian,
    class_balance,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
    knn_classes,
    memorization,
    precision_recall,
    same_seed_similarity,
    vendi_score,
    vendi_scores,
)
from diffprune.evaluation import manifold as manifold_module


def gaussian_rows(n: int, d: int, seed: int, *, shift: float = 0.0, unit: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 0.3 + shift
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return torch.from_numpy(x.astype(np.float16).astype(np.float32))


def brute_distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def brute_own_radii(x: torch.Tensor, k: int) -> np.ndarray:
    distances = brute_distances(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, k - 1]


# --- Fréchet distance ------------------------------------------------------------------------------------------


def scipy_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m", "d"), [(301, 207, 17), (64, 99, 33), (9001, 8500, 5)])
def test_frechet_distance_equals_the_matrix_square_root(n, m, d):
    a, b = gaussian_rows(n, d, 1), gaussian_rows(m, d, 2, shift=0.2)
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-9)


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form():
    # Two points ±s per axis have variance 2s² (unbiased, N=2 in 1-D): (μ₁−μ₂)² + (σ₁−σ₂)².
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [8.0]])
    sigma_a, sigma_b = math.sqrt(2), math.sqrt(18)
    assert frechet_distance(a, b) == pytest.approx(25 + (sigma_a - sigma_b) ** 2, rel=1e-12)


def test_frechet_distance_with_fewer_rows_than_dimensions():
    a, b = gaussian_rows(12, 40, 3), gaussian_rows(21, 40, 4, shift=0.1)
    x, y = a.double().numpy(), b.double().numpy()
    # tr((Σ₁Σ₂)^½) is the nuclear norm of X̃₁X̃₂ᵀ, which needs no root of a singular matrix.
    x0, y0 = (x - x.mean(0)) / math.sqrt(11), (y - y.mean(0)) / math.sqrt(20)
    nuclear = np.linalg.svd(x0 @ y0.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (x0**2).sum() + (y0**2).sum() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_to_a_shifted_copy_the_squared_shift():
    a = gaussian_rows(200, 9, 5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(9 * 0.25, rel=1e-5)


def test_a_gaussian_folded_from_blocks_is_numpys():
    x = gaussian_rows(501, 7, 30, shift=3.0)
    whole, parts = Gaussian.of(x), Gaussian.of([x[:1], x[1:200], x[200:200], x[200:]])
    for gaussian in (whole, parts):
        assert gaussian.count == 501
        assert gaussian.mean.numpy() == pytest.approx(x.double().numpy().mean(0), rel=1e-12)
        assert gaussian.covariance.numpy() == pytest.approx(np.cov(x.double().numpy(), rowvar=False), rel=1e-11)
    assert torch.equal(Gaussian.of(x).covariance, whole.covariance)
    assert frechet_distance(x, parts) == pytest.approx(0, abs=1e-9)
    far = x.double() + 1e6  # a sum of squares would have no digits left
    assert Gaussian.of([far[:100], far[100:]]).covariance.numpy() == pytest.approx(whole.covariance.numpy(), rel=1e-6)
    with pytest.raises(InputError, match="at least 2 rows"):
        _ = Gaussian.of(x[:1]).covariance
    with pytest.raises(InputError, match="no block"):
        Gaussian.of([])


def test_frechet_distance_at_infinity_meets_the_true_one():
    """Samples of the reference's own Gaussian: N of them overstate the distance, 0, and the line does not."""
    generator, d = torch.Generator().manual_seed(0), 40
    reference = Gaussian.of(torch.randn(200_000, d, generator=generator))
    samples = torch.randn(3000, d, generator=generator)
    found = frechet_distance_infinity(samples, reference, seed=3)
    assert found["sizes"][0] == 300 and found["sizes"][-1] == 3000 and len(found["sizes"]) == 15
    assert found["distances"][-1] == pytest.approx(frechet_distance(samples, reference), rel=1e-9)
    inverse = np.array([1 / size for size in found["sizes"]])
    slope, intercept = np.polyfit(inverse, found["distances"], 1)
    assert found["distance"] == pytest.approx(intercept, rel=1e-6)
    assert found["slope"] == pytest.approx(slope, rel=1e-9)
    assert abs(found["distance"]) < 0.03 < 0.1 < found["distances"][-1] < 0.2 < 1 < found["distances"][0]
    assert frechet_distance_infinity(samples, reference, seed=3) == found
    assert frechet_distance_infinity(samples, reference, seed=4)["distances"][0] != found["distances"][0]


def test_frechet_distance_at_infinity_refuses_too_few_samples():
    x = gaussian_rows(50, 30, 31)
    with pytest.raises(InputError, match="at least 62 samples for 30 dimensions, got 50"):
        frechet_distance_infinity(x, x)
    with pytest.raises(InputError, match="sizes from 2 to below the 50 samples, got 15 points from 50"):
        frechet_distance_infinity(x, x, smallest=50)


# --- kernel distance -------------------------------------------------------------------------------------------


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 4 of arXiv 1801.01401, pair by pair."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kernel_distance_of_one_block_equals_the_loop():
    x, y = gaussian_rows(21, 6, 32), gaussian_rows(21, 6, 33, shift=0.4)
    found = kernel_distance(x, y)
    assert (found["blocks"], found["block_size"], found["std"]) == (1, 21, 0)
    assert found["mean"] == pytest.approx(loop_mmd(x.double().numpy(), y.double().numpy()), rel=1e-11)


def test_kernel_distance_averages_blocks_without_repetition(monkeypatch):
    x, y = gaussian_rows(40, 5, 34), gaussian_rows(33, 5, 35, shift=0.5)
    drawn = []
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(draw(n, **options)) or drawn[-1])
    found = kernel_distance(x, y, blocks=4, block_size=10, seed=1)
    parts = [
        loop_mmd(x[drawn[2 * i][:10]].double().numpy(), y[drawn[2 * i + 1][:10]].double().numpy()) for i in range(4)
    ]
    assert found["mean"] == pytest.approx(np.mean(parts)) and found["std"] == pytest.approx(np.std(parts))
    assert [len(order) for order in drawn] == [40, 33] * 4 and len(set(drawn[0].tolist())) == 40
    assert kernel_distance(x, y, blocks=4, block_size=10, seed=1) == found
    assert kernel_distance(x, y, blocks=4, block_size=10, seed=2)["mean"] != found["mean"]


def test_kernel_distance_is_unbiased():
    """Halves of one set differ by nothing on average: the mean is far nearer to 0 than the spread."""
    generator = torch.Generator().manual_seed(5)
    values = [kernel_distance(*torch.randn(2, 30, 8, generator=generator))["mean"] for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200) and min(values) < 0 < max(values)


# --- precision, recall, density, coverage ----------------------------------------------------------------------


def brute_precision_recall(a: torch.Tensor, b: torch.Tensor, k: int) -> dict[str, float]:
    cross = brute_distances(a, b)  # [samples, reference]
    in_reference = cross <= brute_own_radii(b, k)[None, :]
    in_samples = cross <= brute_own_radii(a, k)[:, None]
    precision, recall = in_reference.any(1).mean(), in_samples.any(0).mean()
    return {
        "precision": precision,
        "recall": recall,
        "f_score": 2 / (1 / precision + 1 / recall) if precision and recall else 0.0,
        "density": in_reference.sum() / (k * len(a)),
        "coverage": in_reference.any(0).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "shift", "unit"), [(120, 77, 0.6, False), (53, 201, 0.3, True)])
def test_precision_recall_equals_brute_force(n, m, shift, unit, k, monkeypatch):
    monkeypatch.setattr(manifold_module, "TILE", 7 * m)  # several tiles, the last one short
    a, b = gaussian_rows(n, 4, 6, unit=unit), gaussian_rows(m, 4, 7, shift=shift, unit=unit)
    found, expected = precision_recall(a, b, k), brute_precision_recall(a, b, k)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1  # the case tells something


def test_precision_is_about_samples_and_recall_about_the_reference():
    reference = torch.cat([gaussian_rows(100, 3, 8), gaussian_rows(100, 3, 8) + 50])
    samples = gaussian_rows(100, 3, 8)  # right, but only half of the modes
    found = precision_recall(samples, reference)
    assert found["precision"] == 1 and found["recall"] == 0.5 and found["coverage"] == pytest.approx(0.5)


def test_precision_recall_balls_are_closed_and_duplicates_have_radius_zero():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert precision_recall(line + 1, line, k=1)["precision"] == 1  # 4 is at distance 1 of 3, whose radius is 1
    point = torch.full((5, 2), 0.5)
    assert precision_recall(point, point, k=3) == {
        "precision": 1,
        "recall": 1,
        "f_score": 1,
        "density": pytest.approx(5 / 3),
        "coverage": 1,
    }
    assert precision_recall(point, point + 1, k=3)["f_score"] == 0


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_at_the_edge_of_a_ball_are_decided_exactly(scale, dtype, monkeypatch):
    """A lattice far from the origin: distances tie with radii everywhere, and float32 products cannot tell."""
    monkeypatch.setattr(manifold_module, "TILE", 50)
    rng = np.random.default_rng(36)
    lattice = torch.from_numpy(rng.integers(0, 4, (150, 3)) * 1.0) * scale + 64 * scale
    a, b = lattice[:70].to(dtype), lattice[70:].to(dtype)
    found = precision_recall(a, b, 2)
    assert found == pytest.approx(brute_precision_recall(a, b, 2), abs=1e-12)
    assert found["precision"] > 0.1 and found["density"] > 0


@pytest.mark.parametrize("exponent", [-270, -215, 240, 270])
def test_frechet_distance_of_any_magnitude_is_right_or_refused(exponent):
    """It takes fourth powers, which vanish long before squares do."""
    a, b = gaussian_rows(60, 4, 6).double(), gaussian_rows(50, 4, 7, shift=0.6).double()
    scale = 2.0**exponent
    if abs(exponent) == 270:
        with pytest.raises(InputError, match="whose power of 4 float64 has, got"):
            frechet_distance(a * scale, b * scale)
    else:
        assert frechet_distance(a * scale, b * scale) / scale / scale == pytest.approx(frechet_distance(a, b))


@pytest.mark.parametrize(
    ("dtype", "exponents"), [(torch.float32, (-120, -60, 60, 66, 100, 120)), (torch.float64, (-430, -200, 300, 480))]
)
def test_precision_recall_of_any_magnitude(dtype, exponents):
    """Beyond 2^63 squares leave float32: everything seemed to lie in every ball."""
    a, b = gaussian_rows(120, 4, 6).to(dtype), gaussian_rows(77, 4, 7, shift=0.6).to(dtype)
    expected = precision_recall(a, b)
    for exponent in exponents:
        assert precision_recall(a * 2.0**exponent, b * 2.0**exponent) == expected


def test_float64_decides_few_pairs_and_none_of_them_alone(monkeypatch):
    """With the bound made wide all pairs are decided in float64, with the same result; as it is, hardly any."""
    a, b = gaussian_rows(300, 64, 37, unit=True), gaussian_rows(280, 64, 38, unit=True)
    pairs, exact = [], manifold_module.pair_sqdistances
    monkeypatch.setattr(
        manifold_module,
        "pair_sqdistances",
        lambda x, y, row, column: pairs.append(len(row)) or exact(x, y, row, column),
    )
    narrow = precision_recall(a, b, 3)
    few = sum(pairs)
    pairs.clear()
    split = manifold_module._split
    monkeypatch.setattr(manifold_module, "_split", lambda d, other, *rest: split(d, other + 1e9, *rest))
    assert precision_recall(a, b, 3) == narrow and sum(pairs) > 300 * 280
    assert few < 300 * 280 / 500


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_equals_prdc(k):
    """prdc's balls are open and ours closed: equal where no distance is a radius, as in random float64 features."""
    prdc = pytest.importorskip("prdc")
    rng = np.random.default_rng(39)
    real, fake = rng.normal(size=(160, 7)), rng.normal(size=(140, 7)) * 0.8 + 0.3
    theirs = prdc.compute_prdc(real_features=real, fake_features=fake, nearest_k=k)
    ours = precision_recall(torch.from_numpy(fake), torch.from_numpy(real), k)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Real features: 8×8 pixels of digits, whole numbers, so that distances tie."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = torch.from_numpy(datasets.load_digits().data)
    return pixels[:700], pixels[700:1500]


def test_real_features_against_prdc_scipy_and_vendi_score(digits):
    fake, real = digits
    assert precision_recall(fake, real, 3) == pytest.approx(brute_precision_recall(fake, real, 3), abs=1e-12)
    rng = np.random.default_rng(49)
    fake, real = (x + torch.from_numpy(rng.normal(size=x.shape) * 0.01) for x in digits)  # no ties, full rank
    assert frechet_distance(fake, real) == pytest.approx(scipy_frechet(fake, real), rel=1e-6)
    prdc = pytest.importorskip("prdc")
    theirs = prdc.compute_prdc(real_features=real.numpy(), fake_features=fake.numpy(), nearest_k=3)
    ours = precision_recall(fake, real, 3)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
    vendi = pytest.importorskip("vendi_score.vendi")
    assert vendi_score(real) == pytest.approx(vendi.score_X(real.numpy()), rel=1e-9)
    for q in (0.5, 2.0):
        assert vendi_score(real, q) == pytest.approx(vendi.score_dual(real.numpy(), q=q), rel=1e-6)


# --- Vendi score -----------------------------------------------------------------------------------------------


def numpy_vendi(x: torch.Tensor, q: float) -> float:
    unit = x.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    p = p[p > 1e-13]
    if q == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if q == math.inf:
        return float(1 / p.max())
    return float((p**q).sum() ** (1 / (1 - q)))


@pytest.mark.parametrize("q", [0, 0.5, 1, 2, 7.5, math.inf])
@pytest.mark.parametrize(("n", "d"), [(23, 60), (60, 23), (31, 31)])
def test_vendi_score_equals_numpy_on_the_full_kernel(n, d, q):
    x = gaussian_rows(n, d, 9, shift=0.1)
    assert vendi_score(x, q) == pytest.approx(numpy_vendi(x, q), rel=1e-9)


@pytest.mark.parametrize("q", [0, 0.5, 1, 3, math.inf])
def test_vendi_score_counts_equally_frequent_orthogonal_images(q):
    x = torch.eye(6)[torch.arange(30) % 5] * torch.arange(1, 31)[:, None]  # five images, of any length
    assert vendi_score(x, q) == pytest.approx(5, rel=1e-9)
    assert vendi_score(torch.ones(7, 3), q) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 7), (7, 50)])
def test_vendi_score_decomposes_the_smaller_of_the_two_kernels(n, d, monkeypatch):
    seen = []
    solve = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda kernel: seen.append(tuple(kernel.shape)) or solve(kernel))
    vendi_score(gaussian_rows(n, d, 24))
    assert seen == [(7, 7)]


@pytest.mark.parametrize("q", [0.5, 1, 2, math.inf])
def test_vendi_score_equals_the_vendi_score_package(q):
    vendi = pytest.importorskip("vendi_score.vendi")
    x = gaussian_rows(50, 20, 40).double().numpy()
    theirs = vendi.score_dual(x, q="inf" if q == math.inf else q)
    assert vendi_score(torch.from_numpy(x), q) == pytest.approx(theirs, rel=1e-9)


def test_vendi_scores_of_blocks_and_of_large_orders():
    x, orders = gaussian_rows(90, 11, 41), [0, 0.5, 1, 2, math.inf]
    blocks = vendi_scores([x[:40], x[40:]], orders)
    assert blocks == pytest.approx([vendi_score(x, q) for q in orders], rel=1e-9)
    assert vendi_score(x, 5000) == pytest.approx(vendi_score(x, math.inf), rel=0.01)  # eigenvalues^5000 are all 0
    with pytest.raises(InputError, match="row 61 is zero"):
        vendi_scores([x[:60], torch.cat([x[60:61], torch.zeros(1, 11)])], [1])
    with pytest.raises(InputError, match="at least 1 row, got 0"):
        vendi_scores([], [1])


def test_vendi_score_near_order_one_is_continuous():
    x = gaussian_rows(40, 12, 10)
    assert vendi_score(x, 1 + 1e-6) == pytest.approx(vendi_score(x), rel=1e-5)


# --- memorization ----------------------------------------------------------------------------------------------


def test_memorization_against_held_out_images():
    training, held_out, samples = (gaussian_rows(n, 5, seed) for n, seed in ((90, 11), (71, 12), (83, 13)))
    found = memorization(samples, training, held_out)
    nearest = brute_distances(samples, training).min(1)
    baseline = brute_distances(held_out, training).min(1)
    assert found["baseline"] == "held-out" and found["baseline_count"] == 71
    assert found["median_distance"] == pytest.approx(np.median(nearest), rel=1e-12)
    assert found["baseline_p1"] == pytest.approx(np.quantile(baseline, 0.01), rel=1e-12)
    assert found["median_ratio"] == pytest.approx(np.median(nearest) / np.median(baseline), rel=1e-12)
    assert found["share_below_p1"] == (nearest < np.quantile(baseline, 0.01)).mean()
    row, training_row, distance = found["closest_pairs"][0]
    assert row == nearest.argmin() and training_row == brute_distances(samples, training)[row].argmin()
    assert distance == pytest.approx(nearest.min(), rel=1e-12)


def test_memorization_without_held_out_images_leaves_each_training_image_out():
    training, samples = gaussian_rows(64, 5, 14), gaussian_rows(50, 5, 15)
    found = memorization(samples, training, training[:0], closest=3)
    baseline = brute_own_radii(training, 1)
    assert found["baseline"] == "leave-one-out" and len(found["closest_pairs"]) == 3
    assert found["baseline_median"] == pytest.approx(np.median(baseline), rel=1e-12)


def test_memorization_sees_copies():
    training, held_out = gaussian_rows(80, 6, 16), gaussian_rows(80, 6, 17)
    copied = memorization(training[:40], training, held_out)
    assert copied["share_below_p1"] == 1 and copied["median_ratio"] == 0
    mixed = memorization(torch.cat([training[:10], gaussian_rows(30, 6, 18) + 9]), training, held_out)
    assert mixed["share_below_p1"] == 0.25 and mixed["median_ratio"] > 1
    same = torch.ones(4, 2)
    assert memorization(same, same)["median_ratio"] is None  # 0/0 is not a ratio


def test_a_baseline_with_copies_cannot_say_what_is_nearer():
    training, new = gaussian_rows(200, 6, 16), gaussian_rows(198, 6, 17)
    held_out = torch.cat([training[:2], new])
    one_percent = memorization(training[:40], training, torch.cat([training[:3], new]))
    assert one_percent["baseline_p1"] == 0 and one_percent["share_below_p1"] is None
    assert one_percent["median_ratio"] == 0
    fewer = memorization(training[:40], training, torch.cat([training[:1], held_out[2:]]))
    assert fewer["baseline_p1"] > 0 and fewer["share_below_p1"] == 1


def test_nearest_of_blocks_is_the_nearest_of_all(monkeypatch):
    from diffprune.evaluation import neighbours

    x = torch.from_numpy(np.random.default_rng(42).integers(0, 3, (97, 3)) * 1.0).float()  # full of ties
    queries = torch.from_numpy(np.random.default_rng(43).integers(0, 3, (40, 3)) * 1.0).float()
    all_distances, own_distances = brute_distances(queries, x), brute_distances(x, x)
    np.fill_diagonal(own_distances, np.inf)
    for rows in (1, 30, 1000):
        monkeypatch.setattr(neighbours, "BLOCK_ROWS", rows)
        blocks = list(x.split(13))
        squared, index = neighbours.nearest_in_blocks(queries, blocks)
        assert np.array_equal(squared.sqrt().numpy(), all_distances.min(1))
        assert np.array_equal(index.numpy(), all_distances.argmin(1))
        some = torch.tensor([3, 50, 96])
        squared, index = neighbours.nearest_in_blocks(x[some], blocks, own=some)
        assert np.array_equal(squared.sqrt().numpy(), own_distances[some].min(1))
        assert np.array_equal(index.numpy(), own_distances[some].argmin(1))
    alone, index = neighbours.nearest_in_blocks(x[:1], [x[:1]], own=torch.tensor([0]))
    assert alone.tolist() == [math.inf]


def test_memorization_of_blocks_with_a_baseline_of_some():
    training, samples = gaussian_rows(80, 4, 44), gaussian_rows(30, 4, 45)
    some = torch.tensor([2, 30, 31, 79])
    found = memorization(samples, list(training.split(17)), left_out=(some, training[some]))
    assert found["baseline_count"] == 4 and found["baseline"] == "leave-one-out"
    assert found["baseline_median"] == pytest.approx(np.median(brute_own_radii(training, 1)[some]), rel=1e-12)
    whole = memorization(samples, training)
    for name in ("median_distance", "closest_pairs"):
        assert found[name] == whole[name]


# --- same seed -------------------------------------------------------------------------------------------------


def test_same_seed_similarity_equals_the_loop():
    x, y = gaussian_rows(23, 5, 46), gaussian_rows(23, 5, 46) + 0.1 * gaussian_rows(23, 5, 47)
    labels = torch.tensor([i % 4 if i < 20 else 100 + i for i in range(23)])
    a, b = (rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True) for rows in (x, y))
    cosines, eye = a @ b.T, np.eye(23, dtype=bool)
    alike = (labels[:, None] == labels).numpy() & ~eye
    found = same_seed_similarity(x, y, labels)
    assert found["cosine"] == pytest.approx(np.diag(cosines).mean())
    assert found["cosine_p5"] == pytest.approx(np.quantile(np.diag(cosines), 0.05))
    assert found["cosine_other"] == pytest.approx(cosines[~eye].mean())
    assert found["cosine_same_label"] == pytest.approx(cosines[alike].mean())
    baseline = cosines[alike].mean()
    assert found["gain"] == pytest.approx((np.diag(cosines).mean() - baseline) / (1 - baseline))
    assert found["twins"] == (cosines.argmax(1) == np.arange(23)).mean() and 0.3 < found["twins"] < 1
    without = same_seed_similarity(x, y)
    assert without["cosine_same_label"] is None and without["cosine"] == found["cosine"]
    assert without["gain"] == pytest.approx(
        (np.diag(cosines).mean() - cosines[~eye].mean()) / (1 - cosines[~eye].mean())
    )


def test_same_seed_similarity_of_equal_and_of_unrelated_images():
    x = gaussian_rows(400, 30, 48)
    same = same_seed_similarity(x, x * 3)
    assert same["cosine"] == pytest.approx(1) and same["gain"] == pytest.approx(1) and same["twins"] == 1
    other = same_seed_similarity(x, x[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert abs(other["gain"]) < 0.1 and other["twins"] < 0.05
    with pytest.raises(InputError, match="others: row 1 is zero"):
        same_seed_similarity(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match=r"expected samples and others \[N, D\]"):
        same_seed_similarity(torch.ones(3, 2), torch.ones(2, 2))


# --- classes ---------------------------------------------------------------------------------------------------


def brute_vote(query: np.ndarray, points: np.ndarray, labels: np.ndarray, k: int) -> int:
    order = np.argsort(((points - query) ** 2).sum(1), kind="stable")[:k]
    counts = Counter(labels[order].tolist())
    return next(label for label in labels[order].tolist() if counts[label] == max(counts.values()))


@pytest.mark.parametrize("k", [1, 4, 5])
def test_knn_classes_equal_brute_force(k):
    rng = np.random.default_rng(19)
    points, queries = gaussian_rows(101, 3, 20), gaussian_rows(57, 3, 21)
    labels = torch.from_numpy(rng.integers(0, 4, 101)) * 10 + 3
    found = knn_classes(queries, points, labels, k=k)
    expected = [brute_vote(q, points.double().numpy(), labels.numpy(), k) for q in queries.double().numpy()]
    assert found.tolist() == expected
    own = knn_classes(points, points, labels, k=k, exclude_self=True)
    others = [np.delete(np.arange(101), i) for i in range(101)]
    data = points.double().numpy()
    assert own.tolist() == [brute_vote(data[i], data[rest], labels.numpy()[rest], k) for i, rest in enumerate(others)]


def test_tied_votes_go_to_the_nearest():
    points, labels = torch.tensor([[1.0], [2.0], [-3.0], [-4.0], [9.0]]), torch.tensor([7, 2, 2, 7, 1])
    assert knn_classes(torch.zeros(1, 1), points, labels, k=4).tolist() == [7]
    assert knn_classes(torch.full((1, 1), 2.1), points, labels, k=4).tolist() == [2]
    assert knn_classes(torch.zeros(1, 1), points, labels, k=99).tolist() == [7]


def test_class_balance_of_separated_classes():
    centres = torch.tensor([[0.0, 0], [100, 0], [0, 100]])
    counts = [40, 40, 20]
    labels = torch.repeat_interleave(torch.tensor([0, 4, 9]), torch.tensor(counts))
    reference = torch.repeat_interleave(centres, torch.tensor(counts), dim=0) + gaussian_rows(100, 2, 22)
    asked = torch.tensor([0] * 6 + [4] * 2)
    samples = centres[[0] * 7 + [1]] + gaussian_rows(8, 2, 23)  # one of the fours came out as a zero
    found = class_balance(samples, reference, labels, sample_labels=asked)
    assert found["shares"] == {"0": 7 / 8, "4": 1 / 8, "9": 0}
    assert found["reference_shares"] == {"0": 0.4, "4": 0.4, "9": 0.2}
    p = np.array([7 / 8, 1 / 8])
    assert found["kl_uniform"] == pytest.approx((p * np.log(p * 3)).sum())
    assert found["kl_reference"] == pytest.approx((p * np.log(p / 0.4)).sum())
    assert found["label_agreement"] == 7 / 8 and found["reference_accuracy"] == 1
    assert class_balance(samples, reference, labels)["label_agreement"] is None


def test_reference_accuracy_leaves_each_image_out():
    reference = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    found = class_balance(reference, reference, torch.tensor([0, 1, 0, 1]), k=1)
    assert found["reference_accuracy"] == 0  # each one's nearest other is of the other class
    assert found["kl_reference"] == 0  # while the samples, being the reference, find themselves


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [
        lambda x: frechet_distance(x, torch.ones(5, 3)),
        lambda x: precision_recall(x, torch.ones(5, 3)),
        lambda x: vendi_score(x),
        lambda x: memorization(x, torch.ones(5, 3)),
        lambda x: class_balance(x, torch.ones(5, 3), torch.arange(5)),
        lambda x: frechet_distance_infinity(x, torch.ones(5, 3)),
        lambda x: kernel_distance(x, torch.ones(5, 3)),
        lambda x: same_seed_similarity(x, torch.ones(6, 3)),
    ],
    ids=["frechet", "precision_recall", "vendi", "memorization", "classes", "infinity", "kernel", "same_seed"],
)
def test_metrics_refuse_nan_integers_and_wrong_shapes(metric):
    nan = torch.ones(6, 3)
    nan[4, 1] = float("nan")
    with pytest.raises(InputError, match="row 4 has NaN"):
        metric(nan)
    with pytest.raises(InputError, match=r"\[N, D\]"):
        metric(torch.ones(6, 3, 2))
    with pytest.raises(InputError, match="floating-point"):
        metric(torch.ones(6, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="at least"):
        metric(torch.ones(0, 3))
    with pytest.raises(InputError, match=r"expected a torch tensor \[N, D\], got ndarray; torch.as_tensor makes one"):
        metric(np.ones((6, 3)))
    with pytest.raises(InputError, match=r"a largest absolute value from .* to .*, got 1e\+200; multiply by"):
        metric(torch.full((6, 3), 1e200, dtype=torch.float64))


def test_metrics_refuse_what_they_cannot_compute():
    vanishing = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 2)) * 1e-200)
    for metric in (precision_recall, frechet_distance, kernel_distance, memorization):
        with pytest.raises(
            InputError, match=r"samples( and reference)?: expected a largest absolute value from .* got"
        ):
            metric(vanishing, vanishing)
    for call in (
        lambda x: frechet_distance(torch.ones(5, 3), x),
        lambda x: Gaussian.of(x),
        lambda x: memorization(torch.ones(5, 3), x, torch.ones(5, 3)),
        lambda x: memorization(torch.ones(5, 3), [x], torch.ones(5, 3)),
    ):
        with pytest.raises(InputError, match=r"expected a torch tensor \[N, D\], got ndarray"):
            call(np.ones((5, 3)))
    with pytest.raises(InputError, match="one dimension"):
        frechet_distance(torch.ones(5, 3), torch.ones(5, 4))
    with pytest.raises(InputError, match="one dimension, got 3 and 4"):
        frechet_distance(torch.ones(5, 3), Gaussian.of(torch.ones(5, 4)))
    with pytest.raises(InputError, match="at least 4 rows, got 3"):
        precision_recall(torch.ones(3, 2), torch.ones(9, 2), k=3)
    with pytest.raises(InputError, match="blocks >= 1 and block_size >= 2, got 0 and 1000"):
        kernel_distance(torch.ones(3, 2), torch.ones(9, 2), blocks=0)
    with pytest.raises(InputError, match="row 1 is zero"):
        vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="q >= 0"):
        vendi_score(torch.ones(2, 2), q=-1)
    with pytest.raises(InputError, match=r"reference_labels: expected \[5\]"):
        class_balance(torch.ones(5, 2), torch.ones(5, 2), torch.arange(4))
