"""``kmeans_assign`` against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from cpp_case import needs_cpp
from torch import Tensor

from diffprune.kernels import kmeans_assign
from diffprune.kernels.cpp import kmeans_assign as cpp_search
from diffprune.kernels.cpu import kmeans_assign as blocked
from diffprune.kernels.cpu import search
from diffprune.kernels.kmeans_assign import NearestOf

IMPLS = ["reference", "cpu", pytest.param("cpp", marks=needs_cpp)]


def brute(points: Tensor, centroids: Tensor) -> Tensor:
    """[N, K] float64 squared distances."""
    return (points.double()[:, None] - centroids.double()).square().sum(dim=2)


def check(points: Tensor, centroids: Tensor, impl: str, rtol: float = 2e-6) -> None:
    assignment, sqdistance = kmeans_assign(points, centroids, impl=impl)
    assert assignment.dtype == torch.int32
    assert assignment.shape == sqdistance.shape == (len(points),)
    expected = brute(points, centroids)
    chosen = expected.gather(1, assignment.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.amin(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(sqdistance.double(), expected.amin(dim=1), rtol=rtol, atol=1e-30)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (37, 1, 5), (101, 13, 1), (257, 31, 7), (1000, 64, 65)])
def test_odd_sizes(impl: str, n: int, k: int, d: int, generator: torch.Generator) -> None:
    check(torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(impl: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    points = torch.randn(200, 9, generator=generator, dtype=torch.float64).to(dtype)
    centroids = torch.randn(11, 9, generator=generator)
    if impl == "cpp" and dtype == torch.float64:
        pytest.skip("refuses float64")
    _, sqdistance = kmeans_assign(points, centroids, impl=impl)
    assert sqdistance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(points, centroids, impl, rtol=1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_blocks(impl: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = torch.randn(1500, 6, generator=generator), torch.randn(300, 6, generator=generator)
    whole = kmeans_assign(points, centroids, impl=impl)
    monkeypatch.setattr(search, "BLOCK", 64)
    monkeypatch.setattr(blocked, "BLOCK", 64)
    parts = kmeans_assign(points, centroids, impl=impl)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    check(points, centroids, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_smallest_index(impl: str) -> None:
    centroids = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [9.0, 0.0]])
    assignment, sqdistance = kmeans_assign(points, centroids, impl=impl)
    assert assignment.tolist() == [1, 2, 0, 0, 0]
    assert sqdistance.tolist() == [1, 0, 1, 0, 36]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_duplicates_are_at_distance_zero(impl: str, offset: float, generator: torch.Generator) -> None:
    centroids = torch.randn(20, 33, generator=generator) + offset
    order = torch.randint(0, 20, (100,), generator=generator)
    assignment, sqdistance = kmeans_assign(centroids[order], centroids, impl=impl)
    assert torch.equal(assignment.long(), order)
    assert torch.equal(sqdistance, torch.zeros(100))


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_offset(impl: str, generator: torch.Generator) -> None:
    check(torch.randn(500, 24, generator=generator) + 1e3, torch.randn(40, 24, generator=generator) + 1e3, impl)


@pytest.mark.parametrize("at_the_centre", [0, 9])
def test_near_ties_are_decided_exactly(at_the_centre: int, generator: torch.Generator) -> None:
    """Points close to the middle between two centroids: the float32 product alone chooses wrong many times.

    Also where most centroids have norm 0 after centring, which says nothing of the two that matter.
    """
    pair = torch.randn(2, 64, generator=generator) * 3
    centroids = torch.cat([pair, torch.full((at_the_centre, 64), 9.0)])
    middle = pair.double().mean(dim=0)
    points = (middle + 1e-6 * torch.randn(2000, 64, generator=generator, dtype=torch.float64)).float()
    product = centroids.square().sum(dim=1) - 2 * points @ centroids.T
    exact = brute(points, centroids)
    assert (product.argmin(dim=1) != exact.argmin(dim=1)).sum() > 20
    assert torch.equal(kmeans_assign(points, centroids, impl="cpu")[0].long(), exact.argmin(dim=1))


def test_far_clusters_with_close_members(generator: torch.Generator) -> None:
    """Within a cluster the distances are below the rounding of the products; only differences can tell them apart."""
    centres = 1e4 * torch.randn(5, 16, generator=generator)
    centroids = (centres[:, None] + 0.1 * torch.randn(5, 12, 16, generator=generator)).flatten(0, 1)
    points = (centres[:, None] + 0.1 * torch.randn(5, 50, 16, generator=generator)).flatten(0, 1)
    check(points, centroids, "cpu")


def test_few_pairs_are_compared_in_float64(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a far outlier among the centroids nor a NaN among the points makes candidates of all pairs."""
    points = torch.randn(2000, 16, generator=generator)
    points[::10] = torch.nan
    centroids = torch.cat([torch.randn(30, 16, generator=generator), torch.full((1, 16), 1e5)])
    compared = 0

    def counted(queries: Tensor, candidates: Tensor, row: Tensor, column: Tensor) -> Tensor:
        nonlocal compared
        compared += len(row)
        return search.pair_sqdistances(queries, candidates, row, column)

    monkeypatch.setattr(blocked, "pair_sqdistances", counted)
    kmeans_assign(points, centroids, impl="cpu")
    assert compared < 100


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_low_matmul_precision_stays_exact(precision: str, generator: torch.Generator) -> None:
    """Where the processor has such products they are used; here they are imitated too, to test their bound."""
    points, centroids = torch.randn(700, 128, generator=generator), torch.randn(50, 128, generator=generator)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        check(points, centroids, "cpu")
        found = search.Search(centroids, torch.float32, k=1)
        x, bound = found.queries(points)
    finally:
        matmul.fp32_precision = before
    c = found.centred(centroids)
    error = x.bfloat16().double() @ c.bfloat16().double().T - x.double() @ c.double().T
    assert (2 * error.abs().amax(dim=1, keepdim=True) <= bound).all()


