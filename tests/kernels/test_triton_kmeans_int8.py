"""Triton's ``kmeans_assign`` with products of int8: the answer is as exact as by float16."""

from __future__ import annotations

import pytest
import torch
from test_triton_kmeans import brute, check, counted, normal
from triton_case import DEVICE

from diffprune.kernels import kmeans_assign
from diffprune.kernels.triton import kmeans_assign as assigning
from diffprune.kernels.triton import search

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of overflow and NaN


@pytest.fixture(autouse=True)
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigning, "FILTER", torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(9, 1, 130), (5, 2, 1), (19, 17, 33), (3, 40, 261)])
def test_odd_sizes(dtype: torch.dtype, n: int, k: int, d: int) -> None:
    check(normal(n, d, dtype=dtype), normal(k, d, seed=1))


def test_several_tiles() -> None:
    centroids = normal(300, 20, seed=1)
    check(centroids[torch.arange(131) * 2] + 0.01 * normal(131, 20), centroids)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e4, 1e18])
def test_any_size_of_numbers(scale: float) -> None:
    points, centroids = normal(40, 20) * scale, normal(9, 20, seed=1) * scale
    found, _ = kmeans_assign(points.to(DEVICE), centroids.to(DEVICE), impl="triton")
    assert torch.equal(found.cpu().long(), brute(points, centroids).argmin(dim=1))


def test_outliers_and_common_part() -> None:
    """A far centroid makes the steps of all coarse; a common part is taken off first."""
    points, centroids = normal(60, 40) + 500, normal(20, 40, seed=1) + 500
    centroids[7] += 1e4
    points[3] -= 1e5
    points[4, 5] = 3e38
    found, _ = kmeans_assign(points.to(DEVICE), centroids.to(DEVICE), impl="triton")
    expected = brute(points, centroids)
    chosen = expected.gather(1, found.cpu().long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.amin(dim=1), rtol=1e-13, atol=0)


def test_ties_and_duplicates() -> None:
    centroids = normal(30, 24)[torch.arange(60) % 30]
    points = centroids[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    found, sqdistance = kmeans_assign(points.to(DEVICE), centroids.to(DEVICE), impl="triton")
    assert torch.equal(found.cpu().long(), brute(points, centroids).argmin(dim=1))
    assert (found < 30).all() and (sqdistance == 0).all()


def test_not_finite() -> None:
    points = normal(12, 9)
    points[2, 3], points[5] = torch.nan, torch.inf
    found, sqdistance = kmeans_assign(points.to(DEVICE), normal(7, 9, seed=1).to(DEVICE), impl="triton")
    finite = torch.ones(12, dtype=torch.bool)
    finite[[2, 5]] = False
    assert torch.equal(sqdistance.isfinite().cpu(), finite) and ((found >= 0) & (found < 7)).all()
    assert torch.equal(found.cpu()[finite].long(), brute(points, normal(7, 9, seed=1)).argmin(dim=1)[finite])


def test_products_decide_rows_in_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What int8 is for: most points are nearer to one centroid by more than is lost."""
    listed = counted(monkeypatch, "_search_listed", 5)
    centroids = normal(40, 256, seed=1)
    points = centroids[torch.arange(120) % 40] + 0.7 * normal(120, 256, seed=2)
    check(points, centroids)
    assert listed == [0]


def test_the_bound_is_what_makes_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near ties, which products of int8 alone would decide wrongly."""
    pair = normal(2, 64)
    points = pair.mean(dim=0) + 1e-3 * normal(80, 64, seed=1)
    rounded = search.round_both(points.to(DEVICE), pair.to(DEVICE), torch.int8)
    assert rounded.rows.dtype == rounded.columns.dtype == torch.int8
    scale = rounded.scale[:, None] * rounded.limits[5] * rounded.limits[0]
    v = (rounded.rows.double() @ rounded.columns.double().T) * scale - rounded.offset
    nearest = brute(points, pair).argmin(dim=1)
    assert (v.argmax(dim=1).cpu() != nearest).sum() > 5
    check(points, pair)


def test_rounding() -> None:
    """x − μ is scale · x̂ and C is step · ĉ, up to half a step, and no step is larger than it has to be."""
    points, centroids = normal(30, 50) * torch.logspace(-5, 5, 30)[:, None], normal(20, 50, seed=1)
    rounded = search.round_both(points.to(DEVICE), centroids.to(DEVICE), torch.int8)
    x = points.double() - rounded.centre.double().cpu()
    scale, step = rounded.scale.double().cpu()[:, None], rounded.limits[5].double().cpu()
    assert ((x - scale * rounded.rows.double().cpu()).abs() <= 0.5001 * scale).all()
    assert (scale[:, 0] <= x.abs().amax(dim=1) / 126).all()
    c = (centroids.double() - rounded.centre.double().cpu()) * rounded.limits[0].double().cpu()
    assert ((c - step * rounded.columns.double().cpu()).abs() <= 0.5 * step).all()
    assert c.abs().amax() / 127 <= step <= c.abs().amax() / 125


def test_too_many_dimensions() -> None:
    wide = torch.ones(1, 2**17 + 1, device=DEVICE)
    with pytest.raises(NotImplementedError, match="triton: needs D of at most 131072 with FILTER int8, got 131073"):
        kmeans_assign(wide, wide, impl="triton")
