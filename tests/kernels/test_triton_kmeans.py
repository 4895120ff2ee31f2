"""Triton's ``kmeans_assign`` and ``kmeans_update`` against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import kmeans_assign, kmeans_update
from diffprune.kernels.triton import gpu, search, segments
from diffprune.kernels.triton import kmeans_assign as assigning
from diffprune.kernels.triton.search import tolerance
from diffprune.kernels.triton.tiles import MAX_ROWS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of overflow and NaN


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute(points: Tensor, centroids: Tensor) -> Tensor:
    """[N, K] float64 squared distances."""
    return (points.double()[:, None] - centroids.double()).square().sum(dim=2)


def check(points: Tensor, centroids: Tensor) -> None:
    assignment, sqdistance = launch(kmeans_assign, points, centroids)
    assert (assignment.dtype, sqdistance.dtype) == (torch.int32, torch.float32)
    assert assignment.shape == sqdistance.shape == (len(points),)
    assert ((assignment >= 0) & (assignment < len(centroids))).all()
    expected = brute(points, centroids)
    chosen = expected.gather(1, assignment.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.amin(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(sqdistance, chosen.float(), rtol=2e-6, atol=1e-30)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call, how many rows the products did not decide."""
    return counted(monkeypatch, "_search_listed", 5)


