"""``kmeans_assign``: float16 products on tensor cores, certified, and float64 where they cannot decide.

Of each row's products (see ``search.py``) the two largest v, their columns and a bound of all other v are kept. Where
the first leads by more than their error, it is the nearest; where only the second is as near, the two are compared in
float64. Other rows are put on a list: their products are made once more, and the columns that are as near as the error
says, most often a few, are compared in float64; all columns only where these are more than WIDTH. The distance is then
Σ(x − c)². (Of points like CLIP's 0.1% to 1% are listed. In float64 against all columns they would take about as long as
the products of all: a GPU has 30 times fewer of its operations.)

2·N·K·D operations on tensor cores; at N = 1.28M, D = 768, K = 1000 these take an H100 2.0 ms at its peak, and bind for
float16 points, which are read twice (4·N·D bytes, 1.3 ms at 3 TB/s, the first time behind the products). Others are
read twice and their float16 copy is written and read (12·N·D bytes for float32, 3.9 ms): memory binds below K = 2000.
The price of no copy: where float16 points lie far from the origin for their spread, more rows are listed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, gpu, refuse_inputs
from diffprune.kernels.triton.search import (
    NONE,
    Rounded,
    inverse,
    nearest_integer,
    numbers,
    part,
    round_both,
    tolerance,
)
from diffprune.kernels.triton.tiles import MAX_ROWS, describable, load, matrix, power_of_2, source

LOWEST = tl.constexpr(NONE)

FILTER = torch.float16
"""What points and centroids are rounded to for the products: float16; or int8, twice as fast on tensor cores, which
decides fewer rows. The answer is the same. No GPU has measured int8: set this to ``torch.int8`` to try it."""

WIDTH = 32
"""Columns that are compared with a listed row at most, if not all are."""

MOST_REGISTERS = 168
"""Per thread of those in float64. Without a limit, here and below, the compiler sets itself a lower one, and spills."""

MAX_INT8 = 2**17
"""Products of so many pairs of int8 fit into int32."""

QUICK = ("N=1281167 K=1000 D=768 float32", "N=1281167 K=1000 D=768 float16 by int8")
"""Cases of the default test run."""


def refuse(points: Tensor, centroids: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    if max(*points.shape, *centroids.shape) > MAX_ROWS:
        return f"needs sizes of at most {MAX_ROWS}, got {tuple(points.shape)} and {tuple(centroids.shape)}"
    if torch.int8 == FILTER and points.shape[1] > MAX_INT8:
        return f"needs D of at most {MAX_INT8} with FILTER int8, got {points.shape[1]}"
    return refuse_inputs(points, centroids)


def run(points: Tensor, centroids: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``. ``dtype``: of the products' operands, by default FILTER."""
    dtype = dtype or FILTER
    points, centroids = matrix(points), matrix(centroids)
    (n, depth), k = points.shape, len(centroids)
    assignment = torch.empty(n, dtype=torch.int32, device=points.device)
    sqdistance = torch.empty(n, dtype=torch.float32, device=points.device)
    if n == 0:
        return assignment, sqdistance
    rounded = value = index = least = rows = counts = None
    tile = config(k, depth, gpu(points), dtype.itemsize)[0]
    if k > 1:
        rounded = round_both(points, centroids, dtype)
        value, index = search(rounded)
        least = torch.empty(n, dtype=torch.float32, device=points.device)
        rows = torch.empty(n, dtype=torch.int32, device=points.device)
        counts = torch.zeros(2, dtype=torch.int32, device=points.device)  # of this list, and of the next
    height = 8
    _decide_kernel[(triton.cdiv(n, height),)](
        points,
        centroids,
        None if rounded is None else rounded.centre,
        None if rounded is None else rounded.scale,
        None if rounded is None else rounded.limits,
        value,
        index,
        assignment,
        sqdistance,
        least,
        rows,
        counts,
        n,
        k,
        depth,
        points.stride(0),
        centroids.stride(0),
        TAG=(tile["COLUMNS"] + 8) * 2.0**-23,
        ONLY=k == 1,
        WHOLE=rounded is not None and rounded.whole,
        INT8=dtype == torch.int8,
        ROWS=height,
        STEP=power_of_2(depth, 16, 128),
        maxnreg=MOST_REGISTERS,
    )
    if rounded is not None:
        rest = _search_listed(points, centroids, rounded, least, rows, counts, assignment, sqdistance)
        _search_all(points, centroids, rest, counts[1:], assignment, sqdistance)
    return assignment, sqdistance


