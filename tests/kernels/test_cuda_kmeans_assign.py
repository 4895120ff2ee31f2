"""CUDA's ``kmeans_assign`` against float64: on a GPU, or its sources on the CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_case import cuda_ops, launch, path  # noqa: F401
from torch import Tensor

from diffprune.kernels import kmeans_assign
from diffprune.kernels.cuda import kmeans_assign as assigning

pytestmark = pytest.mark.usefixtures("path")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The very index that float64 differences give, and their distance to float32."""
    assignment, sqdistance = launch(kmeans_assign, points, centroids)
    assert assignment.dtype == torch.int32 and sqdistance.dtype == torch.float32
    # By blocks: [N, K, D] in one piece would not fit.
    blocks = [(x[:, None] - centroids.double()).square().sum(dim=2) for x in points.double().split(64)]
    expected, index = torch.cat(blocks).min(dim=1) if blocks else (points.new_empty(0), points.new_empty(0))
    assert torch.equal(assignment.long(), index.long())
    torch.testing.assert_close(sqdistance, expected.float(), rtol=3e-6, atol=1e-38)
    return assignment, sqdistance


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Gets of each call how many rows two candidates did not decide, and how many of these few did not."""
    counts, search = [], assigning.search

    def run(*tensors: Tensor) -> None:
        search(*tensors)
        counts.append(tensors[-1][:, 0].tolist())

    monkeypatch.setattr(assigning, "search", run)
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 1), (3, 2, 5), (130, 3, 64), (70, 300, 40), (300, 65, 77), (40, 520, 136), (1, 257, 200), (5, 256, 24)],
)
def test_odd_sizes(n: int, k: int, d: int, dtype: torch.dtype) -> None:
    check(normal(n, d, seed=1, dtype=dtype), normal(k, d, seed=2, dtype=dtype))


def test_points_off_the_origin() -> None:
    """Embeddings share a mean that is larger than what tells them apart, and many centroids are nearly as near."""
    mean = 3 * normal(48, seed=3)
    points, centroids = mean + normal(300, 48, seed=1), mean + 0.05 * normal(300, 48, seed=2)
    check(points, centroids)
    check(points.half(), centroids)
    check(points.half(), centroids.half())


def test_ties_and_duplicates() -> None:
    """Small integers: distances tie exactly; each centroid three times: two candidates are not enough."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(-2, 3, (60, 16), generator=generator).float()
    centroids = torch.randint(-2, 3, (45, 16), generator=generator).float()
    for dtype in (torch.float32, torch.float16):
        check(points.to(dtype), centroids.to(dtype))
        assignment, _ = check(points.to(dtype), centroids.repeat(3, 1).to(dtype))
        assert int(assignment.max()) < 45
    pairs = torch.cat([centroids, centroids.flip(0)])  # every one twice: the two candidates tie
    assignment, sqdistance = check(centroids, pairs)
    assert int(assignment.max()) < 45 and not sqdistance.any()


