"""``kmeans_assign`` by 8-bit products that are certified, float32 and float64 where they cannot decide.

See ``csrc/cpu/kmeans_assign.h`` for the bound. 2·N·K·D integer operations, in 7 bits on AVX2 and 8 bits on AMX and on
AVX-512 with VNNI, and about 10 float32 distances per point; no temporary grows with N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffprune.kernels.cpp import TYPES, as_rows, extension, instruction_set
from diffprune.kernels.cpu import refuse_device
from diffprune.kernels.cpu.search import centre_of

MAX_DIMENSIONS = 65536
"""255 · 127 · D has to fit in 32 bits."""


def refuse(points: Tensor, centroids: Tensor) -> str | None:
    """Only CPU tensors of float16, bfloat16 or float32, and D up to ``MAX_DIMENSIONS``."""
    wrong = [tensor.dtype for tensor in (points, centroids) if tensor.dtype == torch.float64]
    if wrong:
        return f"needs float16, bfloat16 or float32, got {wrong[0]}"
    if points.shape[1] > MAX_DIMENSIONS:
        return f"needs D of at most {MAX_DIMENSIONS}, got {points.shape[1]}"
    return refuse_device(points, centroids)


def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``."""
    return prepare(centroids)(points)


def prepare(centroids: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``run`` to the same centroids, whose codes and bounds are made once."""
    search = Search(centroids, instruction_set())
    return lambda points: search(points)[:2]


class Search:
    """Nearest of ``centroids`` [K, D], by the instruction set ``variant``."""

    def __init__(self, centroids: Tensor, variant: str) -> None:
        self.centroids = centroids.float().contiguous()
        self.centre = centre_of(self.centroids, torch.float32)
        addresses = self.centroids.data_ptr(), self.centre.data_ptr()
        self.search = extension().CentroidSearch(variant, *addresses, *centroids.shape, torch.get_num_threads())

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Assignment, squared distance, and how many pairs were compared in float32 and in float64."""
        assignment = points.new_empty(points.shape[0], dtype=torch.int32)
        sqdistance = points.new_empty(points.shape[0], dtype=torch.float32)
        points = as_rows(points)
        counts = self.search.assign(
            points.data_ptr(),
            TYPES[points.dtype],
            points.stride(0),
            points.shape[0],
            assignment.data_ptr(),
            sqdistance.data_ptr(),
            torch.get_num_threads(),
        )
        return assignment, sqdistance, counts
