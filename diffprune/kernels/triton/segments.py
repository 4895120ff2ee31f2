"""Sums of listed rows, segment by segment: what ``kmeans_update`` and ``kmeans_update_delta`` share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton.tiles import matrix

PIECE = 512
"""Rows that one program adds up. Longer clusters are added in pieces, so that no program works long alone."""


def order_by_label(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N] int64: positions in ``labels`` [N], from 0 to k - 1, by label, then position; [K + 1] int64: label starts."""
    # A radix sort goes over the labels' bytes: half as many take half the time.
    labels, order = labels.to(torch.int16 if k <= 2**15 else torch.int32).sort(stable=True)
    names = torch.arange(k, dtype=labels.dtype, device=labels.device)
    starts = torch.searchsorted(labels, names)
    return order, torch.cat([starts, starts.new_full((1,), len(labels))])


def segment_sums(points: Tensor, order: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """[K, D] float64: the sum of the rows ``points[order[i]]``, starts[j] <= i < starts[j + 1], times their weights.

    In float64, one row after the other; PIECE of them at a time if there are more, then one piece after the other. So
    the bytes depend on nothing else. Reads each row once, and writes and reads (K + N / PIECE)·D float64. Memory binds:
    while an A100 reads numbers of 2 bytes, it could convert and add three to six times as many in float64.
    """
    points, k = matrix(points), len(starts) - 1
    pieces = (starts.diff() + PIECE - 1) // PIECE
    first = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])  # piece number, per cluster
    piece = torch.arange(k + len(order) // PIECE, device=points.device)  # no fewer than there are
    cluster = (torch.searchsorted(first, piece, right=True) - 1).clamp(max=k - 1)
    begin = starts[cluster] + (piece - first[cluster]) * PIECE
    end = torch.minimum(begin + PIECE, starts[cluster + 1])
    partial = _sums(points, order, weights, begin, end)
    return _sums(partial, None, None, first[:-1], first[1:])


def _sums(source: Tensor, order: Tensor | None, weights: Tensor | None, begin: Tensor, end: Tensor) -> Tensor:
    """[segments, D] float64: Σ source[order[i]] · weights[order[i]], begin <= i < end; 0 if there is no such i."""
    width = source.shape[1]
    sums = torch.empty(len(begin), width, dtype=torch.float64, device=source.device)
    columns = 256
    if sums.numel():
        _kernel[(len(begin), triton.cdiv(width, columns))](
            source,
            order,
            weights,
            begin,
            end,
            sums,
            width,
            source.stride(0),
            0 if weights is None else weights.stride(0),
            COLUMNS=columns,
            ROWS=8,
            num_warps=1 if source.element_size() < 8 else 2,
        )
    return sums


@triton.jit
def _kernel(
    source_ptr,  # [rows, width]
    order_ptr,  # [entries] row numbers, or None: the entries are the rows
    weights_ptr,  # [rows] or None
    begin_ptr,  # [segments]
    end_ptr,  # [segments]
    sums_ptr,  # [segments, width]
    width,
    source_stride,
    weights_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One segment's sum in COLUMNS columns. ROWS rows are loaded at a time; they are added one after the other."""
    segment = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(begin_ptr + segment), tl.load(end_ptr + segment)
    total = tl.zeros((COLUMNS,), dtype=tl.float64)
    for start in range(begin, end, ROWS):
        loaded = ()
        for i in tl.static_range(ROWS):
            row = start + i
            inside = row < end
            columns = tl.where(inside, width, 0)
            if order_ptr is not None:
                row = tl.load(order_ptr + row, mask=inside, other=0)  # row 0 where there is none
            x = tl.load(source_ptr + row * source_stride + c, mask=c < columns, other=0.0)
            if weights_ptr is not None:
                x = x.to(tl.float64) * tl.load(weights_ptr + row * weights_stride).to(tl.float64)
            loaded += (x,)
        for i in tl.static_range(ROWS):
            total += loaded[i].to(tl.float64)
    tl.store(sums_ptr + segment * width + c, total, mask=c < width)