def test_error_bound_holds(generator: torch.Generator) -> None:
    """The computed products are within the bound of the exact ones, and the bound is not absurdly wide."""
    points = torch.randn(300, 200, generator=generator) * 5 + 40
    centroids = torch.randn(80, 200, generator=generator) * 5 + 40
    found = search.Search(centroids, torch.float32, k=1)
    x, bound = found.queries(points)
    v = torch.addmm(found.sqnorms, x, found.centred(centroids).T, alpha=-2).double()
    exact = brute(points, centroids) - (points.double() - found.centre.double()).square().sum(dim=1, keepdim=True)
    error = (v - exact).abs().amax(dim=1, keepdim=True)
    assert (error <= bound).all()
    assert (bound < 1e-3 * exact.abs().amax()).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_values_at_the_ends_of_float32(impl: str) -> None:
    """Squares overflow or vanish in float32; the assignment does not care."""
    for scale in (1e25, 1e-30):
        points = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [5.0, 5.0]]) * scale
        centroids = torch.tensor([[6.0, 6.0], [1.0, 1.0], [-2.0, 0.0]]) * scale
        assert kmeans_assign(points, centroids, impl=impl)[0].tolist() == [1, 2, 0]


def test_products_that_vanish(generator: torch.Generator) -> None:
    """Squares near 1e-44 have a few bits left in float32."""
    points, centroids = (torch.randn(n, 16, generator=generator) * 5e-23 for n in (500, 30))
    assert torch.equal(kmeans_assign(points, centroids, impl="cpu")[0].long(), brute(points, centroids).argmin(dim=1))


