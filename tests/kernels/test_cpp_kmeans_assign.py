"""The C++ form of ``kmeans_assign``: each instruction set that this processor has, against float64.

``tests/kernels/test_kmeans_assign.py`` runs it through the op as well; here is what is its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffprune.kernels import cpp, kmeans_assign

if cpp.unavailable() is not None:
    pytest.skip(cpp.unavailable(), allow_module_level=True)

from diffprune.kernels.cpp.kmeans_assign import Search

VARIANTS = cpp.extension().variants()


def distances(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def check(points: Tensor, centroids: Tensor, variant: str) -> tuple[int, int]:
    """Exact labels and distances; returns how many pairs were compared in float32 and float64."""
    assignment, sqdistance, counts = Search(centroids, variant)(points)
    expected = distances(points, centroids)
    chosen = expected.gather(1, assignment.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.amin(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(sqdistance.double(), expected.amin(dim=1), rtol=2e-6, atol=1e-30)
    return counts


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 9, 31, 64, 100, 385])
def test_every_tail(variant: str, d: int, generator: torch.Generator) -> None:
    """Rows, centroids and dimensions that fill no block, no panel and no vector."""
    for n, k in [(1, 2), (2, 15), (5, 16), (33, 17), (97, 65), (600, 130), (513, 600)]:
        check(torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator), variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_codes_leave_few_candidates(variant: str, generator: torch.Generator) -> None:
    """Or the 8-bit products would not pay: on structureless data, the hardest, under 5% of the pairs."""
    points, centroids = torch.randn(2000, 256, generator=generator), torch.randn(500, 256, generator=generator)
    compared, exact = check(points, centroids, variant)
    assert len(points) <= compared < 0.05 * len(points) * len(centroids)
    assert exact < len(points)


@pytest.mark.parametrize("variant", VARIANTS)
def test_near_ties(variant: str, generator: torch.Generator) -> None:
    """Points in the middle of two centroids, up to what float32 can tell apart and beyond."""
    centroids = torch.randn(40, 64, generator=generator)
    left, right = (torch.randint(0, 40, (3000,), generator=generator) for _ in range(2))
    noise = torch.randn(3000, 64, generator=generator, dtype=torch.float64)
    for scale in (1e-2, 1e-4, 1e-6, 1e-8):
        middle = (centroids[left].double() + centroids[right]) / 2 + scale * noise
        _, exact = check(middle.float(), centroids, variant)
    assert exact > 100


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", ["centroids", "points"])
def test_only_one_side_is_rounded(variant: str, exact: str, generator: torch.Generator) -> None:
    """The codes of ±1 are exact, so all of the bound has to come from the other side. Near ties in every row."""
    signs = torch.randn(400, 64, generator=generator).sign()
    signs[200:] = -signs[:200]  # the median is in the middle of ±1
    signs[0], signs[200] = 1, -1
    values = signs[torch.randint(0, 400, (400,), generator=generator)] * 0.05 + torch.randn(
        400, 64, generator=generator
    )
    values[:, 0] = 4
    if exact == "centroids":
        check(values.repeat(8, 1) + 1e-3 * torch.randn(3200, 64, generator=generator), signs, variant)
    else:
        check(signs, values.repeat(3, 1) + 1e-2 * torch.randn(1200, 64, generator=generator), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copies", [3, 100, 129, 200, 1000])
def test_many_equal_centroids(variant: str, copies: int, generator: torch.Generator) -> None:
    """More candidates than a row has room for; the smallest index wins."""
    centroids = torch.randn(7, 12, generator=generator).repeat_interleave(copies, dim=0)
    points = torch.randn(200, 12, generator=generator)
    check(points, centroids, variant)
    assignment, _, _ = Search(centroids, variant)(points)
    assert (assignment % copies == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("noise", "size"), [(1e-5, 1), (0.07, 1e-3), (0.07, 1e3)])
@pytest.mark.parametrize("apart", [1e-3, 1e-6, 0])
def test_more_candidates_than_a_row_has_room_for(
    variant: str, noise: float, size: float, apart: float, generator: torch.Generator
) -> None:
    """One dimension takes up the codes, the others tell 1,300 centroids apart, in pairs that lie near each other. Some
    are compared in float32, and the best distance so far decides about most others; only near ties go to float64."""
    n, k, d = 400, 2600, 64
    points, centroids = (noise * torch.randn(rows, d, generator=generator) for rows in (n, k))
    centroids[k // 2 :] = centroids[: k // 2] + apart * noise * torch.randn(k // 2, d, generator=generator)
    points[:, 0] = torch.randn(n, generator=generator).sign()
    centroids[:, 0] = torch.randn(k, generator=generator).sign()
    shuffled = centroids[torch.randperm(k, generator=generator)]
    compared, exact = check(size * points, size * shuffled, variant)
    assert 300 * n < compared < 0.3 * n * k
    assert exact <= 3 * n


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_dimension_dwarfs_the_others(variant: str, generator: torch.Generator) -> None:
    """All codes but one are 0: the bound has to say that they know nothing."""
    points, centroids = torch.randn(500, 50, generator=generator), torch.randn(60, 50, generator=generator)
    points[:, 3] *= 1e5
    check(points, centroids, variant)
    centroids[:, 3] *= 1e5
    check(points, centroids, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_outlier_among_the_centroids(variant: str, generator: torch.Generator) -> None:
    """The scale is its; the others' codes are relative to their own largest entry and stay sharp."""
    points, centroids = torch.randn(500, 50, generator=generator), torch.randn(60, 50, generator=generator)
    centroids[7] = 1e6
    compared, _ = check(points, centroids, variant)
    assert compared < 20 * len(points)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e12, 1e25, 1e37])
