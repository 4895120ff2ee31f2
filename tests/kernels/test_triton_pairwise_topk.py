"""Triton's ``pairwise_topk`` against a full sort of float64 distances, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import pairwise_topk
from diffprune.kernels.knn_radius import knn_radius
from diffprune.kernels.triton import pairwise_topk as selecting
from diffprune.kernels.triton.tiles import MAX_ROWS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of overflow and NaN


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute(queries: Tensor, points: Tensor, exclude_self: bool = False) -> Tensor:
    """[N, M] float64 distances; a query's own is infinite."""
    distances = (queries.double()[:, None] - points.double()).square().sum(dim=2).sqrt()
    return distances.fill_diagonal_(torch.inf) if exclude_self else distances


def check(queries: Tensor, points: Tensor, k: int, exclude_self: bool = False) -> Tensor:
    """The indices found, after a comparison with all distances."""
    distances, indices = launch(pairwise_topk, queries, points, k, exclude_self)
    assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)
    nearest, order = brute(queries, points, exclude_self).sort(dim=1, stable=True)
    assert torch.equal(indices, order[:, :k])
    torch.testing.assert_close(distances, nearest[:, :k].float(), rtol=1e-6, atol=0)
    return indices


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shares of the points, in tiles of 16 by 16."""
    original = selecting.config

    def config(*args: object) -> tuple[dict[str, int], int, dict[str, int]]:
        tile, _, options = original(*args)
        return tile | {"ROWS": 16, "COLUMNS": 16}, 3, options

    monkeypatch.setattr(selecting, "config", config)


@pytest.mark.parametrize(
    ("dtype", "n", "m", "d", "k"),
    [
        (torch.float32, 1, 1, 1, 1),
        (torch.float16, 1, 1, 1, 1),
        (torch.bfloat16, 3, 2, 1, 2),
        (torch.float16, 3, 2, 1, 2),
        (torch.float32, 4, 37, 130, 3),
        (torch.float16, 4, 37, 130, 3),
        (torch.bfloat16, 1, 150, 20, 33),
    ],
)
def test_odd_sizes(dtype: torch.dtype, n: int, m: int, d: int, k: int) -> None:
    check(normal(n, d, dtype=dtype), normal(m, d, seed=1), k)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize(("k", "exclude_self"), [(1, False), (3, True), (57, False)])
def test_shares(k: int, exclude_self: bool) -> None:
    points = normal(19 if exclude_self else 83, 6)
    check(points if exclude_self else points[:1], points, k, exclude_self)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("times", [4, 20])
def test_ties_go_to_the_smallest_index(times: int) -> None:
    """In lists of all that tie, and where more tie than a list holds."""
    points = torch.tensor([[0.0], [1.0], [-1.0], [1.0]]).repeat(times, 1)
    indices = check(torch.tensor([[0.0], [1.0], [5.0]]), points, 6)
    assert indices[1].tolist() == [1, 3, 5, 7, 9, 11]


def test_all_points_equal() -> None:
    """No v decides, and all points are compared: but not a query with itself, nor with what lies behind the points."""
    points = normal(1, 5).repeat(18, 1)
    check(points, points, 2, exclude_self=True)
    more = torch.cat([points, torch.zeros(5, 5)]).to(DEVICE)
    distances, indices = selecting.run(more[-2:], more[:-5], 2, False)
    assert indices.tolist() == [[0, 1], [0, 1]]
    assert (distances > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_duplicates_see_one_another(dtype: torch.dtype) -> None:
    points = (normal(5, 40) + 1e3).to(dtype).repeat(2, 1)
    distances, indices = launch(pairwise_topk, points, points, 1, True)
    assert indices[:, 0].tolist() == [*range(5, 10), *range(5)]
    assert torch.equal(distances, torch.zeros(10, 1))


@pytest.mark.usefixtures("shares")
def test_near_ties_are_decided_exactly() -> None:
    """More distances than a list holds differ by 1e-7 of them; those of the rounded points, by much more."""
    direction = torch.nn.functional.normalize(normal(30, 50, dtype=torch.float64), dim=1)
    points = (direction * (1 + 1e-6 * normal(30, 1, seed=1, dtype=torch.float64))).float()
    query = torch.zeros(1, 50)
    assert not torch.equal(brute(query, points.half()).argsort(), brute(query, points).argsort())
    points = torch.cat([points, 2 * normal(60, 50, seed=2)])  # the first share holds all that are near
    check(query, points, 5)


@pytest.mark.usefixtures("shares")
def test_as_many_near_ties_as_a_list_holds() -> None:
    """While another query of the tile still finds nearer points: what the list holds of the ties must stay."""
    direction = torch.nn.functional.normalize(normal(160, 50, dtype=torch.float64), dim=1)
    ties = (direction * (1 + 1e-6 * normal(160, 1, seed=1, dtype=torch.float64))).float()
    far = 3 * torch.nn.functional.normalize(normal(32, 50, seed=2), dim=1)
    for start in range(0, 160, 16):
        points = torch.cat([ties[start : start + 16], far, far[:1].repeat(96, 1)])
        check(torch.cat([torch.zeros(1, 50), far[:3]]), points, 5)


def test_far_clusters_with_close_members() -> None:
    """Within a cluster the distances are below the rounding of the products."""
    points = (1e4 * normal(3, 1, 8) + 0.1 * normal(3, 4, 8, seed=1)).flatten(0, 1)
    check(points, points, 2, exclude_self=True)


@pytest.mark.parametrize("near", [0.03125, 0.0625, 0.125])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_neighbours_far_beyond_the_nearest(near: float, exclude_self: bool) -> None:
    """The error of what is not nearest: two points, of which float16 takes the second nearest for the third."""
    long, x = 1 + 0.98 * 2**-11, near
    v = x * long - long**2 / 2 - 0.4 * x * 0.98 * 2**-11  # its own, less what rounding takes from the other's v
    other = (2 * (x * 0.5 - v) - 0.25) ** 0.5
    points = torch.tensor([[x, 0.0], [0, 0], [long, 0], [0.5, other], [-1.25, -0.5], [-1.25, 0], [-1.25, 0]])
    for k in (2, 3, 4):
        check(points if exclude_self else points[:1], points[not exclude_self :], k, exclude_self)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_near_points_are_compared(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What products rule out is not read again: it may have become the query. Also with a far outlier."""
    points, original = normal(200, 90), selecting.round_both
    points[7] = 1e4
    queries = (points[[3, 50, 99]] + 0.3 * normal(3, 90, seed=1)).to(dtype)
    distances = brute(queries, points)
    far = (distances > 1.05 * distances.kthvalue(2, dim=1, keepdim=True).values).all(dim=0).nonzero()[:, 0]
    assert len(far) > 50
    spoilt = points.clone()
    for i in range(3):
        spoilt[far[i::3]] = queries[i].float()
    monkeypatch.setattr(selecting, "round_both", lambda rows, _, **more: original(rows, points.to(DEVICE), **more))
    found, indices = selecting.run(queries.to(DEVICE), spoilt.to(DEVICE), 2, False)
    assert torch.equal(indices.cpu(), distances.argsort(dim=1)[:, :2])
    assert (found > 1).all()


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_values_at_the_ends_of_float32(scale: float) -> None:
    queries, points = normal(4, 16) * scale, normal(30, 16, seed=1) * scale
    _, indices = launch(pairwise_topk, queries, points, 3)
    assert torch.equal(indices, brute(queries, points).argsort(dim=1)[:, :3])


