"""The op ``flow_interpolate``: the point of the linear path between counter-made noise and data."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.philox import expect_counter, expect_words
from diffprune.kernels.registration import custom_op

_implementations = Op("flow_interpolate")


@any_array
def flow_interpolate(x1: Array, t: Array, hashes: Array, seed: int, draw: int, *, impl: str = "auto") -> Array:
    """xt = (1 − t)·x0 + t·x1, with the noise x0 of each sample made where it is used.

    Args:
        x1: data, [B, ...]; float16, bfloat16, float32 or float64; B may be 0.
        t: [B], any of these dtypes; 0 is noise, 1 is data (SiT's linear path, arXiv 2401.08740).
        hashes: [B] int64, the 64-bit hash of each sample's key.
        seed, draw: in [0, 2**32). x0 is the standard normal noise of (seed, hash, draw) as ``philox`` defines it.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        xt: [B, ...] contiguous, x1's dtype; computed in float32 (float64 if x1 or t is). NaN where x1 or t is.

    The random words are the same everywhere. ``reference`` has the normals to the last bit of their float32 on every
    device; ``triton`` computes them in float32, with a relative error below 5e-7 (measured: 3.1e-7). Moves the bytes of
    x1 and xt and no others, except in ``reference``, which holds x0. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device, and for a seed or draw out of range.
    """
    expect_words(seed, draw)  # torch passes 64 bits on
    return _op(x1.detach(), t.detach(), hashes, seed, draw, impl)


@custom_op("flow_interpolate")
def _op(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int, impl: str = "auto") -> Tensor:
    _check(x1, t, hashes, seed, draw)
    return _implementations(impl, x1, t, hashes, seed, draw)


@_op.register_fake
def _fake(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int, impl: str = "auto") -> Tensor:
    _check(x1, t, hashes, seed, draw)
    return x1.new_empty(x1.shape)


def _check(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int) -> None:
    expect_counter(x1, hashes, seed, draw)
    expect("t", t, "B")
    expect_equal("B", "x1 and t", x1.shape[0], t.shape[0])
    expect_equal("device", "x1 and t", x1.device, t.device)