def test_scales(variant: str, scale: float, generator: torch.Generator) -> None:
    """Also where squares overflow or vanish: the labels are those of float64."""
    points, centroids = (
        torch.randn(300, 20, generator=generator) * scale,
        torch.randn(40, 20, generator=generator) * scale,
    )
    assignment, _, _ = Search(centroids, variant)(points)
    assert torch.equal(assignment.long(), distances(points, centroids).argmin(dim=1))
    mixed = torch.cat([points, torch.randn(100, 20, generator=generator)])
    assignment, _, _ = Search(centroids, variant)(mixed)
    expected = distances(mixed, centroids)
    torch.testing.assert_close(
        expected.gather(1, assignment.long()[:, None])[:, 0], expected.amin(dim=1), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(variant: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Subnormal numbers, infinities and NaN included; N and D with a tail."""
    points = torch.randn(103, 37, generator=generator).to(dtype)
    points[0] = torch.finfo(dtype).smallest_normal / 4
    points[1], points[2, 5], points[3, 36] = 0, torch.inf, torch.nan
    centroids = torch.randn(29, 37, generator=generator)
    centroids[4] = 0
    assignment, sqdistance, _ = Search(centroids, variant)(points)
    whole, exact, _ = Search(centroids, variant)(points.float())
    assert torch.equal(assignment, whole)
    assert torch.equal(sqdistance[4:], exact[4:]) and torch.equal(sqdistance[:2], exact[:2])
    assert not sqdistance[2:4].isfinite().any()
    assert (assignment[:2] == 4).all()
    check(points[4:], centroids, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_finite_disturb_no_other(variant: str, generator: torch.Generator) -> None:
    points, centroids = torch.randn(500, 24, generator=generator), torch.randn(30, 24, generator=generator)
    clean = Search(centroids, variant)(points)
    bad = torch.zeros(500, dtype=torch.bool)
    bad[::7] = True
    points[bad, torch.randint(0, 24, (int(bad.sum()),), generator=generator)] = torch.nan
    points[7] = -torch.inf
    assignment, sqdistance, _ = Search(centroids, variant)(points)
    assert torch.equal(assignment[~bad], clean[0][~bad])
    assert torch.equal(sqdistance[~bad], clean[1][~bad])
    assert not sqdistance[bad].isfinite().any()
    assert ((assignment >= 0) & (assignment < 30)).all()


def test_threads_and_neighbours_change_nothing(generator: torch.Generator) -> None:
    points, centroids = torch.randn(5000, 48, generator=generator), torch.randn(300, 48, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kmeans_assign(points, centroids, impl="cpp")
        torch.set_num_threads(3)
        three = kmeans_assign(points, centroids, impl="cpp")
    finally:
        torch.set_num_threads(threads)
    rows = torch.randperm(5000, generator=generator)[:777]
    some = kmeans_assign(points[rows], centroids, impl="cpp")
    for a, b, c in zip(one, three, some, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[rows], c)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(variant: str, generator: torch.Generator) -> None:
    wide, centroids = torch.randn(100, 60, generator=generator), torch.randn(40, 20, generator=generator)
    for points in (
        wide[:, 10:30],
        wide[::3, :20],
        wide[:20].T[:, :20],
        wide[:1, :20].expand(9, 20),
        wide.flip(0)[:, :20],
    ):
        check(points, centroids, variant)


def test_instruction_sets_agree(generator: torch.Generator) -> None:
    points, centroids = torch.randn(2000, 77, generator=generator), torch.randn(301, 77, generator=generator)
    found = [Search(centroids, variant)(points)[0] for variant in VARIANTS]
    assert all(torch.equal(found[0], other) for other in found)


def test_others_tiles_are_left_alone(generator: torch.Generator) -> None:
    """Products of bfloat16 of PyTorch's run on the same tiles, set up otherwise, in this thread too."""
    a, points, centroids = (torch.randn(n, 80, generator=generator) for n in (70, 300, 40))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        before = a.bfloat16() @ a.bfloat16().T
        for variant in VARIANTS:
            check(points, centroids, variant)
            assert torch.equal(a.bfloat16() @ a.bfloat16().T, before)
    finally:
        torch.set_num_threads(threads)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="this processor does not run avx1024"):
        Search(torch.ones(1, 1), "avx1024")(torch.ones(1, 1))


def test_what_it_refuses() -> None:
    wide = torch.ones(1, 65537)
    with pytest.raises(NotImplementedError, match="cpp: needs D of at most 65536, got 65537"):
        kmeans_assign(wide, wide, impl="cpp")
    with pytest.raises(NotImplementedError, match=r"cpp: needs float16, bfloat16 or float32, got torch\.float64"):
        kmeans_assign(torch.ones(2, 2).double(), torch.ones(2, 2), impl="cpp")
    check(torch.randn(3, 65536), torch.randn(5, 65536), VARIANTS[0])
