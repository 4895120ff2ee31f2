"""``pairwise_topk``: float16 products on tensor cores that are certified, and float64 among what they leave.

Each program goes over a share of the points and keeps the LIST columns of the largest v of each query (see
``search.py``), LIST > k. If the k-th largest v of all lists leads what no list kept by more than the error, the k
nearest are among the listed; those whose v is near enough are compared in float64. Otherwise all points are.

2·N·M·D operations on tensor cores, that bind; a query that is not certain adds 3·M·D in float64, alone: data with more
than about LIST ties per query is slow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, gpu, refuse_inputs
from diffprune.kernels.triton.search import NONE, Rounded, inverse, numbers, part, round_both, tolerance
from diffprune.kernels.triton.tiles import MAX_ROWS, describable, load, matrix, power_of_2, source

MOST = 64
"""The largest k."""

LOWEST = tl.constexpr(NONE)
NOBODY = tl.constexpr(MAX_ROWS)

QUICK = ("N=10000 M=50000 D=2048 k=5 float32",)
"""Cases of the default test run."""


def refuse(queries: Tensor, points: Tensor, k: int, exclude_self: bool) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and a small k."""
    if k > MOST:
        return f"needs k of at most {MOST}, got {k}"
    if max(*queries.shape, *points.shape) > MAX_ROWS:
        return f"needs sizes of at most {MAX_ROWS}, got {tuple(queries.shape)} and {tuple(points.shape)}"
    return refuse_inputs(queries, points)