@pytest.mark.parametrize("impl", IMPLS)
def test_points_that_are_not_finite(impl: str) -> None:
    points = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0], [5.0, 5.0]])
    assignment, sqdistance = kmeans_assign(points, torch.tensor([[4.0, 4.0], [0.0, 0.0]]), impl=impl)
    assert sqdistance.isfinite().tolist() == [True, False, False, True]
    assert assignment[[0, 3]].tolist() == [1, 0]
    assert ((assignment >= 0) & (assignment < 2)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_points(impl: str) -> None:
    assignment, sqdistance = kmeans_assign(torch.empty(0, 3), torch.ones(2, 3), impl=impl)
    assert assignment.shape == sqdistance.shape == (0,)


@pytest.mark.parametrize(
    ("points", "centroids", "message"),
    [
        (torch.ones(3, 4, 5), torch.ones(2, 4), r"expected points \[N, D\], got \(3, 4, 5\)"),
        (torch.ones(3, 4), torch.ones(4), r"expected centroids \[K, D\], got \(4,\)"),
        (torch.ones(3, 4), torch.ones(2, 5), "expected points and centroids of equal D, got 4 and 5"),
        (torch.ones(3, 4), torch.ones(0, 4), r"K and D at least 1, got \(0, 4\)"),
        (torch.ones(3, 0), torch.ones(2, 0), r"K and D at least 1, got \(2, 0\)"),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(2, 4), "expected points of dtype float16 or .*int64"),
        (torch.ones(3, 4), torch.ones(2, 4, dtype=torch.uint8), "expected centroids of dtype float16 or .*uint8"),
        (torch.ones(3, 4), torch.ones(2, 4, device="meta"), "equal device, got cpu and meta"),
        (torch.ones(3, 1), torch.tensor([[1.0], [torch.nan]]), "finite centroids, got NaN .* 1 rows, the first is 1"),
        (torch.ones(3, 1), torch.tensor([[torch.inf], [1.0]]), "finite centroids, got NaN .* 1 rows, the first is 0"),
    ],
)
def test_bad_inputs(points: Tensor, centroids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans_assign(points, centroids)


def test_is_a_proper_torch_op(generator: torch.Generator) -> None:
    points, centroids = torch.randn(7, 3, generator=generator), torch.randn(2, 3, generator=generator)
    torch.library.opcheck(torch.ops.diffprune.kmeans_assign.default, (points, centroids))
    torch.library.opcheck(torch.ops.diffprune.kmeans_assign.default, (points.double(), centroids, "reference"))


def test_compiles_into_one_graph(generator: torch.Generator) -> None:
    def codes(points: Tensor, centroids: Tensor) -> Tensor:
        assignment, sqdistance = kmeans_assign(points * 2, centroids)
        return centroids[assignment.long()] + sqdistance[:, None]

    points, centroids = torch.randn(30, 3, generator=generator), torch.randn(5, 3, generator=generator)
    compiled = torch.compile(codes, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(points, centroids), codes(points, centroids))


def test_keeps_no_graph(generator: torch.Generator) -> None:
    points = torch.randn(5, 3, generator=generator, requires_grad=True)
    assert not kmeans_assign(points, torch.ones(2, 3))[1].requires_grad


def test_block_after_block_is_the_same(generator: torch.Generator) -> None:
    """Whatever the blocks' dtypes; of float64, for which the compiled search is not, too."""
    centroids = torch.randn(30, 9, generator=generator)
    nearest_of = NearestOf(centroids)
    for dtype, rows in ((torch.float32, 40), (torch.float16, 0), (torch.float64, 7), (torch.float32, 1)):
        block = torch.randn(rows, 9, generator=generator, dtype=torch.float64).to(dtype)
        for found, expected in zip(nearest_of(block), kmeans_assign(block, centroids), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    with pytest.raises(ValueError, match="points and centroids of equal D"):
        nearest_of(torch.zeros(4, 8))


@needs_cpp
def test_what_centroids_need_is_made_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = cpp_search.prepare
    monkeypatch.setattr(cpp_search, "prepare", lambda centroids: made.append(1) or real(centroids))
    nearest_of = NearestOf(torch.randn(30, 9, generator=generator))
    for _ in range(3):
        nearest_of(torch.randn(40, 9, generator=generator))
    assert made == [1]