def test_queries_that_are_not_finite() -> None:
    queries, points = normal(5, 200), normal(40, 200, seed=1)
    queries[1, 0], queries[2, 199], queries[4] = torch.nan, torch.inf, torch.nan
    distances, indices = launch(pairwise_topk, queries, points, 3)
    assert distances.isfinite().all(dim=1).tolist() == [True, False, False, True, False]
    assert not distances[[1, 2, 4]].isfinite().any()
    assert ((indices >= 0) & (indices < 40)).all()
    assert torch.equal(indices[[0, 3]], brute(queries[[0, 3]], points).argsort(dim=1)[:, :3])


def test_no_queries() -> None:
    distances, indices = launch(pairwise_topk, torch.empty(0, 3), torch.ones(5, 3), 2)
    assert distances.shape == indices.shape == (0, 2)


def test_refuses_many_neighbours() -> None:
    with pytest.raises(NotImplementedError, match="triton: needs k of at most 64, got 65"):
        pairwise_topk(torch.ones(2, 2, device=DEVICE), torch.ones(70, 2, device=DEVICE), 65, impl="triton")


def test_refuses_more_rows_than_its_indices_hold() -> None:
    many, one = torch.zeros(1, 1).expand(MAX_ROWS + 1, 1), torch.zeros(1, 1)
    assert "sizes of at most 2147482624, got (2147482625, 1) and (1, 1)" in selecting.refuse(many, one, 1, False)
    assert "sizes of at most" in selecting.refuse(one, many, 1, False)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_knn_radius(impl: str) -> None:
    points = torch.cat([normal(5, 6), normal(5, 6)[:2]])
    radius = launch(knn_radius, points, 2) if impl == "triton" else knn_radius(points, 2, impl=impl)
    expected = brute(points, points, exclude_self=True).sort(dim=1).values[:, 1]
    assert radius.shape == (7,)
    torch.testing.assert_close(radius.double(), expected, rtol=1e-6, atol=0)