def search(rounded: Rounded) -> tuple[Tensor, Tensor]:
    """[N, 3] float32: the two largest v and a bound of all others; [N, 2] int32: the columns of the two.

    The columns are in the last bits of v (as many as the tile has columns need), so v is off by that much. A column
    from K on stands for none.
    """
    (n, depth), k = rounded.rows.shape, len(rounded.columns)
    device = gpu(rounded.rows)
    tile, options = config(k, depth, device, rounded.rows.element_size())
    described = describable(device, rounded.rows, rounded.columns)
    value = torch.empty(n, 3, dtype=torch.float32, device=rounded.rows.device)
    index = torch.empty(n, 2, dtype=torch.int32, device=rounded.rows.device)
    _search_kernel[(triton.cdiv(n, tile["ROWS"]),)](
        source(rounded.rows, (tile["ROWS"], tile["STEP"]), described),
        source(rounded.columns, (tile["COLUMNS"], tile["STEP"]), described),
        rounded.scale,
        rounded.offset,
        rounded.limits,
        value,
        index,
        n,
        k,
        depth,
        rounded.rows.stride(0),
        rounded.columns.stride(0),
        DESCRIBED=described,
        INT8=rounded.rows.dtype == torch.int8,
        **tile,
        **options,
    )
    return value, index


