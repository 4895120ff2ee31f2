"""Tiles of tokens [B, T, D]: what the kernels between attention and MLP share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Gpu

MAX_FEATURES = 4096
"""A token's features lie in the registers of one program, and in shared memory while they arrive."""


def refuse_width(features: int) -> str | None:
    """The reason to refuse, if a token is too wide."""
    return f"needs at most {MAX_FEATURES} features, got {features}" if features > MAX_FEATURES else None


def rows(tensor: Tensor) -> Tensor:
    """[B, D] with any stride between rows, and consecutive features."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def config(tokens: int, features: int, per_thread: int = 16) -> tuple[dict[str, int], dict[str, int]]:
    """The tile [ROWS, WIDTH] of tokens of one sample that a program has in registers, and launch options.

    ``per_thread``: elements of the tile that a thread has; fewer where it has sums of them beside them.
    """
    width = max(16, triton.next_power_of_2(features))
    height = min(max(1, 2048 // width), triton.next_power_of_2(max(1, tokens)))
    return {"ROWS": height, "WIDTH": width}, {"num_warps": min(16, max(1, height * width // (32 * per_thread)))}


def share(samples: int, tokens: int, height: int, gpu: Gpu) -> int:
    """How many tokens one program of a backward has: it adds them up one tile after the other.

    Many, because each program leaves partial sums of D numbers; but there should be some programs for each
    multiprocessor. A multiple of ``height``.
    """
    programs = triton.cdiv(8 * gpu.processors, max(1, samples))  # wanted per sample
    return height * max(1, triton.cdiv(tokens, height * programs))


@triton.jit
def load_row(ptr, row, stride, features, WIDTH: tl.constexpr):
    """[WIDTH] float32: row of [B, features]; 0 beyond its end."""
    columns = tl.arange(0, WIDTH)
    return tl.load(ptr + row.to(tl.int64) * stride + columns, mask=columns < features, other=0.0).to(tl.float32)


@triton.jit
def places(sample, token, tokens, features, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of the [ROWS, WIDTH] tile at this token of a contiguous [B, tokens, features]."""
    rows = token + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    offsets = (sample.to(tl.int64) * tokens + rows.to(tl.int64))[:, None] * features + columns[None, :]
    return offsets, (rows < tokens)[:, None] & (columns < features)[None, :]


@triton.jit
def layer_norm(x, mask, features, EPS: tl.constexpr):
    """Normalised tokens [ROWS, WIDTH], 0 where masked, as ``x`` is."""
    mean = tl.sum(x, axis=1, keep_dims=True) * (1.0 / features)
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) * (1.0 / features)
    return centred * tl.rsqrt(variance + EPS)


@triton.jit
def layer_norm_backward(x, h, mask, features, EPS: tl.constexpr):
    """Normalised tokens as ``layer_norm`` has them, and the gradient of x, given ``h`` with respect to its output.

    Both are 0 where masked, as ``x`` and ``h`` are. A sum over a token goes through all warps of the program, and they
    wait for one another: two sums at a time, so twice and not four times.
    """
    mean, h_mean = _sums(x, h)
    mean, h_mean = mean * (1.0 / features), h_mean * (1.0 / features)
    centred = tl.where(mask, x - mean, 0.0)
    variance, along = _sums(centred * centred, h * centred)
    inverse_std = tl.rsqrt(variance * (1.0 / features) + EPS)
    normalized = centred * inverse_std
    along *= inverse_std * (1.0 / features)
    return normalized, (h - h_mean - normalized * along) * inverse_std


@triton.jit
def _sums(a, b):
    """[ROWS, 1] sums of the tokens of both."""
    first, second = tl.split(tl.sum(tl.join(a, b), axis=1))
    return first[:, None], second[:, None]
