"""The op ``pairwise_topk``: the nearest points of each query."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype, expect, expect_equal, expect_finite
from diffprune.kernels.dispatch import Op
from diffprune.kernels.magnitudes import squaring_shift
from diffprune.kernels.registration import custom_op

_implementations = Op("pairwise_topk")


@any_array
def pairwise_topk(
    queries: Array, points: Array, k: int, exclude_self: bool = False, *, impl: str = "auto"
) -> tuple[Array, Array]:
    """The ``k`` points nearest to each query, by Euclidean distance.

    Args:
        queries: [N, D], float16, bfloat16, float32 or float64; N may be 0. A query that holds a NaN or an infinity gets
            distances that are not finite; its indices mean nothing.
        points: [M, D], any of these dtypes, on the same device; D at least 1; finite.
        k: from 1 to M, or to M - 1 with ``exclude_self``.
        exclude_self: ``queries`` are ``points``: query i does not see point i (but sees its duplicates).
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        distances: [N, k] float32 (float64 if an input is), ascending, not squared; exactly 0 between equal vectors.
        indices: [N, k] int64. Exact: by float64 distances of the given values, up to the rounding of float64; ties go
            to the smallest index. In float64, distances under 2^-200 of the largest value may count as 0.

    Never holds an N×M matrix, except in ``reference``. Not differentiable.
    Raises ValueError for another rank, shape, dtype, device or k, and for points that are not finite.
    """
    return _op(queries.detach(), points.detach(), k, exclude_self, impl)


@custom_op("pairwise_topk")
def _op(
    queries: Tensor, points: Tensor, k: int, exclude_self: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(queries, points, k, exclude_self)
    expect_finite("points", points)
    # Squares of float32 and half precision neither overflow nor vanish in float64.
    shift = squaring_shift(queries, points) if compute_dtype(queries, points) == torch.float64 else 0
    if shift == 0:
        return _implementations(impl, queries, points, k, exclude_self)
    queries, points = queries.double() * 2.0**shift, points.double() * 2.0**shift
    distances, indices = _implementations(impl, queries, points, k, exclude_self)
    return distances * 2.0**-shift, indices


@_op.register_fake
def _fake(
    queries: Tensor, points: Tensor, k: int, exclude_self: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(queries, points, k, exclude_self)
    distances = queries.new_empty(queries.shape[0], k, dtype=compute_dtype(queries, points))
    return distances, queries.new_empty(queries.shape[0], k, dtype=torch.int64)


def _check(queries: Tensor, points: Tensor, k: int, exclude_self: bool) -> None:
    expect("queries", queries, "N, D")
    expect("points", points, "M, D")
    expect_equal("D", "queries and points", queries.shape[1], points.shape[1])
    expect_equal("device", "queries and points", queries.device, points.device)
    if points.shape[1] == 0:
        raise ValueError(f"expected points [M, D] with D at least 1, got {tuple(points.shape)}")
    if exclude_self:
        expect_equal("length", "queries and points (exclude_self)", queries.shape[0], points.shape[0])
    available = points.shape[0] - int(exclude_self)  # a symbolic size less a bool is an error in PyTorch 2.11
    if not 1 <= k <= available:
        others = " other than the query" if exclude_self else ""
        raise ValueError(f"expected k from 1 to the {available} points{others}, got {k}")
