"""The op ``kmeans_update_delta``: sums and numbers of the points of each centroid, from those of another assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("kmeans_update_delta")


@any_array
def kmeans_update_delta(
    points: Array,
    old_assignment: Array,
    new_assignment: Array,
    sums: Array,
    counts: Array,
    *,
    impl: str = "auto",
) -> tuple[Array, Array]:
    """What ``kmeans_update`` returns for the new assignment, from what it returned for the old one.

    Reads only the points whose centroid changed: in k-means' later rounds, few.

    Args:
        points: [N, D], float16, bfloat16, float32 or float64; N may be 0; finite where the centroid changed: a sum
            never loses a NaN or an infinity again.
        old_assignment: [N] int32, from 0 to K - 1.
        new_assignment: [N] int32, from 0 to K - 1.
        sums: [K, D] float64, of ``old_assignment``; K at least 1.
        counts: [K] int64, of ``old_assignment``.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        sums: [K, D] float64: the old sums, plus the sum of the points that came, less the sum of those that left, each
            added as ``kmeans_update`` adds. Rounding adds up from call to call (about 1e-16 of the sums each), so the
            sums are not the bytes of ``kmeans_update``, and a centroid that lost all its points may keep a sum near 0.
        counts: [K] int64, exact.

    Deterministic. Waits for the number of points that changed. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device, and for an assignment out of range.
    """
    return _op(points.detach(), old_assignment, new_assignment, sums.detach(), counts, impl)


@custom_op("kmeans_update_delta")
def _op(
    points: Tensor, old_assignment: Tensor, new_assignment: Tensor, sums: Tensor, counts: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(points, old_assignment, new_assignment, sums, counts)
    for name, assignment in (("old_assignment", old_assignment), ("new_assignment", new_assignment)):
        if len(assignment) > 0:
            lowest, highest = (int(value) for value in assignment.aminmax())
            if lowest < 0 or highest >= len(sums):
                raise ValueError(f"expected {name} from 0 to {len(sums) - 1}, got {lowest} to {highest}")
    moved = (old_assignment != new_assignment).nonzero()[:, 0]
    return _implementations(impl, points, moved, old_assignment[moved], new_assignment[moved], sums, counts)


@_op.register_fake
def _fake(
    points: Tensor, old_assignment: Tensor, new_assignment: Tensor, sums: Tensor, counts: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(points, old_assignment, new_assignment, sums, counts)
    return torch.empty_like(sums), torch.empty_like(counts)


def _check(points: Tensor, old_assignment: Tensor, new_assignment: Tensor, sums: Tensor, counts: Tensor) -> None:
    expect("points", points, "N, D")
    expect("old_assignment", old_assignment, "N", (torch.int32,))
    expect("new_assignment", new_assignment, "N", (torch.int32,))
    expect("sums", sums, "K, D", (torch.float64,))
    expect("counts", counts, "K", (torch.int64,))
    lengths = points.shape[0], old_assignment.shape[0], new_assignment.shape[0]
    expect_equal("N", "points, old_assignment and new_assignment", *lengths)
    expect_equal("D", "points and sums", points.shape[1], sums.shape[1])
    expect_equal("K", "sums and counts", sums.shape[0], counts.shape[0])
    tensors = points, old_assignment, new_assignment, sums, counts
    expect_equal(
        "device", "points, old_assignment, new_assignment, sums and counts", *(tensor.device for tensor in tensors)
    )
    if sums.shape[0] == 0:
        raise ValueError(f"expected sums [K, D] with K at least 1, got {tuple(sums.shape)}")