def run(queries: Tensor, points: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """See ``kernels/pairwise_topk.py``."""
    queries, points = matrix(queries), matrix(points)
    (n, depth), m = queries.shape, len(points)
    squares = torch.empty(n, k, dtype=torch.float64, device=queries.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=queries.device)
    if n == 0:
        return squares.float(), indices
    rounded = round_both(queries, points, neighbours=k + exclude_self)
    value, index, tag = search(rounded, k, exclude_self)
    _, shares, kept = value.shape
    _select_kernel[(n,)](
        queries,
        points,
        rounded.centre,
        rounded.scale,
        rounded.limits,
        value,
        index,
        squares,
        indices,
        m,
        k,
        depth,
        shares,
        queries.stride(0),
        points.stride(0),
        TAG=tag,
        EXCLUDE_SELF=exclude_self,
        WHOLE=rounded.whole,
        SHARES=power_of_2(shares, 1, 256),
        LIST=kept,
        SLOTS=power_of_2(k, 2, MOST),
        BLOCK=8,
        STEP=power_of_2(depth, 16, 128),
        maxnreg=128,  # without a limit the compiler sets itself one, and spills
    )
    return squares.sqrt().float(), indices


def search(rounded: Rounded, k: int, exclude_self: bool) -> tuple[Tensor, Tensor, float]:
    """[N, S, LIST] float32: the LIST largest v of each of S shares of the columns, in no order; [N, S, LIST] int32:
    their columns; and by how much, relatively, the column in the last bits of a v puts it off. NONE fills up."""
    (n, depth), m = rounded.rows.shape, len(rounded.columns)
    device = gpu(rounded.rows)
    tile, shares, options = config(n, m, k, depth, device)
    described = describable(device, rounded.rows, rounded.columns)
    share = triton.cdiv(triton.cdiv(m, tile["COLUMNS"]), shares) * tile["COLUMNS"]
    value = torch.empty(n, shares, tile["LIST"], dtype=torch.float32, device=rounded.rows.device)
    index = torch.empty(n, shares, tile["LIST"], dtype=torch.int32, device=rounded.rows.device)
    _search_kernel[(triton.cdiv(n, tile["ROWS"]), shares)](
        source(rounded.rows, (tile["ROWS"], tile["STEP"]), described),
        source(rounded.columns, (tile["COLUMNS"], tile["STEP"]), described),
        rounded.scale,
        rounded.offset,
        rounded.limits,
        value,
        index,
        n,
        m,
        depth,
        share,
        rounded.rows.stride(0),
        rounded.columns.stride(0),
        EXCLUDE_SELF=exclude_self,
        DESCRIBED=described,
        **tile,
        **options,
    )
    return value, index, (tile["COLUMNS"] + 8) * 2.0**-23


def config(n: int, m: int, k: int, depth: int, gpu: Gpu) -> tuple[dict[str, int], int, dict[str, int]]:
    """The tile of the products, the STEP through D and the LIST; the number of shares; warps and pipeline stages."""
    kept = power_of_2(k + 8, 16, 128)
    rows = 128 if kept <= (16 if gpu.capability >= 100 else 32) else 64  # more spills registers
    columns = power_of_2(m, 16, 128)
    step = power_of_2(depth, 16, 64 if gpu.capability >= 90 and kept < 128 else 32)
    most = min(256 // kept, triton.cdiv(m, 8 * columns))
    shares = max(1, min(most, triton.cdiv(4 * gpu.processors, triton.cdiv(n, rows))))
    options = {"num_warps": 8, "num_stages": 3, "maxnreg": 255}  # by itself Triton 3.6 makes small tiles spill
    return {"ROWS": rows, "COLUMNS": columns, "STEP": step, "LIST": kept}, shares, options


def aot_cases() -> Iterator[Case]:
    """Precision and recall over Inception or DINO features; the nearest training image; the largest k; the least."""
    sizes = [(10000, 50000, 2048, 5, False), (50000, 50000, 768, 3, True), (10000, 1281167, 1024, 1, False)]
    sizes += [
        (5000, 5000, 384, 20, True),
        (5000, 5000, 384, 40, True),
        (5000, 5000, 100, MOST, False),
        (1, 1, 1, 1, False),
    ]
    for n, m, depth, k, exclude_self in sizes:
        for dtype in (torch.float32, torch.float16):
            queries, points = (torch.empty(rows, depth, dtype=dtype, device="meta") for rows in (n, m))
            label = f"N={n} M={m} D={depth} k={k} {dtype}".replace("torch.", "")
            yield Case(label, (queries, points, k, exclude_self), quick=label in QUICK)


@triton.jit
def _search_kernel(
    queries,  # [n, depth] float16: a pointer, or a descriptor if DESCRIBED
    points,  # [m, depth] float16: likewise
    scale_ptr,  # [n], or None: 1
    offset_ptr,  # [m]
    limits_ptr,  # [6]
    value_ptr,  # [n, shares, LIST]
    index_ptr,  # [n, shares, LIST]
    n,
    m,
    depth,
    share,  # points per share, a multiple of COLUMNS
    queries_stride,
    points_stride,
    EXCLUDE_SELF: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    LIST: tl.constexpr,
):
    """The LIST largest v = scale / unit · queries · pointsᵀ − offset of each row in one share of the columns."""
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    tag = tl.arange(0, COLUMNS)
    slot = tl.arange(0, LIST)
    scale = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(limits_ptr)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + r, mask=r < n, other=0.0)
    kept = tl.full((ROWS, LIST), LOWEST, dtype=tl.float32)
    kept_column = tl.zeros((ROWS, LIST), dtype=tl.int32)
    least = tl.full((ROWS,), LOWEST, dtype=tl.float32)

    begin = tl.program_id(1) * share
    for column in range(begin, tl.minimum(begin + share, m), COLUMNS):
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for d in range(0, depth, STEP):
            x = load(queries, row, d, n, depth, queries_stride, ROWS, STEP, DESCRIBED)
            y = load(points, column, d, m, depth, points_stride, COLUMNS, STEP, DESCRIBED)
            product = tl.dot(x, y.T, product)
        c = column + tag
        v = product * scale[:, None] - tl.load(offset_ptr + c, mask=c < m, other=0.0)[None, :]
        # Each v gets its own last bits: the column. So a maximum knows where it came from, and no two are equal.
        v = (v.to(tl.int32, bitcast=True) & -COLUMNS | tag[None, :]).to(tl.float32, bitcast=True)
        ours = (c < m)[None, :] & (r < n)[:, None]
        if EXCLUDE_SELF:
            ours = ours & (c[None, :] != r[:, None])
        v = tl.where(ours, v, LOWEST)
        top = tl.max(v, axis=1)
        while tl.max((top > least).to(tl.int32), axis=0) > 0:
            place = tl.min(tl.where(kept == least[:, None], slot[None, :], LIST), axis=1)
            taken = (top > least)[:, None] & (slot[None, :] == place[:, None])
            kept = tl.where(taken, top[:, None], kept)
            top_column = column + (top.to(tl.int32, bitcast=True) & (COLUMNS - 1))
            kept_column = tl.where(taken, top_column[:, None], kept_column)
            least = tl.min(kept, axis=1)
            v = tl.where(v == top[:, None], LOWEST, v)
            top = tl.max(v, axis=1)

    list = (r.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * LIST
    tl.store(value_ptr + list[:, None] + slot[None, :], kept, mask=(r < n)[:, None])
    tl.store(index_ptr + list[:, None] + slot[None, :], kept_column, mask=(r < n)[:, None])


@triton.jit
def _select_kernel(
    queries_ptr,  # [n, depth]
    points_ptr,  # [m, depth]
    centre_ptr,  # [depth]
    scale_ptr,  # [n], or None if WHOLE
    limits_ptr,  # [6]
    value_ptr,  # [n, shares, LIST]
    index_ptr,  # [n, shares, LIST]
    squares_ptr,  # [n, k]
    indices_ptr,  # [n, k]
    m,
    k,
    depth,
    shares,
    queries_stride,
    points_stride,
    TAG: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARES: tl.constexpr,
    LIST: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The k nearest of one query's listed points, or of all points where v does not tell that they are listed."""
    r = tl.program_id(0).to(tl.int64)
    x_ptr = queries_ptr + r * queries_stride
    up = tl.load(limits_ptr)
    if not WHOLE:  # measured in units of the query's own
        scale = tl.load(scale_ptr + r)
        unit = up * scale
        up = inverse(scale)
    size = tl.zeros((STEP,), dtype=tl.float32)
    lost, reach, infinite = size, size, size
    for d in range(0, depth, STEP):
        x = part(x_ptr, d, depth, STEP)
        y = (x - part(centre_ptr, d, depth, STEP)) * up
        infinite = tl.maximum(infinite, tl.where(tl.abs(x) < float("inf"), 0.0, 1.0))
        reach += y * y
        if WHOLE:
            size += (x * up) * (x * up)
        else:
            error = y - y.to(tl.float16).to(tl.float32)
            lost += error * error
    length, error = tl.sqrt(tl.sum(reach, axis=0)), tl.sqrt(tl.sum(lost, axis=0))
    if WHOLE:
        product = tl.sqrt(tl.sum(size, axis=0))
    else:
        length, error = length * unit, error * unit
        product = length + error
    twice = tolerance(product, error, length, limits_ptr, depth)
    finite = tl.max(infinite, axis=0) == 0

    entry = tl.arange(0, SHARES * LIST)
    lists = r * shares * LIST
    leading = tl.load(value_ptr + lists + entry, mask=entry < shares * LIST, other=LOWEST)
    rest = tl.max(tl.min(tl.reshape(leading, (SHARES, LIST)), axis=1), axis=0)
    kth = tl.max(leading, axis=0)
    for _ in range(1, k):  # equal ones leave together: then kth is too low, which is safe
        leading = tl.where(leading == kth, LOWEST, leading)
        kth = tl.max(leading, axis=0)
    certain = kth - rest > twice + TAG * (tl.abs(kth) + tl.abs(rest))

    slot = tl.arange(0, SLOTS)
    kept = tl.where(slot < k, float("inf"), -float("inf")).to(tl.float64)
    kept_point = NOBODY + slot
    worst = tl.max(kept, axis=0)
    worst_point = tl.max(tl.where(kept == worst, kept_point, -1), axis=0)
    listed = tl.where(certain, shares * LIST, 0)
    count = tl.where(certain, listed, m)
    for start in range(0, tl.where(finite, count, 0), BLOCK):
        place = start + tl.arange(0, BLOCK)
        v = tl.load(value_ptr + lists + place, mask=place < listed, other=LOWEST)
        point = tl.load(index_ptr + lists + place, mask=place < listed, other=0)
        near = kth - v <= twice + TAG * (tl.abs(kth) + tl.abs(v))
        wanted = (place < count) & (near | (place >= listed))
        point = tl.where(certain, point, place)
        if EXCLUDE_SELF:
            wanted = wanted & (point != r)
        squares = tl.zeros((BLOCK, STEP), dtype=tl.float64)
        for d in range(0, tl.where(tl.max(wanted.to(tl.int32), axis=0) > 0, depth, 0), STEP):
            x = part(x_ptr, d, depth, STEP).to(tl.float64)
            y = numbers(points_ptr + point.to(tl.int64) * points_stride, wanted, d, depth, STEP).to(tl.float64)
            squares += (x[None, :] - y) * (x[None, :] - y)
        distance = tl.where(wanted, tl.sum(squares, axis=1), float("inf"))
        point = tl.where(wanted, point, 2147483647)
        best = tl.min(distance, axis=0)
        best_point = tl.min(tl.where(distance == best, point, 2147483647), axis=0)
        while (best < worst) | ((best == worst) & (best_point < worst_point)):
            replaced = (kept == worst) & (kept_point == worst_point)
            kept = tl.where(replaced, best, kept)
            kept_point = tl.where(replaced, best_point, kept_point)
            worst = tl.max(kept, axis=0)
            worst_point = tl.max(tl.where(kept == worst, kept_point, -1), axis=0)
            distance = tl.where(point == best_point, float("inf"), distance)
            point = tl.where(point == best_point, 2147483647, point)
            best = tl.min(distance, axis=0)
            best_point = tl.min(tl.where(distance == best, point, 2147483647), axis=0)

    kept = tl.where(slot < k, kept, float("inf"))
    kept_point = tl.where(slot < k, kept_point, 2147483647)
    for j in range(k):
        best = tl.min(kept, axis=0)
        best_point = tl.min(tl.where(kept == best, kept_point, 2147483647), axis=0)
        kept = tl.where(kept_point == best_point, float("inf"), kept)
        kept_point = tl.where(kept_point == best_point, 2147483647, kept_point)
        tl.store(squares_ptr + r * k + j, tl.where(finite, best, float("nan")))
        tl.store(indices_ptr + r * k + j, tl.where(finite, best_point, j))
