"""``pairwise_topk`` against a full sort of float64 distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffprune.kernels import pairwise_topk
from diffprune.kernels.cpu import pairwise_topk as tiled
from diffprune.kernels.cpu import search

IMPLS = ["reference", "cpu"]


def brute(queries: Tensor, points: Tensor, exclude_self: bool = False) -> Tensor:
    """[N, M] float64 distances; a query's own is infinite."""
    distances = (queries.double()[:, None] - points.double()).square().sum(dim=2).sqrt()
    return distances.fill_diagonal_(torch.inf) if exclude_self else distances


def check(
    queries: Tensor, points: Tensor, k: int, impl: str, exclude_self: bool = False, rtol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    distances, indices = pairwise_topk(queries, points, k, exclude_self, impl=impl)
    assert distances.shape == indices.shape == (len(queries), k)
    assert indices.dtype == torch.int64
    expected = brute(queries, points, exclude_self)
    nearest = expected.sort(dim=1).values[:, :k]
    torch.testing.assert_close(expected.gather(1, indices), nearest, rtol=1e-13, atol=0)
    torch.testing.assert_close(distances.double(), nearest, rtol=rtol, atol=1e-30)
    assert all(len(set(row)) == k for row in indices.tolist())
    return distances, indices


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 10)
    monkeypatch.setattr(tiled, "BLOCK", 70)
    monkeypatch.setattr(search, "BLOCK", 70)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (30, 1, 4, 1), (23, 57, 1, 5), (40, 33, 9, 33)])
def test_odd_sizes(impl: str, n: int, m: int, d: int, k: int) -> None:
    check(normal(n, d, seed=1), normal(m, d, seed=2), k, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 4, 25])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_many_tiles(impl: str, k: int, exclude_self: bool) -> None:
    points = normal(103, 6)
    distances, indices = check(points, points, k, impl, exclude_self)
    if exclude_self:
        assert (indices != torch.arange(103)[:, None]).all()
    else:
        assert torch.equal(indices[:, 0], torch.arange(103))
        assert torch.equal(distances[:, 0], torch.zeros(103))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("small", [False, True])
def test_all_others(impl: str, small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_tiles")
    points = normal(31, 3)
    check(points, points, 30, impl, exclude_self=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("small", [False, True])
def test_ties_go_to_the_smallest_index(impl: str, small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_tiles")
    points = torch.tensor([[0.0], [1.0], [-1.0], [1.0]]).repeat(10, 1)
    distances, indices = pairwise_topk(torch.tensor([[0.0], [1.0], [5.0]]), points, 12, impl=impl)
    assert indices[0].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 1, 2]
    assert indices[1].tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert distances[0].tolist() == [0] * 10 + [1] * 2
    assert distances[2].tolist() == [4] * 12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_duplicates_see_one_another(impl: str) -> None:
    points = (normal(25, 40) + 1e3).repeat(2, 1)
    distances, indices = pairwise_topk(points, points, 1, exclude_self=True, impl=impl)
    assert indices[:, 0].tolist() == [*range(25, 50), *range(25)]
    assert torch.equal(distances, torch.zeros(50, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_far_clusters_with_close_members(impl: str) -> None:
    """Within a cluster the distances are below the rounding of the products."""
    points = (1e4 * normal(4, 1, 8) + 0.1 * normal(4, 30, 8, seed=1)).flatten(0, 1)
    check(points, points, 3, impl, exclude_self=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(impl: str, dtype: torch.dtype) -> None:
    queries, points = normal(20, 7).to(dtype), normal(30, 7, seed=1)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    distances, _ = check(queries, points, 4, impl, rtol=rtol)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("exponent", [-1020, -700, -400, -301, -300, -100, 100, 479, 480, 600, 1000, 1020])
def test_float64_of_any_magnitude(impl: str, exponent: int) -> None:
    """Squares would vanish or overflow. A power of two changes no bit of the results, and none is left in them."""
    queries, points = normal(20, 5).double(), normal(30, 5, seed=1).double()
    queries[0, 0] = 2**-20
    for exclude_self, given in ((False, queries), (True, points)):
        expected = pairwise_topk(given, points, 4, exclude_self, impl=impl)
        half, rest = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
        found = pairwise_topk(given * half * rest, points * half * rest, 4, exclude_self, impl=impl)
        assert torch.equal(found[0], expected[0] * half * rest) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_at_its_ends(impl: str) -> None:
    least, largest = 5e-324, torch.finfo(torch.float64).max
    points = torch.tensor([[0.0], [3 * least], [5 * least]], dtype=torch.float64)
    distances, indices = pairwise_topk(points, points, 2, impl=impl)
    assert indices.tolist() == [[0, 1], [1, 2], [2, 1]]
    assert distances.tolist() == [[0, 3 * least], [0, 2 * least], [0, 2 * least]]
    points = torch.tensor([[largest], [largest / 2], [-largest]], dtype=torch.float64)
    distances, indices = pairwise_topk(points, points, 2, impl=impl)
    assert indices.tolist() == [[0, 1], [1, 0], [2, 1]]
    assert distances.tolist() == [[0, largest / 2], [0, largest / 2], [0, torch.inf]]
    lost = torch.tensor([[torch.nan], [torch.inf], [1e-200]], dtype=torch.float64)
    distances, indices = pairwise_topk(lost, points * 1e-200 / largest, 1, impl=impl)
    assert not distances[:2].isfinite().any() and indices[2, 0] == 0 and distances[2, 0] < 1e-210


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_are_not_finite(impl: str) -> None:
    queries = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0]])
    distances, indices = pairwise_topk(queries, normal(9, 2), 3, impl=impl)
    assert distances.isfinite().all(dim=1).tolist() == [True, False, False]
    assert not distances[1:].isfinite().any()
    assert ((indices >= 0) & (indices < 9)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_queries(impl: str) -> None:
    distances, indices = pairwise_topk(torch.empty(0, 3), torch.ones(5, 3), 2, impl=impl)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "points", "k", "exclude_self", "message"),
    [
        (torch.ones(4), torch.ones(3, 2), 1, False, r"expected queries \[N, D\], got \(4,\)"),
        (torch.ones(4, 2), torch.ones(3, 3), 1, False, "queries and points of equal D, got 2 and 3"),
        (
            torch.ones(4, 2),
            torch.ones(3, 2),
            1,
            True,
            r"queries and points \(exclude_self\) of equal length, got 4 and 3",
        ),
        (torch.ones(4, 2), torch.ones(3, 2), 0, False, "expected k from 1 to the 3 points, got 0"),
        (torch.ones(4, 2), torch.ones(3, 2), 4, False, "expected k from 1 to the 3 points, got 4"),
        (torch.ones(3, 2), torch.ones(3, 2), 3, True, "expected k from 1 to the 2 points other than the query, got 3"),
        (torch.ones(4, 2), torch.ones(0, 2), 1, False, "expected k from 1 to the 0 points, got 1"),
        (torch.ones(4, 0), torch.ones(3, 0), 1, False, r"D at least 1, got \(3, 0\)"),
        (torch.ones(1, 1), torch.tensor([[1.0], [torch.nan]]), 1, False, "finite points, got NaN .*the first is 1"),
    ],
)
def test_bad_inputs(queries: Tensor, points: Tensor, k: int, exclude_self: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairwise_topk(queries, points, k, exclude_self)


def test_is_a_proper_torch_op() -> None:
    op = torch.ops.diffprune.pairwise_topk.default
    torch.library.opcheck(op, (normal(5, 3), normal(6, 3), 2))
    torch.library.opcheck(op, (normal(5, 3), normal(5, 3), 2, True, "reference"))
