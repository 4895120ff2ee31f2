"""``kmeans_update``: rows sorted by label, then one sum per cluster, or per 512 rows of it (see ``segments.py``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffprune.kernels.triton import DTYPES, Case, refuse_inputs
from diffprune.kernels.triton.segments import order_by_label, segment_sums

QUICK = ("N=1281167 K=1000 D=768 float16",)
"""Cases of the default test run."""


def refuse(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> str | None:
    """Only CUDA tensors."""
    return refuse_inputs(points, weights, dtypes=(*DTYPES, torch.float64)) or refuse_inputs(
        assignment, dtypes=(torch.int32,)
    )


def run(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update.py``. Sums of more than ``segments.PIECE`` rows add partial sums of so many rows."""
    order, starts = order_by_label(assignment, k)
    sums = segment_sums(points, order, starts, weights)
    if weights is None:
        return sums, starts.diff()
    return sums, segment_sums(weights[:, None], order, starts)[:, 0].clone()


def aot_cases() -> Iterator[Case]:
    """ImageNet's images, embeddings of usual sizes; with weights; rows of float64; and a codebook."""
    cases = [(1281167, 1000, depth, dtype, False) for depth in (384, 768, 1024) for dtype in (*DTYPES, torch.float64)]
    cases += [(1281167, 50000, 768, torch.float16, True), (262144, 512, 4, torch.float32, False)]
    for n, k, depth, dtype, weighted in cases:
        points = torch.empty(n, depth, dtype=dtype, device="meta")
        assignment = torch.empty(n, dtype=torch.int32, device="meta")
        weights = torch.empty(n, device="meta") if weighted else None
        label = f"N={n} K={k} D={depth} {dtype}{' weighted' if weighted else ''}".replace("torch.", "")
        yield Case(label, (points, assignment, k, weights), quick=label in QUICK)