@pytest.fixture
def compared_with_all(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call, how many rows were compared with every centroid in float64."""
    return counted(monkeypatch, "_search_all", 3)


def counted(monkeypatch: pytest.MonkeyPatch, function: str, place: int) -> list[int]:
    """What the argument at that place says in each call."""
    counts, original = [], getattr(assigning, function)

    def counting(*arguments: Tensor) -> object:
        counts.append(int(arguments[place][0]))
        return original(*arguments)

    monkeypatch.setattr(assigning, function, counting)
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (9, 1, 130), (5, 2, 1), (19, 17, 33), (3, 40, 261)])
def test_assign_odd_sizes(dtype: torch.dtype, n: int, k: int, d: int) -> None:
    check(normal(n, d, dtype=dtype), normal(k, d, seed=1))


def test_assign_several_tiles() -> None:
    check(normal(131, 70), normal(300, 70, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_assign_strided(dtype: torch.dtype) -> None:
    """Rows apart; and columns apart, which are copied."""
    points, centroids = normal(20, 48, dtype=dtype), normal(6, 48, seed=1)
    check(points[::2, 3:40], centroids[::2, 5:42])
    check(points[:, ::2], centroids[:, ::2])


def test_assign_ties_go_to_the_smallest_index(listed: list[int]) -> None:
    centroids = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [9.0, 0.0]])
    assignment, sqdistance = launch(kmeans_assign, points, centroids)
    assert assignment.tolist() == [1, 2, 0, 0, 0]
    assert sqdistance.tolist() == [1, 0, 1, 0, 36]
    assert listed == [3]  # ties of three, of two in one pair of columns, of four


@pytest.mark.parametrize("distance", [2.0, 8.0])
def test_assign_ties_of_two_apart(distance: float) -> None:
    """Nearer than the centre and farther: the tags in the bits of v put the smaller index first, or last."""
    around = 5 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    centroids = torch.cat([around, around])
    centroids[[1, 6]] = torch.tensor([[0.0, distance], [distance, 0.0]])
    points = torch.tensor([[0.0, 0.0], [distance, distance]]) if distance == 2 else torch.tensor([[distance, distance]])
    assignment, _ = launch(kmeans_assign, points, centroids)
    assert torch.equal(assignment.long(), brute(points, centroids).argmin(dim=1))
    assert assignment.tolist() == [1] * len(points)


def test_assign_ties_between_tiles() -> None:
    """The same centroids again, in another tile and in the list of the float64 search."""
    centroids = normal(150, 7).repeat(3, 1)
    points = centroids[[3, 149, 77]] + 0.01 * normal(3, 7, seed=1)
    assert launch(kmeans_assign, points, centroids)[0].tolist() == [3, 149, 77]
    assert launch(kmeans_assign, points, centroids[100:300])[0].tolist() == [53, 49, 127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("apart", "d"), [(0, 24), (1e-6, 24), (1e-6, 32)])
def test_assign_listed_rows(
    dtype: torch.dtype, apart: float, d: int, listed: list[int], compared_with_all: list[int]
) -> None:
    """More than a program takes at a time, some with as many near centroids as are kept, some with one more; in several
    tiles, small or large. Where they are equal, the first of them is it."""
    sizes = torch.tensor([3, assigning.WIDTH, assigning.WIDTH + 1, 70, 2, 1])
    groups = (4 * normal(len(sizes), d)).to(dtype).float()
    centroids = groups.repeat_interleave(sizes, dim=0)
    centroids = centroids + apart * normal(len(centroids), d, seed=1)
    order = torch.randperm(len(centroids), generator=torch.Generator().manual_seed(0))
    points = groups[torch.arange(150) % len(sizes)] + 0.01 * normal(150, d, seed=2)
    check(points.to(dtype), centroids[order])
    assignment, _ = launch(kmeans_assign, points.to(dtype), centroids[order])
    assert torch.equal(assignment.long(), brute(points.to(dtype), centroids[order]).argmin(dim=1))
    assert listed == [100, 100] and compared_with_all == [50, 50]


def test_assign_all_centroids_equal() -> None:
    """All v are equal, and 0: only the tags in their bits differ."""
    centroids = normal(1, 5).repeat(33, 1)
    points = torch.cat([centroids[:2], normal(3, 5, seed=1)])
    for dtype in (torch.float32, torch.float16):
        assert launch(kmeans_assign, points.to(dtype), centroids)[0].tolist() == [0] * 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_assign_duplicates_are_at_distance_zero(dtype: torch.dtype, offset: float) -> None:
    centroids = (16 * normal(20, 33) + offset).to(dtype)
    order = torch.arange(40) % 20
    assignment, sqdistance = launch(kmeans_assign, centroids[order], centroids)
    assert torch.equal(assignment.long(), order)
    assert torch.equal(sqdistance, torch.zeros(40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_huge_offset(dtype: torch.dtype) -> None:
    check((normal(40, 24) + 1e3).to(dtype), normal(30, 24, seed=1) + 1e3)


@pytest.mark.parametrize("places", [(1, 3), (1, 18), (18, 1), (1, 3, 5), (1, 3, 18), (1, 18, 20)])
def test_assign_near_ties_are_decided_exactly(
    places: tuple[int, ...], listed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points as far from two centroids, or from three, up to 1e-6: float16 products choose wrong many times.

    In one tile of centroids, and in two.
    """
    tile, options = assigning.config(16, 64, gpu(torch.empty(0, device=DEVICE)))
    monkeypatch.setattr(assigning, "config", lambda *_: (tile, options))
    corners = 3 * torch.eye(64)[: len(places)]
    centroids = normal(23, 64, seed=1) + 5
    centroids[torch.tensor(places)] = corners
    middle = corners.double().mean(dim=0)
    points = (middle + 1e-6 * normal(22, 64, seed=2, dtype=torch.float64)).float()
    exact = brute(points, centroids).argmin(dim=1)
    rounded = centroids.half().double().square().sum(dim=1) - 2 * points.half().double() @ centroids.half().double().T
    assert (rounded.argmin(dim=1) != exact).sum() > 6
    assert torch.equal(launch(kmeans_assign, points, centroids)[0].long(), exact)
    assert listed == [22 if len(places) == 3 else 0]


@pytest.mark.parametrize(("spacing", "k", "every", "shift"), [(0.5625, 280, 2, 0.25), (0.1875, 720, 3, 0.0)])
def test_assign_columns_in_the_bits_of_products_do_not_decide(spacing: float, k: int, every: int, shift: float) -> None:
    """Neighbours on a line whose v differ by less than the last bits; the nearest has the lowest columns."""
    line = spacing * (torch.arange(k) - k // 2)
    near = ((line > 64.2) & (line < 74)).nonzero()[:, 0]
    lowest = near[near % every == 0]
    highest = near[near % every > 0]
    others = torch.tensor([i for i in range(k) if i not in near])
    between = 256 - len(near)
    place = torch.cat([lowest, others[:between], highest, others[between:]])
    check(line[lowest, None] + shift, line[place, None])


def test_assign_far_clusters_with_close_members() -> None:
    """Within a cluster the distances are below the rounding of the products; only differences can tell them apart."""
    centres = 1e4 * normal(3, 1, 16)
    centroids = (centres + 0.1 * normal(3, 12, 16, seed=1)).flatten(0, 1)
    check((centres + 0.1 * normal(3, 9, 16, seed=2)).flatten(0, 1), centroids)


@pytest.mark.parametrize(("dtype", "scale"), [*((dtype, 1.0) for dtype in DTYPES), (torch.float32, 1e-19)])
def test_assign_trusts_products_of_most_rows(dtype: torch.dtype, scale: float, listed: list[int]) -> None:
    """Also with a far outlier among the centroids, NaN among the points, and small numbers."""
    points, centroids = (scale * normal(60, 140)).to(dtype), scale * normal(40, 140, seed=1)
    centroids[7] = 1e5 * scale
    points[::3, 0] = torch.nan
    launch(kmeans_assign, points, centroids)
    assert listed[0] <= 2


@pytest.mark.parametrize("scale", [1e25, 1e-30, 5e-23])
def test_assign_values_at_the_ends_of_float32(scale: float) -> None:
    """Squares overflow or vanish in float32; the assignment does not care."""
    points, centroids = normal(30, 16) * scale, normal(20, 16, seed=1) * scale
    assert torch.equal(launch(kmeans_assign, points, centroids)[0].long(), brute(points, centroids).argmin(dim=1))


def test_assign_points_and_centroids_of_different_size() -> None:
    """Products that overflow, or vanish, against the centroids' norms."""
    points = torch.cat([normal(8, 5) * 1e36, normal(8, 5, seed=1) * 1e-36])
    for size in (1.0, 1e-34, 1e34):
        check(points, normal(9, 5, seed=2) * size)
    check(normal(8, 5).half(), 1e-20 * normal(9, 5, seed=2))


def test_assign_points_that_are_not_finite() -> None:
    points, centroids = normal(9, 200), normal(20, 200, seed=1)
    good = [0, 2, 4, 5, 8]
    points[1, 0], points[3, 199], points[6, 5], points[7] = torch.nan, torch.inf, -torch.inf, torch.nan
    for dtype in (torch.float32, torch.float16):
        assignment, sqdistance = launch(kmeans_assign, points.to(dtype), centroids)
        assert sqdistance.isfinite().nonzero().flatten().tolist() == good
        exact = brute(points[good].to(dtype), centroids).argmin(dim=1)
        assert torch.equal(assignment[good].long(), exact)
        assert ((assignment >= 0) & (assignment < 20)).all()


def test_assign_no_points() -> None:
    assignment, sqdistance = launch(kmeans_assign, torch.empty(0, 3), torch.ones(2, 3))
    assert assignment.shape == sqdistance.shape == (0,)


def test_assign_refuses_more_rows_than_its_indices_hold() -> None:
    many, one = torch.zeros(1, 1).expand(MAX_ROWS + 1, 1), torch.zeros(1, 1)
    assert "sizes of at most 2147482624, got (2147482625, 1) and (1, 1)" in assigning.refuse(many, one)
    assert "sizes of at most" in assigning.refuse(one, many)


def test_assign_refuses_float64() -> None:
    with pytest.raises(NotImplementedError, match="triton: needs float16 or bfloat16 or float32, got float64"):
        kmeans_assign(torch.ones(2, 2, device=DEVICE).double(), torch.ones(1, 2, device=DEVICE), impl="triton")


@triton.jit
def _tolerances(sizes_ptr, limits_ptr, out_ptr, rows, depth):
    for i in range(rows):
        size, lost = tl.load(sizes_ptr + 3 * i), tl.load(sizes_ptr + 3 * i + 1)
        tl.store(out_ptr + i, tolerance(size, lost, tl.load(sizes_ptr + 3 * i + 2), limits_ptr, depth))


def tensor_core(x: Tensor, c: Tensor) -> Tensor:
    """x cᵀ in float64 with the roundings of the tensor cores: 4 products and the accumulator cut off at 24 bits."""

    def cut(values: Tensor, largest: Tensor) -> Tensor:
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 24)
        return (values / unit).trunc() * unit

    total = torch.zeros(len(x), len(c), dtype=torch.float64)
    for d in range(0, x.shape[1], 4):
        terms = torch.cat([x.double()[:, None, d : d + 4] * c.double()[None, :, d : d + 4], total[..., None]], dim=2)
        total = cut(terms, terms.abs().amax(dim=2, keepdim=True)).sum(dim=2)
        total = cut(total, total.abs())
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", ["integers", "rows", "columns", "spread", "tiny", "offset"])
def test_error_of_the_products_is_within_the_tolerance(dtype: torch.dtype, shape: str) -> None:
    points, centroids = normal(30, 200), normal(12, 200, seed=1)
    if shape == "integers":  # float16 holds them, and no product cancels: all error is of the sums
        points, centroids = (points.abs() * 500 + 200).round(), torch.full((12, 200), 30.0)
        centroids[2:4] += (normal(2, 200, seed=1).abs() * 500 + 200).round()
        points, centroids = points.repeat(1, 10), centroids.repeat(1, 10)
    if shape in ("rows", "columns"):  # all entries are rounded down, by as much as can be
        points, centroids = torch.ones(30, 200), torch.zeros(12, 200)
        centroids[5] = 1
        (points if shape == "rows" else centroids)[5] += 0.98 * 2**-11
    if shape == "spread":
        points, centroids = points * torch.logspace(-9, 4, 200), centroids * torch.logspace(-9, 4, 200)
    if shape == "tiny":
        centroids = centroids * 1e-3
        centroids[0] = 50
    if shape == "offset":
        points, centroids = points + 40, centroids + 40
    points = points.to(dtype)
    rounded = search.round_both(points.to(DEVICE), centroids.to(DEVICE))
    scale = rounded.limits[0] * (torch.ones(30, device=DEVICE) if rounded.whole else rounded.scale)
    per_unit, smallest = (value.double() for value in rounded.limits[:2].cpu())
    centre, scale = rounded.centre.double().cpu(), scale.double().cpu()
    x, c = (points.double() - centre) * per_unit, (centroids.double() - centre) * per_unit
    v = tensor_core(rounded.rows.cpu(), rounded.columns.cpu()) * scale[:, None] - rounded.offset.double().cpu()
    exact = x @ c.T - c.square().sum(dim=1) / 2
    product = rounded.rows.double().cpu() * scale[:, None]
    lost = torch.zeros(30) if rounded.whole else (x - product).norm(dim=1)
    sizes = torch.stack([product.norm(dim=1), lost, x.norm(dim=1)], dim=1).float().to(DEVICE)
    found = torch.empty(30, device=DEVICE)
    _tolerances[(1,)](sizes, rounded.limits, found, 30, points.shape[1])
    bound = found.double().cpu()
    near = c.norm(dim=1) <= (2 * x.norm(dim=1) + smallest)[:, None]
    error = ((v - exact).abs() * near).amax(dim=1)
    assert (2 * error <= bound).all()
    assert (bound <= 1e-2 * product.norm(dim=1) * c.norm(dim=1).amax()).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (20, 1, 3), (9, 14, 5), (60, 4, 300)])