def config(k: int, depth: int, gpu: Gpu, itemsize: int = 2) -> tuple[dict[str, int], dict[str, int]]:
    """The tile of the products and the STEP through D; and warps and pipeline stages.

    Wide tiles, because a point is read from the L2 cache once per tile of centroids, and a centroid once per tile of
    points. 128 points at a time: those that all multiprocessors work on stay in the L2 cache.
    """
    # Triton 3.6 has no tcgen05 for int8: its sums lie in registers there, and 256 columns of them spill.
    wide = gpu.capability >= 90 and (itemsize > 1 or gpu.capability < 100)
    rows, columns = 128, power_of_2(k, 16, 256 if wide else 128)
    step = power_of_2(depth, 32 // itemsize, (128 if gpu.capability >= 90 else 64) // itemsize)
    stages = min(3 if gpu.capability >= 90 else 4, (gpu.shared - 16384) // ((rows + columns) * step * itemsize))
    return {"ROWS": rows, "COLUMNS": columns, "STEP": step}, {"num_warps": 8, "num_stages": stages}


def aot_cases() -> Iterator[Case]:
    """ImageNet's images, usual embeddings; many centroids; one, as k-means++ asks for; a codebook; the least."""
    sizes = [(1281167, 1000, depth) for depth in (384, 768, 1024)]
    sizes += [(1281167, 50000, 768), (1281167, 1, 768), (262144, 512, 4), (100000, 10, 100), (1, 2, 1)]
    for n, k, depth in sizes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            points = torch.empty(n, depth, dtype=dtype, device="meta")
            centroids = torch.empty(k, depth, device="meta")
            label = f"N={n} K={k} D={depth} {dtype}".replace("torch.", "")
            yield Case(label, (points, centroids), quick=label in QUICK)
        if k > 1:
            points = torch.empty(n, depth, dtype=torch.float16, device="meta")
            label = f"N={n} K={k} D={depth} float16 by int8"
            yield Case(label, (points, centroids, torch.int8), quick=label in QUICK)


def _search_listed(
    points: Tensor,
    centroids: Tensor,
    rounded: Rounded,
    least: Tensor,
    rows: Tensor,
    counts: Tensor,
    assignment: Tensor,
    sqdistance: Tensor,
) -> Tensor:
    """Search the first ``counts`` [0] of ``rows`` among the columns whose v is at least ``least`` [N].

    Returns a list like it of the rows that have too many of these, and adds their number to ``counts`` [1].
    """
    (n, depth), k, height, size = points.shape, len(centroids), 64, rounded.rows.element_size()
    # Few programs have rows, and each goes through D and K alone: in large steps, if it loads 16 bytes at a time.
    even = all(x.shape[1] % 16 == x.stride(0) % 16 == 0 for x in (rounded.rows, rounded.columns))
    programs = min(triton.cdiv(n, height), 2 * gpu(points).processors)
    rest = torch.empty(n, dtype=torch.int32, device=points.device)
    _search_listed_kernel[(programs,)](
        points,
        centroids,
        rounded.rows,
        rounded.columns,
        rounded.scale,
        rounded.offset,
        rounded.limits,
        least,
        rows,
        counts,
        torch.empty(programs, height, WIDTH, dtype=torch.int32, device=points.device),
        rest,
        assignment,
        sqdistance,
        k,
        depth,
        points.stride(0),
        centroids.stride(0),
        rounded.rows.stride(0),
        rounded.columns.stride(0),
        INT8=rounded.rows.dtype == torch.int8,
        WIDTH=WIDTH,
        ROWS=height,
        COLUMNS=128 if even else 64,
        STEP=power_of_2(depth, 32 // size, (128 if even else 64) // size),
        CHUNK=power_of_2(depth, 8, 16),
        num_warps=8,
        maxnreg=255,
    )
    return rest


def _search_all(
    points: Tensor, centroids: Tensor, rows: Tensor, count: Tensor, assignment: Tensor, sqdistance: Tensor
) -> None:
    """Search the first ``count`` [1] of ``rows`` among all columns in float64."""
    height, depth = 4, points.shape[1]
    _search_all_kernel[(min(triton.cdiv(len(points), height), 4 * gpu(points).processors),)](
        points,
        centroids,
        rows,
        count,
        assignment,
        sqdistance,
        len(centroids),
        depth,
        points.stride(0),
        centroids.stride(0),
        ROWS=height,
        COLUMNS=16,
        STEP=power_of_2(depth, 8, 32),
        maxnreg=MOST_REGISTERS,
    )


@triton.jit
def _search_kernel(
    points,  # [n, depth] float16 or int8: a pointer, or a descriptor if DESCRIBED
    centroids,  # [k, depth]: likewise
    scale_ptr,  # [n], or None: 1
    offset_ptr,  # [k]
    limits_ptr,  # [6]
    value_ptr,  # [n, 3]
    index_ptr,  # [n, 2]
    n,
    k,
    depth,
    points_stride,
    centroids_stride,
    DESCRIBED: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The two largest v = scale·step/unit · points · centroidsᵀ − offset of each row, and the largest of all others."""
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    pair = 2 * tl.arange(0, COLUMNS // 2)
    scale = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(limits_ptr) * tl.load(limits_ptr + 5)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + r, mask=r < n, other=0.0)
    first = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    second, third = first, first
    first_column = tl.zeros((ROWS,), dtype=tl.int32)
    second_column = first_column

    for column in range(0, k, COLUMNS):
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INT8 else tl.float32)
        for d in range(0, depth, STEP):
            x = load(points, row, d, n, depth, points_stride, ROWS, STEP, DESCRIBED)
            y = load(centroids, column, d, k, depth, centroids_stride, COLUMNS, STEP, DESCRIBED)
            product = tl.dot(x, y.T, product, out_dtype=product.dtype)
        c = column + tl.arange(0, COLUMNS)
        offset = tl.load(offset_ptr + c, mask=c < k, other=-LOWEST)
        v = product.to(tl.float32) * scale[:, None] - offset[None, :]
        # Neighbours are in one thread: half as many v to go through, if the smaller ones count as others.
        even, odd = tl.split(tl.reshape(v, (ROWS, COLUMNS // 2, 2)))
        others = tl.max(tl.minimum(even, odd), axis=1)
        # Each larger one gets its own last bits, the column. So a maximum knows where it came from, and none are equal.
        larger = tl.maximum(even, odd).to(tl.int32, bitcast=True) & -COLUMNS | pair[None, :] | (odd > even).to(tl.int32)
        larger = larger.to(tl.float32, bitcast=True)
        top = tl.max(larger, axis=1)
        larger = tl.where(larger == top[:, None], LOWEST, larger)
        next = tl.max(larger, axis=1)
        larger = tl.where(larger == next[:, None], LOWEST, larger)
        others = tl.maximum(others, tl.max(larger, axis=1))
        top_column = column + (top.to(tl.int32, bitcast=True) & (COLUMNS - 1))
        next_column = column + (next.to(tl.int32, bitcast=True) & (COLUMNS - 1))

        third = tl.maximum(tl.maximum(third, others), tl.maximum(tl.minimum(first, next), tl.minimum(second, top)))
        leads, passes = top > first, next > second
        loser, loser_column = tl.minimum(first, top), tl.where(leads, first_column, top_column)
        second = tl.maximum(second, next)
        second_column = tl.where(passes, next_column, second_column)
        second_column = tl.where(loser > second, loser_column, second_column)
        second = tl.maximum(second, loser)
        first_column = tl.where(leads, top_column, first_column)
        first = tl.maximum(first, top)

    inside = r < n
    place = r.to(tl.int64)
    tl.store(value_ptr + place * 3, first, mask=inside)
    tl.store(value_ptr + place * 3 + 1, second, mask=inside)
    tl.store(value_ptr + place * 3 + 2, third, mask=inside)
    tl.store(index_ptr + place * 2, first_column, mask=inside)
    tl.store(index_ptr + place * 2 + 1, second_column, mask=inside)


@triton.jit
def _decide_kernel(
    points_ptr,  # [n, depth]
    centroids_ptr,  # [k, depth]
    centre_ptr,  # [depth], here and below: None if ONLY
    scale_ptr,  # [n], or None if WHOLE
    limits_ptr,  # [6]
    value_ptr,  # [n, 3]
    index_ptr,  # [n, 2]
    assignment_ptr,  # [n]
    sqdistance_ptr,  # [n]
    least_ptr,  # [n] float32, of the rows listed
    rows_ptr,  # [n]: rows whose v do not decide between two, in any order
    counts_ptr,  # [2]: how many; and 0
    n,
    k,
    depth,
    points_stride,
    centroids_stride,
    TAG: tl.constexpr,
    ONLY: tl.constexpr,
    WHOLE: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The nearest centroid and Σ(x − c)² of each row; a list of those whose v do not decide between two, and the least
    v that the nearest of such a row may have."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < n
    row = r.to(tl.int64)
    x_ptr = points_ptr + row * points_stride
    nearest = tl.zeros((ROWS,), dtype=tl.int32)
    if not ONLY:
        nearest = tl.minimum(tl.load(index_ptr + row * 2, mask=inside, other=0), k - 1)
        up = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(limits_ptr)
        if not WHOLE:  # measured in units of the row's own
            scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
            unit = up * scale
            up = 1 / scale if INT8 else inverse(scale)
    c_ptr = centroids_ptr + nearest.to(tl.int64) * centroids_stride

    squares = tl.zeros((ROWS, STEP), dtype=tl.float32)
    size, lost, reach = squares, squares, squares
    infinite = tl.zeros((ROWS, STEP), dtype=tl.int1)
    for d in range(0, depth, STEP):
        x = numbers(x_ptr, inside, d, depth, STEP)
        difference = x - numbers(c_ptr, inside, d, depth, STEP)
        squares += difference * difference
        if not ONLY:
            infinite = infinite | ((tl.abs(x) < float("inf")) == 0)
            y = (x - part(centre_ptr, d, depth, STEP)[None, :]) * up[:, None]
            reach += y * y
            if WHOLE:
                size += (x * up[:, None]) * (x * up[:, None])
            else:
                error = y - (nearest_integer(y) if INT8 else y.to(tl.float16).to(tl.float32))
                lost += error * error
    sqdistance = tl.sum(squares, axis=1)

    if not ONLY:
        length, error = tl.sqrt(tl.sum(reach, axis=1)), tl.sqrt(tl.sum(lost, axis=1))
        if WHOLE:
            product = tl.sqrt(tl.sum(size, axis=1))
        else:
            length, error = length * unit, error * unit
            product = length + error
        twice = tolerance(product, error, length, limits_ptr, depth)
        first = tl.load(value_ptr + row * 3, mask=inside, other=0.0)
        second = tl.load(value_ptr + row * 3 + 1, mask=inside, other=0.0)
        third = tl.load(value_ptr + row * 3 + 2, mask=inside, other=0.0)
        of_two = first - third > twice + TAG * (tl.abs(first) + tl.abs(third))
        certain = first - second > twice + TAG * (tl.abs(first) + tl.abs(second))
        finite = tl.max(infinite.to(tl.int32), axis=1) == 0
        close = finite & of_two & (certain == 0)
        more = finite & inside & (of_two == 0)
        if tl.max((close | more).to(tl.int32), axis=0) > 0:
            place = tl.atomic_add(counts_ptr + tl.zeros((ROWS,), dtype=tl.int32), 1, mask=more)
            tl.store(rows_ptr + place, r, mask=more)
            tl.store(least_ptr + row, first - twice - 2 * TAG * tl.abs(first), mask=more)
            other = tl.minimum(tl.load(index_ptr + row * 2 + 1, mask=inside, other=0), k - 1)
            other_ptr = centroids_ptr + other.to(tl.int64) * centroids_stride
            to_nearest = tl.zeros((ROWS, STEP), dtype=tl.float64)
            to_other = to_nearest
            for d in range(0, depth, STEP):
                x = numbers(x_ptr, close, d, depth, STEP).to(tl.float64)
                difference = x - numbers(c_ptr, close, d, depth, STEP).to(tl.float64)
                to_nearest += difference * difference
                difference = x - numbers(other_ptr, close, d, depth, STEP).to(tl.float64)
                to_other += difference * difference
            one, two = tl.sum(to_nearest, axis=1), tl.sum(to_other, axis=1)
            swap = close & ((two < one) | ((two == one) & (other < nearest)))
            nearest = tl.where(swap, other, nearest)
            sqdistance = tl.where(close, tl.minimum(one, two).to(tl.float32), sqdistance)
    tl.store(assignment_ptr + row, nearest, mask=inside)
    tl.store(sqdistance_ptr + row, sqdistance, mask=inside)


@triton.jit
def _search_listed_kernel(
    points_ptr,  # [n, depth]
    centroids_ptr,  # [k, depth]
    rounded_ptr,  # [n, depth] float16 or int8
    columns_ptr,  # [k, depth], likewise
    scale_ptr,  # [n], or None: 1
    offset_ptr,  # [k]
    limits_ptr,  # [6]
    least_ptr,  # [n]: no v of the nearest is below
    rows_ptr,  # [count, and more]
    counts_ptr,  # [2]: count; and 0, to which the length of rest is added
    few_ptr,  # [programs, ROWS, WIDTH]: columns, each program's own
    rest_ptr,  # [n]: rows with more than WIDTH columns, in any order
    assignment_ptr,  # [n]
    sqdistance_ptr,  # [n]
    k,
    depth,
    points_stride,
    centroids_stride,
    rounded_stride,
    columns_stride,
    INT8: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The nearest centroid of the ``count`` rows listed, by float64 differences to those that may be it."""
    count = tl.load(counts_ptr)
    own = tl.arange(0, ROWS)
    few = few_ptr + (tl.program_id(0) * ROWS + own) * WIDTH
    unit = tl.load(limits_ptr) * tl.load(limits_ptr + 5)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + own
        listed = entry < count
        row = tl.load(rows_ptr + entry, mask=listed, other=0).to(tl.int64)  # of those not listed row 0 is read
        least = tl.load(least_ptr + row, mask=listed, other=float("inf"))
        scale = tl.zeros((ROWS,), dtype=tl.float32) + unit
        if scale_ptr is not None:
            scale *= tl.load(scale_ptr + row)
        found = tl.zeros((ROWS,), dtype=tl.int32)
        for column in range(0, k, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INT8 else tl.float32)
            for d in range(0, depth, STEP):
                inner = d + tl.arange(0, STEP)
                x_place = row[:, None] * rounded_stride + inner[None, :]
                y_place = c.to(tl.int64)[:, None] * columns_stride + inner[None, :]
                x = tl.load(rounded_ptr + x_place, mask=(inner < depth)[None, :], other=0)
                y = tl.load(columns_ptr + y_place, mask=(c < k)[:, None] & (inner < depth)[None, :], other=0)
                product = tl.dot(x, y.T, product, out_dtype=product.dtype)
            offset = tl.load(offset_ptr + c, mask=c < k, other=0.0)
            v = product.to(tl.float32) * scale[:, None] - offset[None, :]
            near = ((v >= least[:, None]) & (c < k)[None, :]).to(tl.int32)
            place = found[:, None] + tl.cumsum(near, axis=1) - near
            kept = (near > 0) & (place < WIDTH)
            tl.store(few[:, None] + place, tl.zeros((ROWS, COLUMNS), dtype=tl.int32) + c[None, :], mask=kept)
            found += tl.sum(near, axis=1)
        tl.debug_barrier()  # other threads read what these wrote
        decided = (found > 0) & (found <= WIDTH)  # of a row that is not listed none is near
        smallest = tl.full((ROWS,), float("inf"), dtype=tl.float64)
        nearest = tl.zeros((ROWS,), dtype=tl.int32)
        x_ptr = points_ptr + row * points_stride
        for i in range(tl.max(tl.where(decided, found, 0), axis=0)):
            there = i < found
            c = tl.load(few + i)
            c_ptr = centroids_ptr + c.to(tl.int64) * centroids_stride
            squares = tl.zeros((ROWS, CHUNK), dtype=tl.float64)
            for d in range(0, depth, CHUNK):
                x = numbers(x_ptr, there, d, depth, CHUNK).to(tl.float64)
                difference = x - numbers(c_ptr, there, d, depth, CHUNK).to(tl.float64)
                squares += difference * difference
            distance = tl.where(there, tl.sum(squares, axis=1), float("inf"))
            nearest = tl.where(distance < smallest, c, nearest)  # columns ascend: of equal ones the first stays
            smallest = tl.minimum(smallest, distance)
        tl.store(assignment_ptr + row, nearest, mask=decided)
        tl.store(sqdistance_ptr + row, smallest.to(tl.float32), mask=decided)
        more = listed & (decided == 0)
        place = tl.atomic_add(counts_ptr + 1 + tl.zeros((ROWS,), dtype=tl.int32), 1, mask=more)
        tl.store(rest_ptr + place, row.to(tl.int32), mask=more)
        tl.debug_barrier()  # before the next rows' columns are written


@triton.jit
def _search_all_kernel(
    points_ptr,  # [n, depth]
    centroids_ptr,  # [k, depth]
    rows_ptr,  # [count, and more]
    count_ptr,  # [1]
    assignment_ptr,  # [n]
    sqdistance_ptr,  # [n]
    k,
    depth,
    points_stride,
    centroids_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The nearest centroid of the ``count`` rows listed, by float64 differences; programs share out the list."""
    count = tl.load(count_ptr)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        entry = start + tl.arange(0, ROWS)
        listed = entry < count
        row = tl.load(rows_ptr + entry, mask=listed, other=0).to(tl.int64)
        x_ptr = points_ptr + row * points_stride
        smallest = tl.full((ROWS,), float("inf"), dtype=tl.float64)
        nearest = tl.zeros((ROWS,), dtype=tl.int32)
        for column in range(0, k, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            c_ptr = centroids_ptr + c.to(tl.int64) * centroids_stride
            squares = tl.zeros((ROWS, COLUMNS, STEP), dtype=tl.float64)
            for d in range(0, depth, STEP):
                x = numbers(x_ptr, listed, d, depth, STEP).to(tl.float64)
                y = numbers(c_ptr, c < k, d, depth, STEP).to(tl.float64)
                difference = x[:, None, :] - y[None, :, :]
                squares += difference * difference
            distance = tl.where((c < k)[None, :], tl.sum(squares, axis=2), float("inf"))
            least = tl.min(distance, axis=1)
            found = tl.min(tl.where(distance == least[:, None], c[None, :], k), axis=1)
            nearest = tl.where(least < smallest, found, nearest)
            smallest = tl.minimum(smallest, least)
        tl.store(assignment_ptr + row, nearest, mask=listed)
        tl.store(sqdistance_ptr + row, smallest.to(tl.float32), mask=listed)
