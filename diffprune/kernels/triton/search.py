"""Nearest columns of each row by float16 products of known error: what ``kmeans_assign`` and ``pairwise_topk`` share.

‖x − c‖² is the smaller, the larger v = (x − μ)·C − ‖C‖²/2 with C = c − μ is (``rounded_columns.py``). Tensor cores find
v from rounded values up to an error E. So a column whose v is more than 2E below another one's is certainly farther,
and the few that are not are compared in float64. Ties are never decided by v: E is above 0.

Rows and columns may be rounded to int8 instead, whose products run at twice the rate and are exact: a row to multiples
of its largest entry / 127, columns to multiples of the largest of all / 127. What is lost is 40 times as much, so v
decides fewer rows; the same bound says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.rounded_columns import centre_of, round_columns

LEAST, MOST = tl.constexpr(2.0**-100), tl.constexpr(2.0**122)
"""Of the scales for int8."""

NONE = -3e38
"""A v below all others that says: no column. Finite, because the bits of an infinity and a tag would be a NaN."""


@dataclass(frozen=True)
class Rounded:
    """Rows and columns in float16 or int8, and what ``tolerance`` needs to know of the columns."""

    rows: Tensor  # [N, D] float16 or int8
    scale: (
        Tensor | None
    )  # [N] float32: x − μ is about scale · x̂, a power of two for float16; None: the rows as they came
    columns: Tensor  # [M, D], likewise
    offset: Tensor  # [M] float32: v = scale · step / unit · product − offset
    centre: Tensor  # [D] float32
    limits: Tensor  # [6] float32, see ``round_columns``

    @property
    def whole(self) -> bool:
        """The rows were float16 before, so they are multiplied as they came: not centred, not rounded, not copied."""
        return self.scale is None


def round_both(rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float16, neighbours: int = 1) -> Rounded:
    """``rows`` [N, D] with consecutive columns, ``columns`` [M, D]; N, M and D at least 1. Waits for no result.

    ``dtype``: float16, or int8. ``neighbours``: how many of each row are looked for. Rows of float16 keep the centre.
    """
    whole = rows.dtype == dtype
    centre, rounded = centre_of(columns), _padded(*columns.shape, columns, dtype)
    offset, limits = round_columns(columns, centre, rounded, whole=whole, neighbours=neighbours)
    if whole:
        return Rounded(rows, None, rounded, offset, centre, limits)
    (n, depth), step = rows.shape, 256
    narrow = _padded(n, depth, rows, dtype)
    scale = torch.empty(n, dtype=torch.float32, device=rows.device)
    height = 8
    _round_kernel[(triton.cdiv(n, height),)](
        rows, centre, narrow, scale, n, depth, rows.stride(0), narrow.stride(0), ROWS=height, STEP=step
    )
    return Rounded(narrow, scale, rounded, offset, centre, limits)


def _padded(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns], each row at a multiple of 16 bytes, as the copy engine wants."""
    unit = 16 // dtype.itemsize
    return torch.empty(rows, triton.cdiv(columns, unit) * unit, dtype=dtype, device=like.device)[:, :columns]


