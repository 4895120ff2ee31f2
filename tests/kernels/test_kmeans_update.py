"""``kmeans_update`` against sums in float64, one point at a time."""

from __future__ import annotations

import math

import pytest
import torch
from cpp_case import needs_cpp
from torch import Tensor

from diffprune.kernels import kmeans_update

IMPLS = ["reference", "cpu", pytest.param("cpp", marks=needs_cpp)]


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k + d)
    points = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    return points, torch.randint(0, k, (n,), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (50, 1, 3), (9, 40, 5), (211, 13, 7)])
def test_sums_and_counts(impl: str, dtype: torch.dtype, n: int, k: int, d: int) -> None:
    points, assignment = data(n, k, d, dtype)
    sums, counts = kmeans_update(points, assignment, k, impl=impl)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    rows = points.double().tolist()
    for cluster in range(k):
        own = [row for row, label in zip(rows, assignment.tolist(), strict=True) if label == cluster]
        assert counts[cluster] == len(own)
        expected = torch.tensor([math.fsum(row[j] for row in own) for j in range(d)], dtype=torch.float64)
        torch.testing.assert_close(sums[cluster], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights(impl: str) -> None:
    points, assignment = data(80, 6, 4)
    weights = torch.rand(80, generator=torch.Generator().manual_seed(1))
    sums, totals = kmeans_update(points, assignment, 6, weights, impl=impl)
    assert totals.dtype == torch.float64
    for cluster in range(6):
        own = assignment == cluster
        expected = (points[own].double() * weights[own, None].double()).sum(dim=0)
        torch.testing.assert_close(sums[cluster], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(totals[cluster], weights[own].double().sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bytes_for_any_number_of_threads(impl: str) -> None:
    """Values of very different size, so that another order of adding gives other bytes."""
    points, assignment = data(60_000, 7, 9)
    points = points * 10 ** torch.linspace(-8, 8, 60_000)[:, None]
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kmeans_update(points, assignment, 7, impl=impl)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], kmeans_update(points[order], assignment[order], 7, impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 11, 7000])
def test_implementations_agree_to_the_bit(impl: str, dtype: torch.dtype, k: int) -> None:
    """All add the points of a centroid in row order, whatever the blocks; strided points and weights too."""
    points, assignment = data(3000, k, 131, dtype)
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    for arguments in [
        (points, assignment, k),
        (points[:, 1:8], assignment, k, weights),
        (points.T[:9].T, assignment, k),
    ]:
        expected, found = (kmeans_update(*arguments, impl=name) for name in ("reference", impl))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@needs_cpp
def test_every_half_is_read_as_it_is() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    own = torch.arange(2**16, dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        sums, _ = kmeans_update(values[:, None], own, 2**16, impl="cpp")
        assert torch.equal(sums[:, 0].nan_to_num(nan=7e77), values.double().nan_to_num(nan=7e77))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_cluster(impl: str) -> None:
    points = torch.tensor([[1.0], [torch.nan], [3.0], [torch.inf]])
    sums, counts = kmeans_update(points, torch.tensor([0, 1, 0, 2], dtype=torch.int32), 4, impl=impl)
    assert sums[:, 0].isfinite().tolist() == [True, False, False, True]
    assert sums[[0, 3], 0].tolist() == [4, 0]
    assert counts.tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_points(impl: str, weighted: bool) -> None:
    weights = torch.empty(0) if weighted else None
    sums, counts = kmeans_update(torch.empty(0, 3), torch.empty(0, dtype=torch.int32), 2, weights, impl=impl)
    assert torch.equal(sums, torch.zeros(2, 3, dtype=torch.float64))
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("points", "assignment", "k", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int32), 2, r"expected points \[N, D\], got \(3,\)"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), 2, "expected assignment of dtype int32, got torch.int64"),
        (torch.ones(3, 2), torch.zeros(4, dtype=torch.int32), 2, "points and assignment of equal N, got 3 and 4"),
        (torch.ones(3, 2), torch.tensor([0, 2, 1], dtype=torch.int32), 2, "assignment from 0 to 1, got 0 to 2"),
        (torch.ones(3, 2), torch.tensor([0, -1, 1], dtype=torch.int32), 2, "assignment from 0 to 1, got -1 to 1"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int32), 0, "expected k of at least 1, got 0"),
    ],
)
def test_bad_inputs(points: Tensor, assignment: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans_update(points, assignment, k)


def test_bad_weights() -> None:
    assignment = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="points and weights of equal N, got 3 and 2"):
        kmeans_update(torch.ones(3, 2), assignment, 1, torch.ones(2))


def test_is_a_proper_torch_op() -> None:
    points, assignment = data(9, 3, 2)
    op = torch.ops.diffprune.kmeans_update.default
    torch.library.opcheck(op, (points, assignment, 3))
    torch.library.opcheck(op, (points.half(), assignment, 3, torch.ones(9), "reference"))
