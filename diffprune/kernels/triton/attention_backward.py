"""``attention_backward`` in FlashAttention's form: one kernel for the queries' gradient, one for keys and values.

Each recomputes the weights tile by tile, and adds up what it writes in a fixed order. The first leaves Σ grad·out of
each query, which the second needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, attention, gpu
from diffprune.kernels.triton.attention import LOG2_E, dense, empty_tokens, load_tile, store_tile, strides, widths


def refuse(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor) -> str | None:
    """What the forward refuses."""
    return attention.refuse(query, key, value)


def run(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value; see ``kernels/attention.py``."""
    grad_out, query, key, value, out = map(dense, (grad_out, query, key, value, out))
    logsumexp = logsumexp.contiguous()
    samples, heads, tokens, size = query.shape
    grads = empty_tokens(query), empty_tokens(query), empty_tokens(query)
    delta = torch.empty(samples, heads, tokens, dtype=torch.float32, device=query.device)
    if query.numel() > 0:
        scales = size**-0.5, LOG2_E * size**-0.5
        for kernel, width, tensors in (
            (_query_kernel, "ROWS", (grad_out, query, key, value, out, grads[0])),
            (_key_value_kernel, "COLUMNS", (grad_out, query, key, value, *grads[1:])),
        ):
            tile, options = config(width, size, query.element_size(), gpu(query))
            steps, unit = strides(*tensors)
            grid = samples * heads * triton.cdiv(tokens, tile[width])
            sizes = {"UNIT": unit, **widths(size), **tile}
            kernel[(grid,)](*tensors, logsumexp, delta, *steps, heads, tokens, *scales, **sizes, **options)
    return grads


def config(own: str, size: int, itemsize: int, gpu: Gpu) -> tuple[dict[str, int], dict[str, int]]:
    """ROWS queries against COLUMNS keys, of which a program has the ``own`` ones; warps and pipeline stages."""
    other, hopper = "COLUMNS" if own == "ROWS" else "ROWS", gpu.capability >= 90
    if itemsize == 4:
        warps = 4 if size <= (72 if hopper else 96) else 8
        return {own: 32 if size <= 72 else 16, other: 16}, {"num_warps": warps, "num_stages": 1}
    # More would spill registers, as a third stage does before Hopper; with Triton 3.6 also 32 queries of heads of 128.
    least = 16 if size > 96 and not hopper and own == "COLUMNS" else 32
    many = size <= (96 if hopper else 64)
    return {own: 128, other: 64 if many else least}, {"num_warps": 8, "num_stages": 3 if hopper and size <= 32 else 2}


def aot_cases() -> Iterator[Case]:
    """Those of the forward."""
    for case in attention.aot_cases():
        query = case.args[0]
        out = empty_tokens(query)
        logsumexp = torch.empty(query.shape[:3], device="meta")
        yield replace(case, args=(torch.empty_like(out), *case.args, out, logsumexp))


