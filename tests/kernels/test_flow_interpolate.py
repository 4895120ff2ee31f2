"""``flow_interpolate`` against scalar float64 arithmetic, and its Triton form's normals at the edges."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.draws import draw_noise, hash_keys, key_hash
from diffprune.flow import interpolate
from diffprune.kernels import flow_interpolate
from diffprune.kernels.philox import NOISE_STREAM
from diffprune.kernels.triton.philox import _box_muller

HASHES = torch.tensor([0, -1, 2**63 - 1, -(2**63), 123456789])
ROUNDING = {"reference": 2**-24, "triton": 5e-7}
"""Relative error of a normal."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(impl: str, *args: object) -> Tensor:
    return launch(flow_interpolate, *args) if impl == "triton" else flow_interpolate(*args, impl=impl)


def scalar_noise(hash: int, seed: int, draw: int, elements: int) -> Tensor:
    """Salmon et al., section 3.3, and Box and Muller, with Python's integers and double precision."""
    normals = []
    for block in range((elements + 3) // 4):
        c, k = [block, draw, hash % 2**32, (hash >> 32) % 2**32], [seed, NOISE_STREAM]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        for a, b in (c[:2], c[2:]):
            radius, angle = math.sqrt(-2 * math.log((a + 1) / 2**32)), 2 * math.pi * b / 2**32
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(normals[:elements], dtype=torch.float64)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (2**32 - 1, 2**31 + 7)])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3, 7), (2, 517)])  # 1034: a second tile of 1024
def test_noise_and_path(impl: str, seed: int, draw: int, shape: tuple[int, ...]) -> None:
    x1, t = normal(len(HASHES), *shape), torch.tensor([0, 0.25, 0.5, 0.999, 1.0])
    elements = math.prod(shape)
    x0 = torch.stack([scalar_noise(hash, seed, draw, elements) for hash in HASHES.tolist()]).view(x1.shape)
    time = t.double().view(-1, *[1] * len(shape))
    xt = run(impl, x1, t, HASHES, seed, draw)
    assert xt.dtype == torch.float32
    error = (xt.double() - ((1 - time) * x0 + time * x1.double())).abs()
    assert (error <= ROUNDING[impl] * (1 - time) * x0.abs() + 2**-23 * (x0.abs() + x1.abs())).all(), error.max()
    torch.testing.assert_close(xt[4], x1[4], rtol=0, atol=0)


def test_reference_is_the_draws() -> None:
    hashes, x1, t = hash_keys([f"a/{i}" for i in range(7)]), normal(7, 4, 6, 5), torch.rand(7)
    x0 = draw_noise(3, hashes, 9, (4, 6, 5))
    assert torch.equal(flow_interpolate(x1, t, hashes, 3, 9), interpolate(x1, x0, t))
    assert torch.equal(flow_interpolate(x1, torch.zeros(7), hashes, 3, 9), x0)
    assert key_hash("noise") % 2**32 == NOISE_STREAM


@triton.jit
def _pairs(a_ptr, b_ptr, first_ptr, second_ptr, N: tl.constexpr):
    places = tl.arange(0, N)
    first, second = _box_muller(tl.load(a_ptr + places).to(tl.uint32), tl.load(b_ptr + places).to(tl.uint32))
    tl.store(first_ptr + places, first)
    tl.store(second_ptr + places, second)