@triton.jit
def tolerance(
    size,  # ‖x̂‖: of what was multiplied
    lost,  # ‖x − μ − x̂‖ (0 if the rows are as they came)
    reach,  # ‖x − μ‖
    limits_ptr,  # [6], see Rounded
    depth,
):
    """2E for the columns that can be nearest. Norms are float32 sums of D squares.

    |v − exact| is at most, in this order, of the rounding of the rows, of the columns and of the sums:
    lost·‖Ĉ‖ + reach·‖C − Ĉ‖ + τ·size·‖Ĉ‖, and some 2^-23 of v and of the offset. ‖C − Ĉ‖ <= ratio·(‖C‖ + floor): the
    floor is for entries that are subnormal in float16.

    τ = (D + 16)·1.5·2^-23. A tensor core adds b exact products to an accumulator at a time, aligned to the largest of
    them, cuts each off below the 24 bits of float32 and cuts the sum: at most b + 2 errors of 2^-23 of the largest
    (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021: b is 4 on V100 and 8
    on A100; Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004, for H100 and B200, which
    keep more bits). No partial sum exceeds size·‖Ĉ‖. τ allows for 1.5 such errors per product: enough for b >= 4.

    Of all ‖C‖ up to 2·reach + ‖C'‖ + 2·slope, C' that of the neighbours-th smallest norm: a column of a larger norm is
    farther than these, and the larger its norm, the faster (x − μ)·C − ‖C‖²/2 falls against the error. So a far outlier
    does not loosen the bound.

    v overflows only where a row is over 1e20 times as far from the columns as these are from one another: then all its
    distances are the same in float64.
    """
    smallest, largest = tl.load(limits_ptr + 1), tl.load(limits_ptr + 2)
    ratio, kept = tl.load(limits_ptr + 3), tl.load(limits_ptr + 4)
    width = depth * 1.0
    sums = (width + 16) * 0.00000017881393432617188  # 1.5 * 2^-23
    floor = 0.00006103515625 * tl.sqrt(width)  # 2^-14
    slope = lost + (lost + reach) * ratio + size * (1.01 + ratio) * (sums + 1.2e-7) + 1.2e-7 * (kept + reach)
    length = tl.minimum(2 * reach + smallest + 2 * slope, largest) + floor
    return (2.02 + 5e-7 * width) * length * (slope + 1.2e-7 * length) + 1e-30  # 1% for what is of second order


@triton.jit
def _round_kernel(
    rows_ptr,  # [rows, depth]
    centre_ptr,  # [depth]
    rounded_ptr,  # [rows, depth] float16 or int8
    scale_ptr,  # [rows]
    rows,
    depth,
    rows_stride,
    rounded_stride,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """rounded = (x − μ) / scale. In float16 scale = 2^-e and the largest entry from 2^13 to 2^14; in int8 up to 127."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    row = r.to(tl.int64)
    largest = tl.zeros((ROWS,), dtype=tl.float32)
    for k in range(0, depth, STEP):
        x = numbers(rows_ptr + row * rows_stride, inside, k, depth, STEP)
        largest = tl.maximum(largest, tl.max(tl.abs(x - part(centre_ptr, k, depth, STEP)[None, :]), axis=1))
    if rounded_ptr.dtype.element_ty == tl.int8:
        scale = tl.minimum(tl.maximum(largest * (1 / 127), LEAST), MOST)
        # 8 bits, rounded up: so scale · x̂ is exact. Dividing by it rounds, which moves no x̂ that is not at a half.
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
        up = 1 / scale
    else:
        # An entry below 2^-113 is not brought up all the way: 2^e would overflow.
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 14)
        scale = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
        up = inverse(scale)
    tl.store(scale_ptr + r, scale, mask=inside)
    for k in range(0, depth, STEP):
        x = numbers(rows_ptr + row * rows_stride, inside, k, depth, STEP)
        y = (x - part(centre_ptr, k, depth, STEP)[None, :]) * up[:, None]
        c = k + tl.arange(0, STEP)
        places = rounded_ptr + row[:, None] * rounded_stride + c[None, :]
        if rounded_ptr.dtype.element_ty == tl.int8:
            y = nearest_integer(y)
        tl.store(places, y.to(rounded_ptr.dtype.element_ty), mask=inside[:, None] & (c < depth)[None, :])


@triton.jit
def nearest_integer(y):
    """Of numbers below 2^22."""
    return (y + 12582912.0) - 12582912.0  # 1.5 · 2^23


@triton.jit
def inverse(scale):
    """1 / scale, exactly, for a power of two of ``_round_kernel``, of which the inverse is a normal number."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def numbers(row_ptr, inside, k, depth, STEP: tl.constexpr):
    """[ROWS, STEP] float32 from column k of the rows that start at ``row_ptr`` [ROWS]; 0 outside of the matrix."""
    c = k + tl.arange(0, STEP)
    return tl.load(row_ptr[:, None] + c[None, :], mask=inside[:, None] & (c < depth)[None, :], other=0.0).to(tl.float32)


@triton.jit
def part(ptr, k, depth, STEP: tl.constexpr):
    """[STEP] float32 from column k of one row; 0 outside of it."""
    c = k + tl.arange(0, STEP)
    return tl.load(ptr + c, mask=c < depth, other=0.0).to(tl.float32)