@triton.jit
def _query_kernel(
    grad_out_ptr,  # [B, heads, tokens, SIZE], as the next five
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_query_ptr,
    logsumexp_ptr,  # [B, heads, tokens]
    delta_ptr,  # [B, heads, tokens]: Σ grad_out·out, written
    grad_out_sample,  # strides, in units
    grad_out_head,
    grad_out_token,
    query_sample,
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
    grad_query_sample,
    grad_query_head,
    grad_query_token,
    heads,
    tokens,
    scale,  # of Q·Kᵀ
    scale2,  # for exponentials to base 2; rounded as the forward's, so that weights are the forward's
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has ROWS queries; the keys and values pass by."""
    tiles = tl.cdiv(tokens, ROWS)
    number = tl.program_id(0) // tiles
    sample, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    grad_out_ptr += (sample * grad_out_sample + head * grad_out_head) * UNIT
    query_ptr += (sample * query_sample + head * query_head) * UNIT
    key_ptr += (sample * key_sample + head * key_head) * UNIT
    value_ptr += (sample * value_sample + head * value_head) * UNIT
    out_ptr += (sample * out_sample + head * out_head) * UNIT
    grad_query_ptr += (sample * grad_query_sample + head * grad_query_head) * UNIT
    logsumexp_ptr += number.to(tl.int64) * tokens
    delta_ptr += number.to(tl.int64) * tokens

    query = load_tile(query_ptr, rows, tokens, query_token * UNIT, 0, WIDTH, SIZE)
    grad = load_tile(grad_out_ptr, rows, tokens, grad_out_token * UNIT, 0, WIDTH, SIZE)
    out = load_tile(out_ptr, rows, tokens, out_token * UNIT, 0, WIDTH, SIZE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    grad_query = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    if TAIL:
        query_tail = load_tile(query_ptr, rows, tokens, query_token * UNIT, WIDTH, TAIL, SIZE)
        grad_tail = load_tile(grad_out_ptr, rows, tokens, grad_out_token * UNIT, WIDTH, TAIL, SIZE)
        out_tail = load_tile(out_ptr, rows, tokens, out_token * UNIT, WIDTH, TAIL, SIZE)
        delta += tl.sum(grad_tail.to(tl.float32) * out_tail.to(tl.float32), axis=1)
        grad_query_tail = tl.zeros((ROWS, TAIL), dtype=tl.float32)
    tl.store(delta_ptr + rows, delta, mask=rows < tokens)
    logsumexp = tl.load(logsumexp_ptr + rows, mask=rows < tokens, other=0.0) * LOG2
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = load_tile(key_ptr, columns, tokens, key_token * UNIT, 0, WIDTH, SIZE)
        value = load_tile(value_ptr, columns, tokens, value_token * UNIT, 0, WIDTH, SIZE)
        scores = tl.dot(query, key.T, input_precision="ieee")
        grad_weights = tl.dot(grad, value.T, input_precision="ieee")
        if TAIL:
            key_tail = load_tile(key_ptr, columns, tokens, key_token * UNIT, WIDTH, TAIL, SIZE)
            value_tail = load_tile(value_ptr, columns, tokens, value_token * UNIT, WIDTH, TAIL, SIZE)
            scores = tl.dot(query_tail, key_tail.T, scores, input_precision="ieee")
            grad_weights = tl.dot(grad_tail, value_tail.T, grad_weights, input_precision="ieee")
        weights = tl.exp2(scores * scale2 - logsumexp[:, None])
        weights = tl.where((columns < tokens)[None, :], weights, 0.0)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        if TAIL:
            grad_query_tail = tl.dot(grad_scores, key_tail, grad_query_tail, input_precision="ieee")
    store_tile(grad_query_ptr, grad_query * scale, rows, tokens, grad_query_token * UNIT, 0, WIDTH, SIZE)
    if TAIL:
        store_tile(grad_query_ptr, grad_query_tail * scale, rows, tokens, grad_query_token * UNIT, WIDTH, TAIL, SIZE)


@triton.jit
def _key_value_kernel(
    grad_out_ptr,  # [B, heads, tokens, SIZE], as the next five
    query_ptr,
    key_ptr,
    value_ptr,
    grad_key_ptr,
    grad_value_ptr,
    logsumexp_ptr,  # [B, heads, tokens]
    delta_ptr,  # [B, heads, tokens]: Σ grad_out·out, read
    grad_out_sample,  # strides, in units
    grad_out_head,
    grad_out_token,
    query_sample,
    query_head,
    query_token,
    key_sample,
    key_head,
    key_token,
    value_sample,
    value_head,
    value_token,
    grad_key_sample,
    grad_key_head,
    grad_key_token,
    grad_value_sample,
    grad_value_head,
    grad_value_token,
    heads,
    tokens,
    scale,  # of Q·Kᵀ
    scale2,  # for exponentials to base 2; rounded as the forward's, so that weights are the forward's
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has COLUMNS keys and values; the queries pass by. Tiles of weights are [COLUMNS, ROWS] here."""
    tiles = tl.cdiv(tokens, COLUMNS)
    number = tl.program_id(0) // tiles
    sample, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    grad_out_ptr += (sample * grad_out_sample + head * grad_out_head) * UNIT
    query_ptr += (sample * query_sample + head * query_head) * UNIT
    key_ptr += (sample * key_sample + head * key_head) * UNIT
    value_ptr += (sample * value_sample + head * value_head) * UNIT
    grad_key_ptr += (sample * grad_key_sample + head * grad_key_head) * UNIT
    grad_value_ptr += (sample * grad_value_sample + head * grad_value_head) * UNIT
    logsumexp_ptr += number.to(tl.int64) * tokens
    delta_ptr += number.to(tl.int64) * tokens

    key = load_tile(key_ptr, columns, tokens, key_token * UNIT, 0, WIDTH, SIZE)
    value = load_tile(value_ptr, columns, tokens, value_token * UNIT, 0, WIDTH, SIZE)
    grad_key = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    grad_value = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    if TAIL:
        key_tail = load_tile(key_ptr, columns, tokens, key_token * UNIT, WIDTH, TAIL, SIZE)
        value_tail = load_tile(value_ptr, columns, tokens, value_token * UNIT, WIDTH, TAIL, SIZE)
        grad_key_tail = tl.zeros((COLUMNS, TAIL), dtype=tl.float32)
        grad_value_tail = tl.zeros((COLUMNS, TAIL), dtype=tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        query = load_tile(query_ptr, rows, tokens, query_token * UNIT, 0, WIDTH, SIZE)
        grad = load_tile(grad_out_ptr, rows, tokens, grad_out_token * UNIT, 0, WIDTH, SIZE)
        logsumexp = tl.load(logsumexp_ptr + rows, mask=rows < tokens, other=float("inf")) * LOG2
        delta = tl.load(delta_ptr + rows, mask=rows < tokens, other=0.0)
        scores = tl.dot(key, query.T, input_precision="ieee")
        grad_weights = tl.dot(value, grad.T, input_precision="ieee")
        if TAIL:
            query_tail = load_tile(query_ptr, rows, tokens, query_token * UNIT, WIDTH, TAIL, SIZE)
            grad_tail = load_tile(grad_out_ptr, rows, tokens, grad_out_token * UNIT, WIDTH, TAIL, SIZE)
            scores = tl.dot(key_tail, query_tail.T, scores, input_precision="ieee")
            grad_weights = tl.dot(value_tail, grad_tail.T, grad_weights, input_precision="ieee")
        # 0 for rows that there are not. For columns that there are not anything, infinity too: it is not stored.
        weights = tl.exp2(scores * scale2 - logsumexp[None, :])
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        weights = weights.to(query.dtype)
        grad_value = tl.dot(weights, grad, grad_value, input_precision="ieee")
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
        if TAIL:
            grad_value_tail = tl.dot(weights, grad_tail, grad_value_tail, input_precision="ieee")
            grad_key_tail = tl.dot(grad_scores, query_tail, grad_key_tail, input_precision="ieee")
    store_tile(grad_key_ptr, grad_key * scale, columns, tokens, grad_key_token * UNIT, 0, WIDTH, SIZE)
    store_tile(grad_value_ptr, grad_value, columns, tokens, grad_value_token * UNIT, 0, WIDTH, SIZE)
    if TAIL:
        store_tile(grad_key_ptr, grad_key_tail * scale, columns, tokens, grad_key_token * UNIT, WIDTH, TAIL, SIZE)
        store_tile(grad_value_ptr, grad_value_tail, columns, tokens, grad_value_token * UNIT, WIDTH, TAIL, SIZE)


LOG2 = tl.constexpr(LOG2_E)
