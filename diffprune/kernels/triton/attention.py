"""``attention`` in FlashAttention's form: a program has some queries, and the keys and values pass by once.

A head of a size between powers of two (72, 96) is two tiles side by side, the second as narrow as its rest allows: 72
is 64 + 16, of which 8 are masked, where one tile would be 128.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, gpu, refuse_inputs

MAX_HEAD_SIZE = 128
LOG2_E = 1.4426950408889634


def refuse(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and heads that fit."""
    if query.shape[3] > MAX_HEAD_SIZE:
        return f"needs heads of size at most {MAX_HEAD_SIZE}, got {query.shape[3]}"
    return refuse_inputs(query, key, value)


def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/attention.py``."""
    query, key, value = dense(query), dense(key), dense(value)
    samples, heads, tokens, size = query.shape
    out = empty_tokens(query)
    logsumexp = torch.empty(samples, heads, tokens, dtype=torch.float32, device=query.device)
    if out.numel() > 0:
        tile, options = config(tokens, size, query.element_size(), gpu(query))
        tensors = query, key, value, out, logsumexp
        steps, unit = strides(*tensors[:4])
        grid = samples * heads * triton.cdiv(tokens, tile["ROWS"])
        sizes = {"UNIT": unit, **widths(size), **tile}
        _kernel[(grid,)](*tensors, *steps, heads, tokens, LOG2_E * size**-0.5, **sizes, **options)
    return out, logsumexp


def config(tokens: int, size: int, itemsize: int, gpu: Gpu) -> tuple[dict[str, int], dict[str, int]]:
    """ROWS queries per program against COLUMNS keys at a time; warps and pipeline stages."""
    if itemsize == 4:
        return {"ROWS": 32, "COLUMNS": 32 if size <= 64 else 16}, {"num_warps": 4, "num_stages": 1}
    rows = 128 if tokens > 64 else 64
    return {"ROWS": rows, "COLUMNS": 64}, {"num_warps": rows // 16, "num_stages": 2}


def widths(size: int) -> dict[str, int]:
    """The head's SIZE as tiles of WIDTH and TAIL elements; both at least 16, for the matrix units, or no tail."""
    width = max(16, 1 << (size.bit_length() - 1))
    return {"SIZE": size, "WIDTH": width, "TAIL": max(16, triton.next_power_of_2(size - width)) if size > width else 0}


def strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of samples, heads and tokens, tensor by tensor, in units of so many elements.

    A unit is 16 bytes if they all fit it: so the compiler learns that it may load so much at once, even where a stride
    (72) is not divisible by 16, which is all it looks at by itself.
    """
    steps = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 16 // tensors[0].element_size()
    if any(step % unit for step in steps):
        unit = 1
    return [step // unit for step in steps], unit


def dense(tensor: Tensor) -> Tensor:
    """With consecutive elements in a head, else as it is."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def empty_tokens(like: Tensor) -> Tensor:
    """[B, H, T, d] that lies in memory as [B, T, H, d]."""
    samples, heads, tokens, size = like.shape
    return torch.empty(samples, tokens, heads, size, dtype=like.dtype, device=like.device).transpose(1, 2)


def aot_cases() -> Iterator[Case]:
    """All head sizes of the contract at 256 tokens, as chunks of one projection: DiT-S/2 has 6 of 64, XL/2 16 of 72."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (32, 64, 72, 96, 128):
            label = f"{size} {str(dtype).removeprefix('torch.')}"
            yield Case(label, projection(256, size, dtype), quick=label in ("64 bfloat16", "72 bfloat16"))
    yield Case("72 bfloat16, 64 tokens", projection(64, 72, torch.bfloat16))


def projection(tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value of 64 samples with 6 heads on the device "meta"."""
    packed = torch.empty(64, tokens, 3, 6, size, dtype=dtype, device="meta")
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


@triton.jit
def load_tile(
    ptr,  # [tokens, SIZE]
    rows,  # [N] int32
    tokens,
    stride,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """[N, WIDTH] elements of these rows from column FIRST on; 0 beyond the rows and columns that there are."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows < tokens)[:, None] & (columns < SIZE)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, tokens, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """The counterpart of ``load_tile``."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows < tokens)[:, None] & (columns < SIZE)[None, :]
    place = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    query_ptr,  # [B, heads, tokens, SIZE], as the next three
    key_ptr,
    value_ptr,
    out_ptr,
    logsumexp_ptr,  # [B, heads, tokens]
    query_sample,  # strides, in units
    query_head,
    query_token,
    key_sample,
    key_head,
    key_token,
    value_sample,
    value_head,
    value_token,
    out_sample,
    out_head,
    out_token,
    heads,
    tokens,
    scale,  # of Q·Kᵀ, for exponentials to base 2
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    number = tl.program_id(0) // tiles
    sample, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    query_ptr += (sample * query_sample + head * query_head) * UNIT
    key_ptr += (sample * key_sample + head * key_head) * UNIT
    value_ptr += (sample * value_sample + head * value_head) * UNIT
    out_ptr += (sample * out_sample + head * out_head) * UNIT

    query = load_tile(query_ptr, rows, tokens, query_token * UNIT, 0, WIDTH, SIZE)
    out = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    if TAIL:
        query_tail = load_tile(query_ptr, rows, tokens, query_token * UNIT, WIDTH, TAIL, SIZE)
        out_tail = tl.zeros((ROWS, TAIL), dtype=tl.float32)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = load_tile(key_ptr, columns, tokens, key_token * UNIT, 0, WIDTH, SIZE)
        scores = tl.dot(query, key.T, input_precision="ieee")
        if TAIL:
            key_tail = load_tile(key_ptr, columns, tokens, key_token * UNIT, WIDTH, TAIL, SIZE)
            scores = tl.dot(query_tail, key_tail.T, scores, input_precision="ieee")
        # Product and difference in one line, as the backward has them: a GPU fuses both or neither, and so rounds both
        # weights alike. ``scale`` is positive.
        scores = tl.where((columns < tokens)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        highest = higher
        value = load_tile(value_ptr, columns, tokens, value_token * UNIT, 0, WIDTH, SIZE)
        weights = weights.to(value.dtype)
        out = tl.dot(weights, value, out * shrink[:, None], input_precision="ieee")
        if TAIL:
            value_tail = load_tile(value_ptr, columns, tokens, value_token * UNIT, WIDTH, TAIL, SIZE)
            out_tail = tl.dot(weights, value_tail, out_tail * shrink[:, None], input_precision="ieee")
    store_tile(out_ptr, out / total[:, None], rows, tokens, out_token * UNIT, 0, WIDTH, SIZE)
    if TAIL:
        store_tile(out_ptr, out_tail / total[:, None], rows, tokens, out_token * UNIT, WIDTH, TAIL, SIZE)
    logsumexp = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(logsumexp_ptr + number.to(tl.int64) * tokens + rows, logsumexp, mask=rows < tokens)
