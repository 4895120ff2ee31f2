"""``kmeans_assign`` by 8-bit products that are certified, float32 and float64 where they cannot decide.

See ``csrc/cpu/kmeans_assign.h`` for the bound. 2·N·K·D integer operations, in 7 bits on AVX2 and 8 bits on AVX-512 with
VNNI, and about 10 float32 distances per point; no temporary grows with N.
"""

from __future__ import annotations

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
    assignment, sqdistance, _ = search(points, centroids, instruction_set())
    return assignment, sqdistance


def search(points: Tensor, centroids: Tensor, variant: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Assignment, squared distance, and how many pairs were compared in float32 and in float64."""
    assignment = points.new_empty(points.shape[0], dtype=torch.int32)
    sqdistance = points.new_empty(points.shape[0], dtype=torch.float32)
    points = as_rows(points)
    centroids = centroids.float().contiguous()
    centre = centre_of(centroids, torch.float32)
    counts = extension().kmeans_assign(
        variant,
        points.data_ptr(),
        TYPES[points.dtype],
        points.stride(0),
        centroids.data_ptr(),
        centre.data_ptr(),
        *points.shape[:1],
        *centroids.shape,
        assignment.data_ptr(),
        sqdistance.data_ptr(),
        torch.get_num_threads(),
    )
    return assignment, sqdistance, counts
