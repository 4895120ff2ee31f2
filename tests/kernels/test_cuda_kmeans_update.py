"""CUDA's ``kmeans_update`` against a loop of additions: on a GPU, or its sources on the CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_case import cuda_ops, launch  # noqa: F401
from torch import Tensor

from diffprune.kernels import kmeans_update
from diffprune.kernels.cuda.kmeans_update import by_centroid

pytestmark = pytest.mark.usefixtures("cuda_ops")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def loop(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The contract, row by row."""
    sums, totals = torch.zeros(k, points.shape[1], dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for row, centroid in enumerate(assignment.tolist()):
        weight = torch.ones((), dtype=torch.float64) if weights is None else weights[row].double()
        sums[centroid] += points[row].double() * weight
        totals[centroid] += weight
    return sums, totals.long() if weights is None else totals


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 5), (1, 1, 1), (50, 4, 130), (200, 7, 3), (33, 40, 128)])
def test_bytes_are_those_of_a_loop(n: int, k: int, d: int, dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    points = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    assignment = torch.randint(k, (n,), generator=generator, dtype=torch.int32)
    weights = torch.rand(n, generator=generator) if weighted else None
    found, expected = (
        launch(kmeans_update, points, assignment, k, weights),
        loop(points, assignment, k, weights),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_empty_centroids_and_values_that_are_not_finite() -> None:
    points = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [4.0, 8.0]])
    sums, counts = launch(kmeans_update, points, torch.tensor([4, 1, 4], dtype=torch.int32), 6, None)
    assert counts.tolist() == [0, 1, 0, 0, 2, 0]
    assert sums[4].tolist() == [5.0, 10.0] and not sums[[0, 2, 3, 5]].any()
    assert sums[1, 0].isnan() and sums[1, 1].isinf()


@pytest.mark.parametrize("k", [2, 2**15 - 1, 2**15, 2**15 + 1])
def test_rows_by_centroid(k: int) -> None:
    """Also around the largest number of centroids that 16 bits count."""
    order, offsets = by_centroid(torch.tensor([k - 1, 0, k - 1], dtype=torch.int32), k)
    assert order.tolist() == [1, 0, 2]
    assert offsets.shape == (k + 1,) and offsets[[0, 1, k - 1, k]].tolist() == [0, 1, 1, 3]


def test_strides() -> None:
    points = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).T
    assignment = torch.arange(80, dtype=torch.int32)[::2] % 3
    found, expected = launch(kmeans_update, points, assignment, 3, None), loop(points, assignment, 3, None)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment(dtype: torch.dtype) -> None:
    points = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    tensors = points, torch.arange(40, dtype=torch.int32) % 3, 3, torch.rand(40)
    found, expected = launch(kmeans_update, *tensors, misaligned=True), loop(*tensors)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
