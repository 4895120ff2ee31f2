"""``kmeans_update_delta``: the rows that moved, summed by where they went and by where they were."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffprune.kernels.triton import DTYPES, Case, refuse_inputs
from diffprune.kernels.triton.segments import order_by_label, segment_sums


def refuse(points: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> str | None:
    """Only CUDA tensors."""
    return refuse_inputs(points, sums, dtypes=(*DTYPES, torch.float64)) or refuse_inputs(
        moved, old, new, counts, dtypes=(torch.int32, torch.int64)
    )


def run(points: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update_delta.py``. Reads the rows that moved twice, and no others."""
    joined, joins = _sums(points, moved, new, len(sums))
    left, leaves = _sums(points, moved, old, len(sums))
    return sums + joined - left, counts + joins - leaves


def aot_cases() -> Iterator[Case]:
    """A tenth of ImageNet's images move."""
    for depth in (384, 768, 1024):
        for dtype in (*DTYPES, torch.float64):
            points = torch.empty(1281167, depth, dtype=dtype, device="meta")
            moved = torch.empty(128000, dtype=torch.int64, device="meta")
            label = torch.empty(128000, dtype=torch.int32, device="meta")
            sums = torch.empty(1000, depth, dtype=torch.float64, device="meta")
            counts = torch.empty(1000, dtype=torch.int64, device="meta")
            args = points, moved, label, label, sums, counts
            quick = (depth, dtype) == (768, torch.float16)
            yield Case(f"K=1000 D={depth} {dtype}".replace("torch.", ""), args, quick)


def _sums(points: Tensor, moved: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order, starts = order_by_label(labels, k)
    return segment_sums(points, moved[order], starts), starts.diff()
