"""The op ``kmeans_assign``: the nearest centroid of each point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype, expect, expect_equal, expect_finite
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("kmeans_assign")


@any_array
def kmeans_assign(
    points: Array, centroids: Array, *, impl: str = "auto", check_values: bool = True
) -> tuple[Array, Array]:
    """The nearest centroid of each point, and the squared Euclidean distance to it.

    Args:
        points: [N, D], float16, bfloat16, float32 or float64; N may be 0. A point that holds a NaN or an infinity gets
            a distance that is not finite; its assignment means nothing.
        centroids: [K, D], any of these dtypes, on the same device; K and D at least 1; finite.
        impl: "auto", or the implementation to run, see ``dispatch``.
        check_values: False spares the look at the centroids' values, for which the host waits where they are on a GPU.
            The answer means nothing then if they are not finite.

    Returns:
        assignment: [N] int32. Exact: the smallest float64 distance of the given values, up to the rounding of float64;
            ties go to the smallest index.
        sqdistance: [N] float32 (float64 if an input is), Σ(x − c)² over the differences: exactly 0 where the point
            equals its centroid.

    Never holds an N×K matrix, except in ``reference``. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device, and for centroids that are not finite.
    """
    return _op(points.detach(), centroids.detach(), impl, check_values)


class NearestOf:
    """``kmeans_assign`` to the same centroids, block after block: what an implementation needs of them alone is made
    once. Values are not checked; the centroids must not be changed meanwhile."""

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids.detach()
        self._prepared: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """``points`` [N, D]: assignment [N] int32 and squared distance [N]."""
        _check(points, self.centroids)
        module = _implementations.choose("auto", points, self.centroids)
        if not hasattr(module, "prepare"):
            return kmeans_assign(points, self.centroids, check_values=False)
        if module.__name__ not in self._prepared:
            self._prepared[module.__name__] = module.prepare(self.centroids)
        return self._prepared[module.__name__](points.detach())


@custom_op("kmeans_assign")
def _op(points: Tensor, centroids: Tensor, impl: str = "auto", check_values: bool = True) -> tuple[Tensor, Tensor]:
    _check(points, centroids)
    if check_values:
        expect_finite("centroids", centroids)
    return _implementations(impl, points, centroids)


@_op.register_fake
def _fake(points: Tensor, centroids: Tensor, impl: str = "auto", check_values: bool = True) -> tuple[Tensor, Tensor]:
    _check(points, centroids)
    rows = points.shape[0]
    sqdistance = points.new_empty(rows, dtype=compute_dtype(points, centroids))
    return points.new_empty(rows, dtype=torch.int32), sqdistance


def _check(points: Tensor, centroids: Tensor) -> None:
    expect("points", points, "N, D")
    expect("centroids", centroids, "K, D")
    expect_equal("D", "points and centroids", points.shape[1], centroids.shape[1])
    expect_equal("device", "points and centroids", points.device, centroids.device)
    if centroids.shape[0] == 0 or centroids.shape[1] == 0:
        raise ValueError(f"expected centroids [K, D] with K and D at least 1, got {tuple(centroids.shape)}")
    if centroids.shape[0] >= 2**31:
        raise ValueError(f"expected K below 2**31 centroids, which int32 can number, got {centroids.shape[0]}")
