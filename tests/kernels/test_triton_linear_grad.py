"""Triton's ``linear_grad_dot`` and ``linear_grad_sqnorm`` against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import linear_grad_dot, linear_grad_sqnorm
from diffprune.kernels.triton import TARGETS, Gpu, assume, gpu, refuse_inputs, unavailable

DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":
    DTYPES.append(torch.bfloat16)  # its products are wrong in the interpreter
CASES = [
    (dtype, bias, size)
    for dtype in DTYPES
    for bias in (False, True)
    for size in [(1, 1, 1, 1), (5, 1, 33, 17), (5, 7, 70, 90), (2, 66, 9, 3)]
]
CASES += [(dtype, True, size) for dtype in DTYPES for size in [(2, 65, 70, 136), (1, 100, 136, 40)]]


@pytest.fixture(params=["64-row tiles", "128- and 256-row tiles"])
def tile_size(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small problems take the largest tiles too if there is one multiprocessor to keep busy."""
    if DEVICE.type == "cuda":
        pytest.skip("a GPU is what it is")
    with assume(TARGETS[90] if request.param == "64-row tiles" else Gpu(90, TARGETS[90].shared, 1)):
        yield


def module(name: str) -> ModuleType:
    return import_module(f"diffprune.kernels.triton.{name}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_dot(input: Tensor, grad_output: Tensor, direction: Tensor, bias: Tensor | None, tol: float = 3e-6) -> None:
    """Errors are relative to the largest value a dot of such vectors can have, over the root of their dimension."""
    dot = launch(linear_grad_dot, input, grad_output, direction, bias)
    assert dot.dtype == torch.float32
    a, g, m = input.double(), grad_output.double(), direction.double()
    gradient = torch.einsum("bto,bti->boi", g, a)
    expected = (gradient * m).sum(dim=(1, 2))
    scale = gradient.flatten(1).norm(dim=1) * m.norm() / max(1, m.numel()) ** 0.5
    if bias is not None:
        expected = expected + (g.sum(dim=1) * bias.double()).sum(dim=1)
        scale = scale + g.sum(dim=1).norm(dim=1) * bias.double().norm() / bias.numel() ** 0.5
    error = (dot.double() - expected).abs() / (expected.abs() + scale)
    assert (error <= tol).all(), error


def check_sqnorm(input: Tensor, grad_output: Tensor, bias: bool, rtol: float = 1e-5) -> None:
    sqnorm = launch(linear_grad_sqnorm, input, grad_output, bias)
    assert sqnorm.dtype == torch.float32
    torch.testing.assert_close(sqnorm.double(), exact_sqnorm(input, grad_output, bias), rtol=rtol, atol=0)


def exact_sqnorm(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    a, g = input.double(), grad_output.double()
    sqnorm = torch.einsum("bto,bti->boi", g, a).square().sum(dim=(1, 2))
    return sqnorm + g.sum(dim=1).square().sum(dim=1) if bias else sqnorm


@pytest.mark.parametrize(("dtype", "bias", "size"), CASES)
def test_dot_odd_sizes(dtype: torch.dtype, bias: bool, size: tuple[int, int, int, int]) -> None:
    b, t, i, o = size
    tensors = normal(b, t, i, seed=1), normal(b, t, o, seed=2), normal(o, i, seed=3), normal(o, seed=4)
    input, grad_output, direction, bias_direction = (tensor.to(dtype) for tensor in tensors)
    check_dot(input, grad_output, direction, bias_direction if bias else None)


@pytest.mark.parametrize("t", [40, 80])
@pytest.mark.parametrize(("i", "o"), [(144, 264), (264, 144), (143, 263), (263, 143)])
def test_dot_large_tiles(tile_size: None, t: int, i: int, o: int) -> None:
    """Both sides, several tiles of columns, deep loops, tiles over three samples, by descriptors and by pointers."""
    tensors = normal(3, t, i, seed=1), normal(3, t, o, seed=2), normal(o, i, seed=3), normal(o, seed=4)
    check_dot(*(tensor.half() for tensor in tensors))


def test_dot_many_groups_of_tiles(tile_size: None) -> None:
    """More than GROUP tiles of rows, the last group not full, with two tiles of columns."""
    check_dot(normal(1, 64 * 10 + 5, 3).half(), normal(1, 64 * 10 + 5, 140, seed=1).half(), normal(140, 3).half(), None)
    check_dot(
        normal(1, 64 * 10 + 5, 140).half(), normal(1, 64 * 10 + 5, 150, seed=1).half(), normal(150, 140).half(), None
    )


@pytest.mark.parametrize(("i", "o"), [(12, 30), (30, 12)])
def test_dot_mixed_precision_is_upcast(i: int, o: int) -> None:
    input, grad_output, direction, bias = normal(3, 9, i), normal(3, 9, o, seed=1), normal(o, i, seed=2), normal(o)
    check_dot(input.half(), grad_output.half(), direction, bias.bfloat16())
    check_dot(input, grad_output.bfloat16(), direction.half(), bias)


def test_pieces_add_up_to_the_direction() -> None:
    direction = normal(30, 20) * torch.logspace(-30, 30, 20)
    parts = module("linear_grad_dot").pieces(direction, torch.bfloat16)
    assert parts.dtype == torch.bfloat16 and len(parts) == 3
    assert torch.equal(parts.double().sum(dim=0), direction.double())
    for dtypes in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float16)):
        whole = direction.to(dtypes[0])
        assert torch.equal(module("linear_grad_dot").pieces(whole, dtypes[1]), whole[None])


