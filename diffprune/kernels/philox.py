"""Normal noise from a counter: the bits that ``flow_interpolate`` and ``flow_matching_loss`` mean by x0.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    Philox key     = (seed, stream)
    Philox counter = (block, draw, hash & 0xffffffff, hash >> 32)

gives four words of 32 bits for each sample's 64-bit hash and each block; two words give two normals by Box and Muller.
Element i of a sample's noise is normal i mod 4 of block i // 4. The map from bits to normals here uses only operations
that IEEE 754 rounds in one way (+, -, ×, ÷, square root), so it is the same to the last bit on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffprune.kernels.checks import FLOATING, expect, expect_dense, expect_equal

NOISE_STREAM = 0x8C8860E5
"""Second word of the Philox key of noise: the low half of the 64-bit BLAKE2b hash of "noise"."""

MASK = 0xFFFFFFFF

_CHUNK = 1 << 15  # Philox blocks at a time: what is in flight stays in cache
_CHUNK_ON_GPU = 1 << 21  # there each chunk costs some 300 launches, and 16 MiB a number that is in flight


def normal_noise(hashes: Tensor, seed: int, draw: int, elements: int) -> Tensor:
    """Standard normal noise x0: hashes [B] int64 -> [B, elements] float32, the same bits on every device.

    Raises ValueError for a seed or draw outside [0, 2**32).
    """
    blocks = torch.arange((elements + 3) // 4, device=hashes.device)
    noise = torch.empty(len(hashes), len(blocks), 4, dtype=torch.float32, device=hashes.device)
    chunk = _CHUNK if hashes.device.type == "cpu" else _CHUNK_ON_GPU  # no effect on the numbers
    rows = max(1, chunk // max(1, len(blocks)))
    for start in range(0, len(hashes), rows):
        words = random_words(hashes[start : start + rows], seed, NOISE_STREAM, draw, blocks)
        out = noise[start : start + rows]
        out[..., 0], out[..., 1] = _box_muller(words[0], words[1])
        out[..., 2], out[..., 3] = _box_muller(words[2], words[3])
    return noise.flatten(1)[:, :elements]


def random_words(
    hashes: Tensor, seed: int, stream: int, draw: int, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four [B, len(blocks)] int64 tensors of 32 random bits each, for hashes [B] int64 and block numbers int64.

    Raises ValueError for a seed or draw outside [0, 2**32).
    """
    expect_words(seed, draw)
    low, high = hashes[:, None] & MASK, (hashes[:, None] >> 32) & MASK
    return philox_4x32((blocks[None, :], torch.full_like(low, draw), low, high), (int(seed), stream))


def expect_counter(x1: Tensor, hashes: Tensor, seed: int, draw: int) -> None:
    """ValueError unless x1 [B, ...] and hashes [B] int64, on one device, have noise: seed and draw in [0, 2**32)."""
    expect_dense("x1", x1)
    if x1.dim() == 0 or x1.dtype not in FLOATING:
        raise ValueError(f"expected x1 [B, ...] of a floating dtype, got {tuple(x1.shape)} {x1.dtype}")
    expect("hashes", hashes, "B", (torch.int64,))
    expect_equal("B", "x1 and hashes", x1.shape[0], hashes.shape[0])
    expect_equal("device", "x1 and hashes", x1.device, hashes.device)
    expect_words(seed, draw)


def expect_words(seed: int, draw: int) -> None:
    """ValueError unless both are in [0, 2**32)."""
    for name, value in (("seed", seed), ("draw", draw)):
        if not 0 <= value <= MASK:
            raise ValueError(f"expected a {name} in [0, 2**32), got {value}")


def philox_4x32(
    counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32: four 32-bit counter words (int64 tensors that broadcast) to four 32-bit words (int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The int64 product wraps, which leaves its 64 bits those of the unsigned product.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((odd >> 32) & MASK) ^ c1 ^ k0, odd & MASK
        c2, c3 = ((even >> 32) & MASK) ^ c3 ^ k1, even & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals (float64) from two words of 32 bits: √(-2 ln u)·(cos, sin)(2πw), u=(a+1)/2³², w=b/2³²."""
    radius = _log((a + 1).to(torch.float64).mul_(2.0**-32)).mul_(-2).sqrt_()
    quadrant = (b + (1 << 29)) >> 30  # 0 ... 4; what is left is within π/4 of the axis
    x = (b - (quadrant << 30)).to(torch.float64).mul_(math.pi * 2.0**-31)
    square = x * x
    sin, cos = x.mul_(_polynomial(square, _SIN)).mul_(radius), _polynomial(square, _COS).mul_(radius)
    odd = (quadrant & 1).bool()
    first, second = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    first = torch.where(((quadrant + 1) & 2).bool(), -first, first)
    second = torch.where((quadrant & 2).bool(), -second, second)
    return first, second


def _log(u: Tensor) -> Tensor:
    """Natural logarithm (float64) without the library's: libraries and devices differ in its last bit."""
    mantissa, exponent = torch.frexp(u)  # u = mantissa·2^exponent, mantissa in [½, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = exponent.to(torch.float64) - small.to(torch.float64)
    ratio = (mantissa - 1) / (mantissa + 1)  # ln m = 2 artanh(ratio), |ratio| < 0.172
    return ratio.mul_(_polynomial(ratio * ratio, _ARTANH)).mul_(2).add_(exponent.mul_(math.log(2)))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, lowest coefficient first; one rounding per operation (no fused multiply-add)."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


_SIN = [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)]
_COS = [(-1) ** n / math.factorial(2 * n) for n in range(9)]
_ARTANH = [1 / (2 * n + 1) for n in range(11)]