@pytest.mark.parametrize("n", [1, 5, 6, 7])
@pytest.mark.parametrize("copies", [9, 40])
def test_all_rows_are_searched_again(n: int, copies: int, lists: list[list[int]]) -> None:
    """The lists of rows are full, and their last few are not as many as go through the centroids together.

    All centroids are equal, so all v are 0: only the tags in their bits differ.
    """
    for dtype in (torch.float32, torch.float16):
        check(normal(n, 24, seed=1, dtype=dtype), normal(1, 24, seed=2).repeat(copies, 1))
    assert lists == [[n, n if copies > 32 else 0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_centroids_that_may_be_nearest(dtype: torch.dtype, lists: list[list[int]]) -> None:
    """From 3 to 32 are compared in float64, wherever they are; for more, all are. Of ties the first wins."""
    groups = torch.tensor([3, 31, 32, 33, 45])
    centroids = (3 * torch.eye(5, 40)).repeat_interleave(groups, dim=0)
    centroids = centroids[torch.randperm(len(centroids), generator=torch.Generator().manual_seed(0))]
    centroids[::2] += 1e-6 * normal(72, 40, seed=1)
    points = (3 * torch.eye(5, 40)).repeat(60, 1) + 0.01 * normal(300, 40, seed=2)
    check(points.to(dtype), centroids)
    assert lists == [[300, 120]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ["centred", "off the origin", "outlier", "small"])
def test_products_decide_most_rows(dtype: torch.dtype, shape: str, lists: list[list[int]]) -> None:
    points, centroids = normal(150, 144, seed=1), normal(40, 144, seed=2)
    if shape == "off the origin":
        points, centroids = points + 10, centroids + 10
    if shape == "outlier":
        centroids[7] = 1e5
    if shape == "small" and dtype != torch.float16:
        points, centroids = 1e-19 * points, 1e-19 * centroids
    check(points.to(dtype), centroids)
    assert lists[0][0] <= 6 and lists[0][1] == 0


@pytest.mark.parametrize("scale", [1e-18, 1e-25, 1e-30])
def test_values_that_are_subnormal(scale: float) -> None:
    centroids = normal(70, 24, seed=2)
    check(scale * normal(60, 24, seed=1), scale * centroids)
    check(scale * normal(60, 24, seed=1), scale * centroids.repeat(2, 1))


def test_neighbours_that_float16_cannot_tell_apart(lists: list[list[int]]) -> None:
    """Centroids closer to each other than half precision resolves: two of them, three, and many."""
    base = normal(20, 64, seed=1)
    for copies in (2, 3, 7):
        centroids = base.repeat_interleave(copies, dim=0) * (1 + 1e-5 * normal(20 * copies, 1, seed=2))
        check(base + 0.1 * normal(20, 64, seed=3), centroids)
    assert lists[1:] == [[20, 0], [20, 0]]


@pytest.mark.parametrize("rounded", ["point", "centroid"])
def test_rounding_that_takes_most(rounded: str) -> None:
    """Of the nearest centroid's v, and nothing of the others': products of float16 prefer the next."""
    lost = 0.98 * 2**-11
    x, long = (0.5 * (1 + lost), 1.0) if rounded == "point" else (0.5, 1 + lost)
    v = x * long - long**2 / 2 - 0.2 * lost * x
    square = 2 * (0.25 * x - v) - 0.0625
    up = torch.tensor(square - 1e-4).sqrt().half().double()
    rest = (square - up**2).sqrt().half()
    others = [[0, -2, -2], [-1.25, -0.5, 0], [-1.25, 0, 0]]
    centroids = torch.tensor([[0.25, up.item(), rest.item()], [long, 0, 0], *others])
    point = torch.tensor([[x, 0.0, 0.0]])
    products = (point.half().float() @ centroids.half().float().T)[0] - centroids.square().sum(dim=1) / 2
    assert products.argmax() == 0
    check(point, centroids)


def test_columns_in_the_bits_of_values_do_not_decide() -> None:
    """Centroids on a circle, points near its middle: v differ by less than the last bits that hold the columns."""
    angle = torch.arange(240) * (2 * torch.pi / 240)
    centroids = torch.stack([angle.cos(), angle.sin()], dim=1)
    check(2e-3 * normal(300, 2, seed=1), centroids[torch.randperm(240, generator=torch.Generator().manual_seed(0))])


def test_points_and_centroids_of_different_size() -> None:
    """Products that overflow, or vanish, against the centroids' norms."""
    points = torch.cat([normal(8, 5, seed=1) * 1e36, normal(8, 5, seed=2) * 1e-36])
    for size in (1.0, 1e-34, 1e34):
        check(points, normal(9, 5, seed=3) * size)


def test_magnitudes() -> None:
    """Rows and centroids whose float16 copies need a scale, or cannot be."""
    centroids = normal(70, 24, seed=2)
    for scale in (1e-12, 1e12):
        check(scale * normal(60, 24, seed=1), scale * centroids)
    factors = torch.logspace(-8, 8, 60)[:, None]
    check(factors * normal(60, 24, seed=1), centroids)
    check(normal(60, 24, seed=1), torch.cat([centroids, 1e7 * centroids[:2]]))
    check((normal(60, 24, seed=1) * 2000).half(), (centroids * 2000).half())


def test_rows_that_are_not_finite_keep_to_themselves() -> None:
    for dtype in (torch.float32, torch.float16):
        points, centroids = normal(140, 24, seed=1, dtype=dtype), normal(70, 24, seed=2, dtype=dtype)
        clean = launch(kmeans_assign, points, centroids)
        points[3, 1], points[5] = torch.nan, torch.inf
        assignment, sqdistance = launch(kmeans_assign, points, centroids)
        others = torch.ones(140, dtype=torch.bool)
        others[[3, 5]] = False
        assert torch.equal(assignment[others], clean[0][others]) and torch.equal(sqdistance[others], clean[1][others])
        assert not sqdistance[[3, 5]].isfinite().any()
        assert ((assignment >= 0) & (assignment < 70)).all()


def test_no_points_and_one_centroid() -> None:
    assignment, sqdistance = check(normal(0, 24, seed=1), normal(3, 24, seed=2))
    assert assignment.shape == sqdistance.shape == (0,)
    check(normal(9, 24, seed=1), normal(1, 24, seed=2))
    assignment, sqdistance = launch(kmeans_assign, torch.full((2, 3), torch.nan), torch.zeros(1, 3))
    assert assignment.tolist() == [0, 0] and sqdistance.isnan().all()


def test_strides() -> None:
    check(normal(16, 90, seed=1).T, normal(60, 32, seed=2)[::2, ::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alignment(dtype: torch.dtype) -> None:
    tensors = normal(90, 24, seed=1, dtype=dtype), normal(30, 24, seed=2)
    found, expected = launch(kmeans_assign, *tensors, misaligned=True), check(*tensors)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=3e-6, atol=0)


def test_repeats_to_the_bit() -> None:
    tensors = normal(150, 64, seed=1), normal(200, 64, seed=2)
    first, second = (launch(kmeans_assign, *tensors) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
