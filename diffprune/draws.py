"""Timesteps and noise that depend on (seed, sample key, draw) and on nothing else.

A *draw* is a pair (t, x0) for one sample. Its bits come from the counter-based generator Philox 4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    Philox key     = (seed, stream)            one stream per purpose, so that times and noise never share bits
    Philox counter = (block, draw, hash & 0xffffffff, hash >> 32)

where `hash` is the 64-bit hash of the sample key. A key therefore gets the same draw in any batch, order, shard,
process and device, to the last bit: `diffprune.kernels.philox` has the arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from diffprune.kernels.philox import MASK, normal_noise, random_words

KeyHashes = torch.Tensor  # [B] int64: the 64 bits of `key_hash`, as a signed number; see `hash_keys`
Keys = Sequence[str] | KeyHashes


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
    return normal_noise(hashes, seed, draw, math.prod(shape)).reshape(len(hashes), *shape)


def uniform(
    seed: int, keys: Keys, stream: str | int, draw: int = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per key, with 53 random bits: [B] float64.

    `stream` names the purpose; different streams are independent. "time" and "noise" are those of `draw_times` and
    `draw_noise`. Other arguments and errors: as in `draw_times`.
    """
    hashes = hash_keys(keys, device)
    block = torch.zeros(1, dtype=torch.int64, device=hashes.device)
    bits = random_words(hashes, seed, key_hash(str(stream)) & MASK, draw, block)
    return ((bits[0] << 21) | (bits[1] >> 11)).to(torch.float64).mul_(2.0**-53)[:, 0]


def key_hash(key: str) -> int:
    """64-bit hash of a sample key, in [0, 2**64): BLAKE2b with an 8-byte digest of its UTF-8, little-endian."""
    return int.from_bytes(_digest(key), "little")


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


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
    digests = bytearray(b"".join([_digest(key) for key in keys]))
    hashes = torch.frombuffer(digests, dtype=torch.int64) if digests else torch.empty(0, dtype=torch.int64)
    return hashes if device is None else hashes.to(device)
