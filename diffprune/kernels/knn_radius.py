"""``knn_radius``: how far the k-th nearest neighbour is. Not an op of its own: a column of ``pairwise_topk``."""

from __future__ import annotations

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect
from diffprune.kernels.pairwise_topk import pairwise_topk


@any_array
def knn_radius(points: Array, k: int, *, impl: str = "auto") -> Array:
    """The distance of each point to its ``k``-th nearest other one: the radius of the balls of precision and recall.

    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019, section 3.

    Args:
        points: [N, D], float16, bfloat16, float32 or float64; finite.
        k: from 1 to N - 1.
        impl: "auto", or the implementation of ``pairwise_topk`` to run, see ``dispatch``.

    Returns:
        radius: [N] float32 (float64 if ``points`` are), not squared; 0 where k others equal the point.

    Never holds an N×N matrix, except in ``reference``. Not differentiable. Raises ValueError as ``pairwise_topk`` does.
    """
    expect("points", points, "N, D")
    return pairwise_topk(points, points, k, exclude_self=True, impl=impl)[0][:, -1]