def test_normals_of_extreme_words() -> None:
    """Radii near 0, where 1 - u has the digits; the branch of the logarithm; the borders of octants."""
    borders = [b for quadrant in range(8) for b in (quadrant * 2**29 - 1, quadrant * 2**29, quadrant * 2**29 + 1)]
    edges = [0, 1, 2, 1000, 2**23, 2**24 - 1, 2**31 - 1, 2**31, 0xB504F331, 0xB504F332, 0xB504F333, 0xB504F334]
    edges += [2**32 - 2**20, 2**32 - 300, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    pairs = [(a, b % 2**32) for a in edges for b in (*borders, 2**32 - 1, 12345, 3 * 10**9)]
    count = triton.next_power_of_2(len(pairs))
    words = torch.tensor(pairs + [(0, 0)] * (count - len(pairs))).T.contiguous().to(DEVICE)
    first, second = (torch.full((count,), torch.nan, device=DEVICE) for _ in range(2))
    _pairs[(1,)](words[0].clone(), words[1].clone(), first, second, N=count)
    for i, (a, b) in enumerate(pairs):
        rest = 2**32 - 1 - a
        radius = math.sqrt(-2 * (math.log1p(-rest / 2**32) if rest < 2**31 else math.log((a + 1) / 2**32)))
        turn = b / 2**31
        for got, function in ((first[i].item(), math.cos), (second[i].item(), math.sin)):
            exact = radius * function(math.pi * turn)
            assert abs(got - exact) <= 4e-7 * abs(exact) + 4e-16 * radius, (a, b, got, exact)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x1, t = normal(5, 40), torch.full((5,), 0.3)
    for impl in ("reference", "triton"):
        whole = run(impl, x1, t, HASHES, 1, 2)
        assert torch.equal(run(impl, x1[3:4], t[3:4], HASHES[3:4], 1, 2), whole[3:4])
        assert len({row.sum().item() for row in whole}) == 5


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl: str, dtype: torch.dtype) -> None:
    x1, t = normal(3, 20).to(dtype), torch.rand(3).to(dtype)
    xt = run(impl, x1, t, HASHES[:3], 1, 2)
    assert xt.dtype == dtype
    exact = flow_interpolate(x1.double(), t.double(), HASHES[:3], 1, 2, impl="reference")
    torch.testing.assert_close(xt.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float64() -> None:
    x1, t = normal(3, 20).double(), torch.rand(3).double()
    xt = flow_interpolate(x1, t, HASHES[:3], 1, 2)
    x0 = draw_noise(1, HASHES[:3], 2, (20,)).double()
    assert torch.equal(xt, (1 - t)[:, None] * x0 + t[:, None] * x1)
    with pytest.raises(NotImplementedError, match="triton: needs float16 or bfloat16 or float32, got float64"):
        flow_interpolate(x1.to(DEVICE), t.to(DEVICE), HASHES[:3].to(DEVICE), 1, 2, impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_stays_where_it_is(impl: str) -> None:
    x1, t = normal(3, 50), torch.tensor([0.1, 0.2, torch.nan])
    x1[0, 33] = torch.nan
    lost = run(impl, x1, t, HASHES[:3], 0, 0).isnan()
    assert lost[0].nonzero().tolist() == [[33]]
    assert not lost[1].any() and lost[2].all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strides_and_empties(impl: str) -> None:
    x1, t, hashes = normal(6, 3, 4).transpose(0, 1), torch.rand(6)[::2], HASHES.repeat(2)[1:7:2]
    expected = flow_interpolate(x1.contiguous(), t.contiguous(), hashes.contiguous(), 1, 2, impl="reference")
    xt = run(impl, x1, t, hashes, 1, 2)
    assert xt.is_contiguous()
    torch.testing.assert_close(xt, expected, rtol=1e-6, atol=1e-6)
    assert run(impl, x1[:0], t[:0], hashes[:0], 1, 2).shape == (0, 6, 4)
    assert run(impl, x1[:, :, :0], t, hashes, 1, 2).shape == (3, 6, 0)


def test_fake_and_compiled() -> None:
    op = torch.ops.diffprune.flow_interpolate.default
    torch.library.opcheck(op, (normal(3, 4, 5), torch.rand(3), HASHES[:3], 1, 2))
    torch.library.opcheck(op, (normal(4, 3).half().T, torch.rand(3), HASHES[:3], 1, 2, "reference"))

    def double(x1: Tensor, t: Tensor, hashes: Tensor, draw: int) -> Tensor:
        return 2 * flow_interpolate(x1, t, hashes, 1, draw)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    for draw in (0, 5):
        args = normal(3, 4), torch.rand(3), HASHES[:3], draw
        assert torch.equal(compiled(*args), double(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x1": torch.zeros(())}, r"expected x1 \[B, ...\] of a floating dtype, got \(\) torch.float32"),
        ({"x1": torch.zeros(3, 2, dtype=torch.int32)}, r"expected x1 .* got \(3, 2\) torch.int32"),
        ({"t": torch.zeros(3, 1)}, r"expected t \[B\], got \(3, 1\)"),
        ({"t": torch.zeros(2)}, "expected x1 and t of equal B, got 3 and 2"),
        ({"hashes": torch.zeros(3)}, "expected hashes of dtype int64, got torch.float32"),
        ({"hashes": HASHES}, "expected x1 and hashes of equal B, got 3 and 5"),
        ({"hashes": HASHES[:3].to("meta")}, "expected x1 and hashes of equal device, got cpu and meta"),
        ({"seed": -1}, r"expected a seed in \[0, 2\*\*32\), got -1"),
        ({"draw": 2**32}, r"expected a draw in \[0, 2\*\*32\), got 4294967296"),
        ({"impl": "gpu"}, "expected impl to be one of auto, .*got 'gpu'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    args = {"x1": torch.zeros(3, 2), "t": torch.zeros(3), "hashes": HASHES[:3], "seed": 0, "draw": 0}
    with pytest.raises(ValueError, match=message):
        flow_interpolate(**(args | change))