@pytest.mark.parametrize(("i", "o"), [(70, 90), (90, 70), (72, 136), (136, 72)])
def test_dot_by_pieces(i: int, o: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces that a float32 direction is split into for bfloat16, here of float16."""
    if DEVICE.type == "cuda":
        inputs = normal(3, 30, i, seed=1).bfloat16(), normal(3, 30, o, seed=2).bfloat16()
        return check_dot(*inputs, normal(o, i, seed=3), normal(o, seed=4).bfloat16())
    high, low = normal(o, i, seed=3).half(), normal(o, i, seed=5).half()
    monkeypatch.setattr(module("linear_grad_dot"), "pieces", lambda *_: torch.stack([high, low, low]))
    inputs = normal(3, 30, i, seed=1).half(), normal(3, 30, o, seed=2).half()
    check_dot(*inputs, high.float() + 2 * low.float(), normal(o, seed=4).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_strided_inputs(dtype: torch.dtype) -> None:
    input, grad_output = normal(3, 9, 40).mT.to(dtype), normal(3, 40, 22, seed=1).to(dtype)[:, :, :20]
    check_dot(input, grad_output, normal(9, 20, seed=2).mT.to(dtype), normal(20, 2, seed=3).to(dtype)[:, 1])
    check_dot(grad_output, input, normal(9, 22, seed=2).to(dtype)[:, :20], normal(9, 2, seed=3).to(dtype)[:, 1])


def test_dot_of_an_expanded_input() -> None:
    input, grad_output, direction = normal(1, 1, 64), normal(3, 5, 72, seed=1), normal(72, 64, seed=2)
    tensors = [x.half().to(DEVICE) for x in (input, grad_output, direction)]
    dot = linear_grad_dot(tensors[0].expand(3, 5, 64), *tensors[1:], impl="triton").cpu()
    whole = launch(linear_grad_dot, input.half().expand(3, 5, 64).contiguous(), grad_output.half(), direction.half())
    torch.testing.assert_close(dot, whole, rtol=3e-6, atol=0)  # by pointers and by descriptors: another order of sums


@pytest.mark.parametrize(("b", "t", "i", "o"), [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0), (2, 4, 0, 3)])
def test_empty(b: int, t: int, i: int, o: int) -> None:
    input, grad_output, bias = normal(b, t, i), normal(b, t, o), normal(o, seed=1)
    dot = launch(linear_grad_dot, input, grad_output, normal(o, i), bias)
    torch.testing.assert_close(dot, grad_output.sum(dim=1) @ bias, atol=1e-5, rtol=0)
    sqnorm = launch(linear_grad_sqnorm, input, grad_output, True)
    torch.testing.assert_close(sqnorm, exact_sqnorm(input, grad_output, True).float(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("t", [1, 5, 100])
@pytest.mark.parametrize("o", [2, 30])
def test_nan_stays_in_its_sample(t: int, o: int) -> None:
    input, grad_output = normal(3, t, 20), normal(3, t, o, seed=1)
    input[1, -1, 3] = torch.nan
    dot = launch(linear_grad_dot, input, grad_output, normal(o, 20, seed=2), normal(o, seed=3))
    sqnorm = launch(linear_grad_sqnorm, input, grad_output, True)
    assert dot.isnan().tolist() == sqnorm.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("dtype", "bias", "size"), [*CASES, (torch.float16, True, (70, 2, 40, 48))])
def test_sqnorm_odd_sizes(dtype: torch.dtype, bias: bool, size: tuple[int, int, int, int]) -> None:
    b, t, i, o = size
    check_sqnorm(normal(b, t, i, seed=1).to(dtype), normal(b, t, o, seed=2).to(dtype), bias)


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize(
    ("b", "t", "i", "o"), [(4, 17, 80, 72), (4, 17, 79, 71), (2, 192, 72, 264), (2, 140, 71, 263), (2, 128, 8, 136)]
)
def test_sqnorm_forms(
    tile_size: None, monkeypatch: pytest.MonkeyPatch, form: str, b: int, t: int, i: int, o: int
) -> None:
    """Each form also where the other takes fewer operations; several tiles; by descriptors and by pointers."""
    own = module("linear_grad_sqnorm")
    monkeypatch.setattr(own, "form_of", lambda *_: getattr(own, form))
    input, grad_output = normal(b, t, i, seed=1).half(), normal(b, t, o, seed=2).half()
    check_sqnorm(input, grad_output, True)


@pytest.mark.parametrize(
    ("t", "i", "o", "form"),
    [
        (256, 1152, 3456, "gram"),
        (256, 4608, 1152, "gram"),
        (256, 16, 1152, "direct"),
        (256, 1152, 32, "direct"),
        (4, 1152, 3456, "gram"),
        (4096, 384, 384, "direct"),
    ],
)
def test_sqnorm_takes_the_form_with_fewer_operations(t: int, i: int, o: int, form: str) -> None:
    own = module("linear_grad_sqnorm")
    a, g = (torch.empty(64 * t, width, dtype=torch.float16, device="meta") for width in (i, o))
    assert own.form_of(a, g, 64, t) is getattr(own, form)


def test_gram_tiles() -> None:
    """Whole samples per tile, groups of them, and upper tiles per group."""
    tiles = module("linear_grad_sqnorm").gram_tiles
    assert tiles(10, 1, 64) == (64, 1, 1)
    assert tiles(10, 21, 64) == (3, 4, 1)
    assert tiles(10, 64, 64) == (1, 10, 1)
    assert tiles(10, 65, 64) == (1, 10, 3)
    assert tiles(10, 256, 64) == (1, 10, 10)


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_nan_stays_in_its_part_of_a_tile(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module("linear_grad_sqnorm")
    monkeypatch.setattr(own, "form_of", lambda *_: getattr(own, form))
    input = normal(3, 9, 20)
    input[1, 4, 3] = torch.nan
    sqnorm = launch(linear_grad_sqnorm, input, normal(3, 9, 30, seed=1), True)
    assert sqnorm.isnan().tolist() == [False, True, False]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is what it is")
def test_sqnorm_of_marked_samples_only() -> None:
    """With fewer programs than tiles, and nothing done for the others."""
    own = module("linear_grad_sqnorm_direct")
    input, grad_output = normal(300, 20, 300).half(), normal(300, 20, 150, seed=1).half()
    marked = torch.zeros(300, dtype=torch.bool)
    marked[[1, 298]] = True
    sqnorm = torch.full((300,), -1.0)
    with assume(Gpu(90, TARGETS[90].shared, 2)):
        own.redo(input.flatten(0, 1), grad_output.flatten(0, 1), 20, True, marked, sqnorm)
    exact = exact_sqnorm(input[marked], grad_output[marked], True).float()
    torch.testing.assert_close(sqnorm[marked], exact, rtol=1e-5, atol=0)
    assert (sqnorm[~marked] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [16, 65])
def test_sqnorm_of_tokens_that_cancel(dtype: torch.dtype, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs share a mean and gradients sum to 0; the Gram form alone is wrong then. Two of the three samples do so."""
    own = module("linear_grad_sqnorm")
    monkeypatch.setattr(own, "form_of", lambda *_: own.gram)
    input = normal(3, 1, 128, seed=1) + 1e-2 * normal(3, t, 128, seed=2)
    grad_output = normal(3, t, 96, seed=3)
    grad_output = (grad_output - grad_output.mean(dim=1, keepdim=True)).to(dtype)
    input[1] = normal(t, 128, seed=4)
    input = input.to(dtype)
    if dtype == torch.float32:
        gram = ((input @ input.mT) * (grad_output @ grad_output.mT)).sum(dim=(1, 2))
        exact = exact_sqnorm(input, grad_output, False)
        assert ((gram - exact).abs() / exact).max() > 3e-5
    check_sqnorm(input, grad_output, True)


def test_sqnorm_recheck_is_what_makes_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module("linear_grad_sqnorm")
    monkeypatch.setattr(own, "form_of", lambda *_: own.gram)
    monkeypatch.setattr(own, "CANCELLATION", float("inf"))
    input = normal(2, 1, 128, seed=1) + 1e-2 * normal(2, 16, 128, seed=2)
    grad_output = normal(2, 16, 96, seed=3)
    grad_output -= grad_output.mean(dim=1, keepdim=True)
    with pytest.raises(AssertionError, match="not close"):
        check_sqnorm(input, grad_output, False)


@pytest.mark.parametrize("t", [1, 3, 60])
def test_sqnorm_mixed_precision_is_upcast(t: int) -> None:
    check_sqnorm(normal(3, t, 20).half(), normal(3, t, 30, seed=1), True)
    check_sqnorm(normal(3, t, 200), normal(3, t, 5, seed=1).half(), True)


def test_sqnorm_of_zeros() -> None:
    grad_output = normal(2, 9, 30)
    grad_output[1] = 0
    sqnorm = launch(linear_grad_sqnorm, normal(2, 9, 20, seed=1), grad_output, True)
    assert sqnorm[0] > 0
    assert sqnorm[1] == 0


def test_same_bits_each_time() -> None:
    input, grad_output, direction = normal(3, 70, 40).half(), normal(3, 70, 50).half(), normal(50, 40).half()
    for op, args in ((linear_grad_dot, (direction,)), (linear_grad_sqnorm, (True,))):
        assert torch.equal(launch(op, input, grad_output, *args), launch(op, input, grad_output, *args))


def test_refusals() -> None:
    ones = torch.ones(2, 3, 4, device=DEVICE)
    with pytest.raises(NotImplementedError, match="triton: needs float16 or bfloat16 or float32, got float64"):
        linear_grad_sqnorm(ones.double(), ones, True, impl="triton")
    with pytest.raises(NotImplementedError, match="triton: needs float16 or bfloat16 or float32, got float64"):
        linear_grad_dot(ones, ones, ones[0, 0, :, None] * ones[0, 0], ones[0, 0].double(), impl="triton")
    meta = torch.empty(2**16, 2**15, 1, device="meta")
    assert module("tiles").refuse_rows(meta) == "needs at most 2147482624 rows in all, got 2147483648"
    assert module("tiles").refuse_rows(meta[:-1]) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's rules")
def test_the_interpreter_is_taken_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(2, 3, 4)
    monkeypatch.setattr(module("linear_grad_sqnorm"), "run", lambda *_: torch.tensor(-1.0))
    assert linear_grad_sqnorm(ones, ones, False).tolist() == [144, 144]
    assert linear_grad_sqnorm(ones, ones, False, impl="triton") == -1
    assert unavailable() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert refuse_inputs(ones) == "needs CUDA tensors, got cpu"
    assert "needs a CUDA device" in unavailable()


def test_tiles_by_size() -> None:
    """On 132 multiprocessors: 576 tiles of 256 take 5 rounds, 192 of them 2, but 384 of 128 only 3."""
    tile = module("tiles").product_tile
    assert tile(16384, 1152, 3456, TARGETS[90]) == (256, 128, 64, {"num_warps": 8, "num_stages": 4})
    assert tile(16384, 384, 1152, TARGETS[90]) == (128, 128, 64, {"num_warps": 4, "num_stages": 3})
    assert tile(50, 384, 1152, TARGETS[90]).rows == 64
    assert tile(240, 264, 1152, Gpu(90, TARGETS[90].shared, 1)).rows == 256
    assert tile(16384, 1152, 3456, TARGETS[80]).rows == 128
    assert tile(16384, 20, 3456, TARGETS[90]).columns == 32


@pytest.mark.parametrize("target", TARGETS.values())
@pytest.mark.parametrize("size", [1, 16, 100, 1152, 4608])
def test_tiles_fit_in_shared_memory(target: Gpu, size: int) -> None:
    """Also of GPUs with less than those that are compiled for: an RTX 4090 has 99 KiB."""
    for own in (target, Gpu(89, 99 * 1024, 128)):
        tile = module("tiles").product_tile(16384, size, size, own)
        assert tile.options["num_stages"] >= 2
        assert tile.options["num_stages"] * (tile.rows + tile.columns) * tile.step * 2 <= own.shared
    with assume(target):
        assert gpu(torch.ones(1)) == target
