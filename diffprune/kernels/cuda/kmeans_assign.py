"""``kmeans_assign`` by float16 products on tensor cores that are certified, and float64 where they cannot decide.

argmin ‖x − c‖² is argmax v with v = x·c' − h, c' = c − μ and h = ‖c‖²/2 less a constant, whatever the centre μ. The
products of x̂ and ĉ', rounded to float16, give v up to a bound E that the roundings, which are known exactly, the norms
and the tensor cores' additions imply. Of each row the two largest v and a bound of all others are kept: where the first
leads by more than 2E it is certainly the nearest; where only the second is as near, the two are compared in float64.
Other rows are put on a list: their products are made once more, and the centroids within 2E of the first, most often a
few, are compared in float64; all centroids only where these are more than 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, HALF, address, refuse_inputs, where

TILE = 256
"""Centroids are padded to a multiple of it, with values that never win."""


def refuse(points: Tensor, centroids: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(points, centroids, dtypes=(*HALF, torch.float32))


def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``."""
    n = len(points)
    assignment = torch.empty(n, dtype=torch.int32, device=points.device)
    sqdistance = torch.empty(n, dtype=torch.float32, device=points.device)
    if n > 0:
        search(points, centroids, assignment, sqdistance, points.new_zeros(2, 1 + n, dtype=torch.int32))
    return assignment, sqdistance


def search(points: Tensor, centroids: Tensor, assignment: Tensor, sqdistance: Tensor, lists: Tensor) -> None:
    """Writes ``assignment`` and ``sqdistance``; N at least 1.

    ``lists`` [2, 1 + N] int32, zeros, gets how many rows two candidates did not decide, and which; and likewise those
    of them that were compared with all centroids.

    Float16 points are multiplied as they are if D is a multiple of 8; others from a float16 copy, less the centre.
    """
    (n, dimensions), k = points.shape, centroids.shape[0]
    again, rest = lists
    points, centroids = points.contiguous(), centroids.float().contiguous()
    as_they_are = points.dtype == torch.float16 and dimensions % 8 == 0 and points.data_ptr() % 16 == 0
    padded = -(-dimensions // 8) * 8
    centre = centroids.double().mean(dim=0).float()
    rounded, offset, unscale, limits = _round_centroids(centroids, centre, padded, as_they_are)
    values = torch.empty(n, 4, dtype=torch.float32, device=points.device)
    candidates = torch.empty(n, 2, dtype=torch.int32, device=points.device)
    with where(points) as (extension, here):
        x, scale, norms = points, None, None
        if not as_they_are:
            x = torch.empty(n, padded, dtype=torch.float16, device=points.device)
            scale = torch.empty(n, dtype=torch.float32, device=points.device)
            norms = torch.empty(n, 2, dtype=torch.float32, device=points.device)
            arrays = map(address, (points, centre, x, scale, norms))
            extension.kmeans_round(here, DTYPES[points.dtype], *arrays, n, dimensions, padded)
        arrays = map(address, (x, rounded, offset, scale, unscale, values, candidates))
        extension.kmeans_search(here, *arrays, n, k, padded, len(offset))
        arrays = map(address, (points, centroids, values, candidates, norms, limits))
        results = map(address, (again, assignment, sqdistance))
        rounding = tensor_core_error(padded)
        extension.kmeans_decide(here, DTYPES[points.dtype], *arrays, rounding, *results, n, k, dimensions)
        few = torch.empty(extension.kmeans_search_again_few(here, n), dtype=torch.int32, device=points.device)
        arrays = map(address, (points, centroids, x, rounded, offset, scale, unscale, values, again, few, rest))
        results = map(address, (assignment, sqdistance))
        extension.kmeans_search_again(here, DTYPES[points.dtype], *arrays, *results, n, k, dimensions, padded)


def tensor_core_error(depth: int) -> float:
    """Bound of |computed − exact| of a product, relative to the norms' product.

    A tensor core adds 4, 8 or 16 exact products to an accumulator at a time, aligned to the largest of them and cut off
    below its last bit, and cuts the result (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ 2021): at
    most 24 errors of 2^-23 of the largest number per 16 products, and no number exceeds the norms' product.
    """
    return 2.0**-23 * 24 * (-(-depth // 16) + 1)


def _round_centroids(
    centroids: Tensor, centre: Tensor, padded: int, whole: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ĉ' [K, padded] float16, h [columns] float32, the factor that undoes ĉ's scale [1], and the limits [3].

    whole: the points keep their centre, so that h has to make up for it.
    """
    k, dimensions = centroids.shape
    exact = centroids.double() - centre.double()
    largest = exact.abs().amax().clamp(min=1e-30)
    scale = torch.exp2(14 - torch.ceil(torch.log2(largest)))  # the largest number is in [2^13, 2^14]
    rounded = centroids.new_zeros(k, padded, dtype=torch.float16)
    rounded[:, :dimensions] = exact * scale
    error = exact - rounded[:, :dimensions].double() / scale
    offset = exact.square().sum(dim=1) / 2
    if whole:
        offset += exact @ centre.double()
    columns = centroids.new_full((-(-k // TILE) * TILE,), 3e38)
    columns[:k] = offset.clamp(-1e38, 1e38)
    limits = torch.stack([exact.norm(dim=1).amax(), error.norm(dim=1).amax(), offset.abs().amax()]) * (1 + 1e-6)
    return rounded, columns, (1 / scale).float().view(1), limits.float()
