"""Timesteps and noise that depend on (seed, sample key, draw) and on nothing else.

A *draw* is a pair (t, x0) for one sample. Its bits come from the counter-based generator Philox 4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    Philox key     = (seed, stream)            one stream per purpose, so that times and noise never share bits
    Philox counter = (block, draw, hash & 0xffffffff, hash >> 32)

where `hash` is the 64-bit hash of the sample key. A key therefore gets the same draw in any batch, order, shard,
process and device. The map from bits to normals uses only operations that IEEE 754 rounds in one way
(+, -, ×, ÷, square root), so it is the same to the last bit on every device, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

KeyHashes = torch.Tensor  # [B] int64: the 64 bits of `key_hash`, as a signed number; see `hash_keys`
Keys = Sequence[str] | KeyHashes

MASK = 0xFFFFFFFF


def draw_pair(
    seed: int, keys: Keys, draw: int, draws: int, shape: Sequence[int], device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole draw: `(t, x0)`, that is `draw_times` [B] float32 and `draw_noise` [B, *shape] float32."""
    hashes = hash_keys(keys, device)
    return draw_times(seed, hashes, draw, draws), draw_noise(seed, hashes, draw, shape)


def draw_times(
    seed: int, keys: Keys, draw: int, draws: int = 1, device: torch.device | str | None = None
) -> torch.Tensor:
    """Timesteps in [0, 1), stratified over the draws of a key: t = (draw mod draws + u) / draws, u uniform.

    Draws 0 ... draws-1 of a key fall one into each of `draws` equal intervals, and so do the next `draws` ones.
    With `draws=1` every draw is uniform.

    Args:
        seed: in [0, 2**32).
        keys: B sample keys, or their hashes ([B] int64, `hash_keys`).
        draw: index of the draw, in [0, 2**32).
        draws: number of strata, at least 1.
        device: where to compute; by default where the hashes are, or the CPU.

    Returns: [B] float32.

    Raises: ValueError for a seed or draw out of range.
    """
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    u = uniform(seed, keys, "time", draw, device)
    t = ((u + draw % draws) / draws).to(torch.float32)
    return t.clamp_(max=1 - 2.0**-24)  # rounding to float32 can reach 1


def draw_noise(
    seed: int, keys: Keys, draw: int, shape: Sequence[int], device: torch.device | str | None = None
) -> torch.Tensor:
    """Standard normal noise x0 for each key: element i of a sample is normal i mod 4 of Philox block i // 4.

    Args:
        seed, keys, draw, device: as in `draw_times`.
        shape: shape of one sample, e.g. (4, 32, 32).

    Returns: [B, *shape] float32, the same bits on every device.

    Raises: ValueError for a seed or draw out of range.
    """
    hashes = hash_keys(keys, device)
    elements = math.prod(shape)
    blocks = torch.arange((elements + 3) // 4, device=hashes.device)
    noise = torch.empty(len(hashes), len(blocks), 4, dtype=torch.float32, device=hashes.device)
    rows = max(1, _CHUNK // max(1, len(blocks)))  # what is in flight stays in cache; no effect on the numbers
    for start in range(0, len(hashes), rows):
        bits = _key_bits(seed, hashes[start : start + rows], "noise", draw, blocks)
        out = noise[start : start + rows]
        out[..., 0], out[..., 1] = _box_muller(bits[0], bits[1])
        out[..., 2], out[..., 3] = _box_muller(bits[2], bits[3])
    return noise.flatten(1)[:, :elements].reshape(len(hashes), *shape)


def uniform(
    seed: int, keys: Keys, stream: str | int, draw: int = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per key, with 53 random bits: [B] float64.

    `stream` names the purpose; different streams are independent. "time" and "noise" are those of `draw_times` and
    `draw_noise`. Other arguments and errors: as in `draw_times`.
    """
    hashes = hash_keys(keys, device)
    block = torch.zeros(1, dtype=torch.int64, device=hashes.device)
    bits = _key_bits(seed, hashes, stream, draw, block)
    return ((bits[0] << 21) | (bits[1] >> 11)).to(torch.float64).mul_(2.0**-53)[:, 0]


def key_hash(key: str) -> int:
    """64-bit hash of a sample key, in [0, 2**64): BLAKE2b with an 8-byte digest of its UTF-8, little-endian."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def hash_keys(keys: Keys, device: torch.device | str | None = None) -> KeyHashes:
    """Hashes of B keys: [B] int64, `key_hash` in two's complement. Hashes pass through, moved to `device`.

    Hash once and pass the result where the same keys are drawn for again and again.
    """
    if isinstance(keys, torch.Tensor):
        if keys.dtype != torch.int64 or keys.dim() != 1:
            raise ValueError(f"expected key hashes [B] int64, got {tuple(keys.shape)} {keys.dtype}")
        return keys if device is None else keys.to(device)
    if isinstance(keys, str):
        raise ValueError(f"expected a sequence of sample keys, got the single string {keys!r}")
    signed = [value - 2**64 if value >= 2**63 else value for value in map(key_hash, keys)]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def philox_4x32(
    counter: Sequence[torch.Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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


_CHUNK = 1 << 15  # Philox blocks at a time


def _key_bits(
    seed: int, hashes: KeyHashes, stream: str | int, draw: int, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four [B, len(blocks)] int64 tensors of 32 random bits each."""
    for name, value in (("seed", seed), ("draw", draw)):
        if not 0 <= value <= MASK:
            raise ValueError(f"expected a {name} in [0, 2**32), got {value}")
    key = (int(seed), key_hash(str(stream)) & MASK)
    low, high = hashes[:, None] & MASK, (hashes[:, None] >> 32) & MASK
    return philox_4x32((blocks[None, :], torch.full_like(low, draw), low, high), key)


def _box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def _log(u: torch.Tensor) -> torch.Tensor:
    """Natural logarithm (float64) without the library's: libraries and devices differ in its last bit."""
    mantissa, exponent = torch.frexp(u)  # u = mantissa·2^exponent, mantissa in [½, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = exponent.to(torch.float64) - small.to(torch.float64)
    ratio = (mantissa - 1) / (mantissa + 1)  # ln m = 2 artanh(ratio), |ratio| < 0.172
    return ratio.mul_(_polynomial(ratio * ratio, _ARTANH)).mul_(2).add_(exponent.mul_(math.log(2)))


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Horner's rule, lowest coefficient first; one rounding per operation (no fused multiply-add)."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


_SIN = [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)]
_COS = [(-1) ** n / math.factorial(2 * n) for n in range(9)]
_ARTANH = [1 / (2 * n + 1) for n in range(11)]
