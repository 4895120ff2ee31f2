"""The noise of ``kernels/philox.py`` inside a kernel: the same random words, normals in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from diffprune.kernels import philox

STREAM = tl.constexpr(philox.NOISE_STREAM)


@triton.jit
def normal_noise(
    blocks,  # [N] uint32: numbers of successive Philox blocks
    hash,  # int64
    seed,
    draw,
):
    """The 4N normals of these blocks, in the order of a sample's elements: [4N] float32."""
    low, high = hash.to(tl.uint32), (hash >> 32).to(tl.uint32)
    zeros = blocks * 0
    counter = blocks, zeros + draw.to(tl.uint32), zeros + low, zeros + high
    a, b, c, d = _philox(*counter, seed.to(tl.uint32), tl.full((), STREAM, tl.uint32))
    first, second = _box_muller(a, b)
    third, fourth = _box_muller(c, d)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def _philox(a, b, c, d, key, other_key):
    """Philox4x32-10 of counters a to d, as ``tl.philox_impl`` makes it; but each product's halves come from one
    instruction, of which there are 20 instead of 40."""
    for _ in tl.static_range(10):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (second >> 32).to(tl.uint32) ^ b ^ key, (first >> 32).to(tl.uint32) ^ d ^ other_key
        b, d = second.to(tl.uint32), first.to(tl.uint32)
        key += 0x9E3779B9
        other_key += 0xBB67AE85
    return a, b, c, d


@triton.jit
def _box_muller(a, b):
    """√(-2 ln u)·(cos, sin)(2πw) with u = (a+1)/2³², w = b/2³²."""
    radius = tl.sqrt(-2 * _log_of_fraction(a))
    turned = b + 0x20000000  # by an eighth: its quadrant is in the first two bits
    x = (b << 2).to(tl.int32, bitcast=True).to(
        tl.float32
    ) * 3.657295198167899e-10  # within π/4 of the axis; times π/2³³
    square = x * x
    # Cephes, sinf and cosf (Moshier 1989)
    sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
    cos = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cos = cos - 0.5 * square + 1
    odd = (turned & 0x40000000) != 0
    first, second = tl.where(odd, sin, cos) * radius, tl.where(odd, cos, sin) * radius
    return _negated(first, turned + 0x40000000), _negated(second, turned)


@triton.jit
def _negated(x, bits):
    """-x where the first of the bits is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _log_of_fraction(a):
    """ln((a+1)/2³²) to a few units in the last place, also near 0, where 1 - u is what has the digits."""
    near_one = a >= 0xB504F333  # u >= √½
    part = tl.where(near_one, ~a, a + 1).to(tl.float32) * 2.3283064365386963e-10  # 1 - u or u
    bits = part.to(tl.int32, bitcast=True)
    exponent = tl.where(near_one, 0, (bits - 0x3F3504F3) >> 23)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)  # in [√½, √2)
    r = tl.where(near_one, -part, mantissa - 1)
    # Cephes, logf (Moshier 1989): ln(1 + r) = r - r²/2 + r³·P(r)
    p = 7.0376836292e-2 * r - 1.1514610310e-1
    p = p * r + 1.1676998740e-1
    p = p * r - 1.2420140846e-1
    p = p * r + 1.4249322787e-1
    p = p * r - 1.6668057665e-1
    p = p * r + 2.0000714765e-1
    p = p * r - 2.4999993993e-1
    p = p * r + 3.3333331174e-1
    square = r * r
    return p * square * r - 0.5 * square + r + exponent.to(tl.float32) * 0.6931471805599453