def test_update_is_the_definition_to_the_bit(dtype: torch.dtype, n: int, k: int, d: int) -> None:
    """Sums of values of very different size, so that another order of adding gives other bytes."""
    points = (normal(n, d) * torch.logspace(-4, 4, n)[torch.arange(n) * 7 % n][:, None]).to(dtype)
    assignment = torch.arange(n, dtype=torch.int32) * 5 % k
    sums, counts = launch(kmeans_update, points, assignment, k)
    expected, lengths = kmeans_update(points, assignment, k, impl="reference")
    assert torch.equal(sums, expected)
    assert torch.equal(counts, lengths)


def test_update_long_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces: whole ones, one more row, one less; the bytes repeat."""
    monkeypatch.setattr(segments, "PIECE", 8)
    assignment = torch.cat([torch.full((length,), label) for label, length in enumerate([8, 17, 0, 7, 24, 1])])
    points, assignment = normal(57, 40, dtype=torch.float16), assignment.int()[torch.arange(57) * 8 % 57]
    sums, counts = launch(kmeans_update, points, assignment, 6)
    expected, lengths = kmeans_update(points, assignment, 6, impl="reference")
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(counts, lengths)
    assert torch.equal(launch(kmeans_update, points, assignment, 6)[0], sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_update_weights(dtype: torch.dtype) -> None:
    points, assignment = normal(40, 9), torch.arange(40, dtype=torch.int32) % 6
    weights = normal(80, seed=1, dtype=dtype)[::2]
    sums, totals = launch(kmeans_update, points, assignment, 7, weights)
    expected, lengths = kmeans_update(points, assignment, 7, weights, impl="reference")
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(totals, lengths, rtol=1e-13, atol=1e-13)


def test_update_strided_and_not_finite() -> None:
    points = normal(30, 12)[::2, 2:9]
    points[4], points[7, 3] = torch.nan, torch.inf
    assignment = torch.arange(15, dtype=torch.int32) % 5
    sums, _ = launch(kmeans_update, points, assignment, 6)
    expected, _ = kmeans_update(points, assignment, 6, impl="reference")
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13, equal_nan=True)
    assert sums.isfinite().all(dim=1).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("weighted", [False, True])
def test_update_no_points(weighted: bool) -> None:
    weights = torch.empty(0) if weighted else None
    sums, counts = launch(kmeans_update, torch.empty(0, 3), torch.empty(0, dtype=torch.int32), 2, weights)
    assert torch.equal(sums, torch.zeros(2, 3, dtype=torch.float64))
    assert counts.tolist() == [0, 0]


def test_update_many_clusters() -> None:
    """Labels that need more than 16 bits."""
    assignment = torch.tensor([70000, 5, 32768, 5], dtype=torch.int32)
    order, starts = segments.order_by_label(assignment, 70001)
    assert order.tolist() == [1, 3, 2, 0]
    assert starts[[0, 5, 6, 32768, 32769, 70000, 70001]].tolist() == [0, 0, 2, 2, 3, 3, 4]
    order, starts = segments.order_by_label(torch.tensor([32767, 0, 32767], dtype=torch.int32), 2**15)
    assert (order.tolist(), starts[-3:].tolist()) == ([1, 0, 2], [1, 1, 3])
