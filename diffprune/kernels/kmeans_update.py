"""The op ``kmeans_update``: the sum and the number of the points of each centroid."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import FLOATING, expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("kmeans_update")


@any_array
def kmeans_update(
    points: Array,
    assignment: Array,
    k: int,
    weights: Array | None = None,
    *,
    impl: str = "auto",
    check_values: bool = True,
) -> tuple[Array, Array]:
    """The sum of the points assigned to each centroid, and how many they are: sums / counts are the new centroids.

    Args:
        points: [N, D], float16, bfloat16, float32 or float64; N may be 0. A NaN or an infinity reaches the sum of its
            own centroid only.
        assignment: [N] int32, from 0 to k - 1.
        k: number of centroids, at least 1.
        weights: [N] of a floating dtype: sum w·x and Σw instead.
        impl: "auto", or the implementation to run, see ``dispatch``.
        check_values: False spares the look at the assignment's values, for which the host waits where it is on a GPU.
            Memory that is not the op's own is written then if one is out of range.

    Returns:
        sums: [K, D] float64; 0 for a centroid without points.
        counts: [K] int64; with weights [K] float64, the total weight.

    Deterministic: each sum adds its points one by one in row order in float64, so that the bytes are the same whatever
    the number of threads. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device, and for an assignment out of range.
    """
    return _op(points.detach(), assignment, k, None if weights is None else weights.detach(), impl, check_values)


@custom_op("kmeans_update")
def _op(
    points: Tensor,
    assignment: Tensor,
    k: int,
    weights: Tensor | None = None,
    impl: str = "auto",
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    _check(points, assignment, k, weights)
    if check_values and len(assignment) > 0:
        lowest, highest = (int(value) for value in assignment.aminmax())
        if lowest < 0 or highest >= k:
            raise ValueError(f"expected assignment from 0 to {k - 1}, got {lowest} to {highest}")
    return _implementations(impl, points, assignment, k, weights)


@_op.register_fake
def _fake(
    points: Tensor,
    assignment: Tensor,
    k: int,
    weights: Tensor | None = None,
    impl: str = "auto",
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    _check(points, assignment, k, weights)
    counts_dtype = torch.int64 if weights is None else torch.float64
    return points.new_empty(k, points.shape[1], dtype=torch.float64), points.new_empty(k, dtype=counts_dtype)


def _check(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> None:
    expect("points", points, "N, D")
    expect("assignment", assignment, "N", (torch.int32,))
    expect_equal("N", "points and assignment", points.shape[0], assignment.shape[0])
    expect_equal("device", "points and assignment", points.device, assignment.device)
    if weights is not None:
        expect("weights", weights, "N", FLOATING)
        expect_equal("N", "points and weights", points.shape[0], weights.shape[0])
        expect_equal("device", "points and weights", points.device, weights.device)
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
