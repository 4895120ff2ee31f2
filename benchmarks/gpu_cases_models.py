"""Cases of the ops inside a model and its loss: flow_matching_loss, attention, adaln_modulate, gated_residual."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_case import Case, Goal, Scale, Way, compiled, normal, ours, relative_error, sample_rows
from diffprune.kernels import (
    adaln_modulate,
    attention,
    flow_interpolate,
    flow_matching_loss,
    flow_matching_loss_grad,
    gated_residual,
    gated_residual_adaln,
)
from diffprune.kernels.philox import normal_noise

SEED, DRAW = 7, 3
EPS = 1e-6  # of DiT's LayerNorm
STREAMED = (
    Goal("90% of copy bandwidth", "copy", 0.9),
    Goal("1.3 times torch.compile", "faster", 1.3, ("torch.compile",)),
)


def flow_matching_loss_cases(scale: Scale) -> Iterator[Case]:
    """Latents of 256-pixel images. torch.compile reads the noise, which a caller without the op has to store."""
    b, n = scale.size(32768, 3), scale.size(4 * 32 * 32, 20)
    for with_gradient in (False, True):
        for dtype in (torch.float32, torch.bfloat16):

            def make(generator: torch.Generator, dtype: torch.dtype = dtype) -> tuple:
                hashes = torch.randint(2**62, (b,), generator=generator, device=generator.device)
                velocity, x1 = (normal(generator, b, n, dtype=dtype) for _ in range(2))
                x0 = normal_noise(hashes, SEED, DRAW, n).to(dtype)
                return velocity, x1, hashes, torch.full((b,), 1 / b, device=generator.device), x0

            def check(inputs: tuple, output: Any, with_gradient: bool = with_gradient) -> float:
                velocity, x1, hashes, weight, _ = inputs
                rows = sample_rows(b, 16, velocity.device)
                v, x = velocity[rows].double(), x1[rows].double()
                counter = hashes[rows], SEED, DRAW
                if not with_gradient:
                    return relative_error(output[rows], flow_matching_loss(v, x, *counter, impl="reference"))
                expected = flow_matching_loss_grad(v, x, *counter, weight[rows].double(), impl="reference")
                return max(relative_error(o[rows], e) for o, e in zip(output, expected, strict=True))

            def run(
                impl: str,
                velocity: Tensor,
                x1: Tensor,
                hashes: Tensor,
                weight: Tensor,
                _: Tensor,
                with_gradient: bool = with_gradient,
            ) -> Any:
                counter = hashes, SEED, DRAW
                if with_gradient:
                    return flow_matching_loss_grad(velocity, x1, *counter, weight, impl=impl)
                return flow_matching_loss(velocity, x1, *counter, impl=impl)

            def ways(
                run: Callable = run,
                check: Callable = check,
                with_gradient: bool = with_gradient,
                dtype: torch.dtype = dtype,
            ) -> list[Way]:
                op = "flow_matching_loss_grad" if with_gradient else "flow_matching_loss"
                plain = compiled(scale, _plain_loss_grad if with_gradient else _plain_loss)
                call = lambda v, x1, hashes, weight, x0: plain(v, x1, x0, *[weight] * with_gradient)  # noqa: E731
                tolerance = 1e-2 if with_gradient and dtype == torch.bfloat16 else 1e-5
                compiler = Way("torch.compile, stored noise", call, False, check, 2e-2)
                return [*ours(scale, op, run, check, tolerance), compiler]

            moved = b * n * dtype.itemsize * (3 if with_gradient else 2) + b * (16 if with_gradient else 12)
            name = str(dtype).removeprefix("torch.")
            label = f"{name}{', with gradient' * with_gradient}"
            yield Case("flow_matching_loss", label, {"B": b, "n": n}, name, make, ways, moved, 0, STREAMED)


def flow_interpolate_cases(scale: Scale) -> Iterator[Case]:
    """As flow_matching_loss: torch.compile reads noise that was stored."""
    b, n = scale.size(32768, 3), scale.size(4 * 32 * 32, 20)
    for dtype in (torch.float32, torch.bfloat16):

        def make(generator: torch.Generator, dtype: torch.dtype = dtype) -> tuple:
            hashes = torch.randint(2**62, (b,), generator=generator, device=generator.device)
            x1, t = normal(generator, b, n, dtype=dtype), torch.rand(b, generator=generator, device=generator.device)
            return x1, t, hashes, normal_noise(hashes, SEED, DRAW, n).to(dtype)

        def check(inputs: tuple, xt: Tensor) -> float:
            x1, t, hashes, _ = inputs
            rows = sample_rows(b, 16, x1.device)
            some = x1[rows].double(), t[rows].double(), hashes[rows]
            return relative_error(xt[rows], flow_interpolate(*some, SEED, DRAW, impl="reference"))

        def ways(check: Callable = check, dtype: torch.dtype = dtype) -> list[Way]:
            run = lambda impl, *x: flow_interpolate(*x[:3], SEED, DRAW, impl=impl)  # noqa: E731
            plain = compiled(scale, lambda x1, t, x0: ((1 - t[:, None]) * x0 + t[:, None] * x1).to(x1.dtype))
            call = lambda x1, t, _, x0: plain(x1, t, x0)  # noqa: E731
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            return [
                *ours(scale, "flow_interpolate", run, check, tolerance),
                Way("torch.compile, stored noise", call, False, check, 2e-2),
            ]

        name, moved = str(dtype).removeprefix("torch."), 2 * b * n * dtype.itemsize + 12 * b
        yield Case("flow_interpolate", name, {"B": b, "n": n}, name, make, ways, moved, 0)


def attention_cases(scale: Scale) -> Iterator[Case]:
    """Heads of DiT-XL/2 (72) and DiT-S/2 (64), chunks of one projection, bfloat16; forward alone and with backward."""
    for name, samples, heads, size in (("DiT-XL/2", 256, 16, 72), ("DiT-S/2", 512, 6, 64)):
        for backward in (True, False):
            b, h = scale.size(samples, 2), scale.size(heads, 2)
            t, d = scale.size(256, 9), scale.size(size, 8)

            def make(generator: torch.Generator, b=b, h=h, t=t, d=d, backward=backward) -> tuple:
                qkv = normal(generator, b, t, 3, h, d, dtype=torch.bfloat16)
                tensors = [x.transpose(1, 2).requires_grad_(backward) for x in qkv.unbind(2)]
                return *tensors, normal(generator, b, t, h, d, dtype=torch.bfloat16).transpose(1, 2)

            def check(inputs: tuple, output: tuple, backward: bool = backward) -> float:
                rows = sample_rows(len(inputs[0]), 2, inputs[0].device)
                some = [x.detach()[rows].double().requires_grad_(backward) for x in inputs]
                expected = _with_gradients(lambda *x: attention(*x, impl="reference"), *some)
                return max(relative_error(o.detach()[rows], e.detach()) for o, e in zip(output, expected, strict=True))

            def run(impl: str, *inputs: Tensor) -> tuple:
                return _with_gradients(lambda *x: attention(*x, impl=impl), *inputs)

            def ways(run: Callable = run, check: Callable = check) -> list[Way]:
                backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                            SDPBackend.MATH)  # fmt: skip
                sdpa = [Way(f"SDPA {x.name.lower()}", _sdpa(x), False, check, 2e-2) for x in backends]
                own = list(ours(scale, "attention", run, check, 2e-2))
                if "DIFFPRUNE_TRY" in os.environ:  # python -m benchmarks.gpu --only attention
                    own += [Way("triton, smaller tiles", smaller_tiles(way.run), False, check, 2e-2, way.missing)
                            for way in own if way.name == "triton"]  # fmt: skip
                return [*own, *sdpa]

            goal = Goal("as fast as the best SDPA backend", "faster", 1.0, ("SDPA",))
            products = 7 if backward else 2  # forward 2; backward 5, one of them the forward's again
            label = f"{name} head size {d}, forward{'+backward' if backward else ''}"
            shape = {"B": b, "H": h, "T": t, "d": d}
            operations, moved = products * 2 * b * h * t * t * d, (12 if backward else 4) * 2 * b * h * t * d
            goals = (goal,) if backward else ()
            yield Case("attention", label, shape, "bfloat16", make, ways, moved, operations, goals)


def smaller_tiles(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with tiles half as high and 4 warps. No GPU has measured these, nor those that run by default."""

    def forward(tokens: int, size: int, itemsize: int, gpu: object) -> tuple[dict[str, int], dict[str, int]]:
        return {"ROWS": 64, "COLUMNS": 64}, {"num_warps": 4, "num_stages": 3}

    def backward(own: str, size: int, itemsize: int, gpu: object) -> tuple[dict[str, int], dict[str, int]]:
        other = "COLUMNS" if own == "ROWS" else "ROWS"
        return {own: 64, other: 64 if size > 64 else 32}, {"num_warps": 4, "num_stages": 2}

    def tried(*inputs: Any) -> Any:
        kernels = "diffprune.kernels.triton."
        both = import_module(f"{kernels}attention"), import_module(f"{kernels}attention_backward")
        with patch.object(both[0], "config", forward), patch.object(both[1], "config", backward):
            return run(*inputs)

    return tried


def adaln_modulate_cases(scale: Scale) -> Iterator[Case]:
    """Tokens of DiT-XL/2: the block's (bfloat16), and under autocast (float32 in, bfloat16 out); with backward too."""
    plain = lambda x, shift, scale: F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]  # noqa: E731

    def cast(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return plain(x.float(), shift.float(), scale.float()).to(shift.dtype)

    for dtype in (torch.bfloat16, torch.float32):
        width = dtype.itemsize
        yield from _token_cases(scale, "adaln_modulate", adaln_modulate, cast, dtype, ("x",), 2, width + 2,
                                3 * width + 4, STREAMED)  # fmt: skip


def gated_residual_cases(scale: Scale) -> Iterator[Case]:
    """Tokens of DiT-XL/2 under autocast: the residual is float32, the branch bfloat16; alone, and with adaLN after."""

    def plain(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return residual + gate[:, None].float() * branch.float()

    def plain_adaln(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple:
        x = plain(residual, branch, gate)
        y = F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + scale[:, None].float()) + shift[:, None].float()
        return x, y.to(branch.dtype)

    names = ("residual", "branch")
    yield from _token_cases(scale, "gated_residual", gated_residual, plain, torch.float32, names, 1, 10, 18)
    both = _token_cases(scale, "gated_residual_adaln", gated_residual_adaln, plain_adaln, torch.float32, names, 3, 12,
                        12 + 18)  # fmt: skip
    yield from both


def _token_cases(
    scale: Scale, op: str, function: Callable, plain: Callable, dtype: torch.dtype, tokens: tuple[str, ...],
    modulations: int, forward_bytes: int, both_bytes: int, goals: tuple[Goal, ...] = (),
) -> Iterator[Case]:  # fmt: skip
    """An op of tokens [B, T, D] (the first of ``dtype``, others bfloat16) and bfloat16 chunks [B, D] of a modulation.

    The bytes are those per element of a token: moved by the forward, and by forward and backward.
    """
    b, t, d = scale.size(256, 2), scale.size(256, 5), scale.size(1152, 12)
    count = len(tokens) + modulations
    for backward in (False, True):

        def make(generator: torch.Generator, backward: bool = backward) -> tuple:
            first = normal(generator, b, t, d, dtype=dtype)
            others = [normal(generator, b, t, d, dtype=torch.bfloat16) for _ in tokens[1:]]
            chunks = normal(generator, b, 6 * d, dtype=torch.bfloat16).chunk(6, dim=1)[:modulations]
            inputs = [x.detach().requires_grad_(backward) for x in (first, *others, *chunks)]
            outputs = 2 if op == "gated_residual_adaln" else 1
            kinds = (dtype, torch.bfloat16) if outputs == 2 or op == "adaln_modulate" else (dtype,)
            return *inputs, *(normal(generator, b, t, d, dtype=kind) for kind in kinds[-outputs:])

        def call(f: Callable, *inputs: Tensor) -> tuple:
            return _with_gradients(f, *inputs, count=count)

        def check(inputs: tuple, output: tuple, backward: bool = backward) -> float:
            rows = sample_rows(b, 4, inputs[0].device)
            some = [x.detach()[rows].double().requires_grad_(backward and i < count) for i, x in enumerate(inputs)]
            expected = call(lambda *x: function(*x, impl="reference"), *some)
            return max(relative_error(o.detach()[rows], e.detach()) for o, e in zip(output, expected, strict=True))

        def run(impl: str, *inputs: Tensor) -> tuple:
            return call(lambda *x: function(*x, impl=impl), *inputs)

        def ways(check: Callable = check) -> list[Way]:
            fused = compiled(scale, plain)
            compiler = Way("torch.compile", lambda *inputs: call(fused, *inputs), False, check, 2e-2)
            return [*ours(scale, op, run, check, 1e-2), compiler]

        moved = b * t * d * (both_bytes if backward else forward_bytes) + 2 * b * d * modulations
        moved += (4 * b * d * modulations) * backward  # read again, and their gradients written
        label = f"{str(dtype).removeprefix('torch.')} tokens, forward{'+backward' if backward else ''}"
        shape = {"B": b, "T": t, "D": d}
        yield Case(op, label, shape, str(dtype).removeprefix("torch."), make, ways, moved, 0, goals)


def _with_gradients(function: Callable, *inputs: Tensor, count: int = 3) -> tuple:
    """Outputs of ``function(*inputs[:count])``; if these want gradients, those too, from ``inputs[count:]``."""
    outputs = function(*inputs[:count])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not inputs[0].requires_grad:
        return outputs
    return *outputs, *torch.autograd.grad(outputs, inputs[:count], inputs[count:])


def _sdpa(backend: SDPBackend) -> Callable[..., tuple]:
    def run(*inputs: Tensor) -> tuple:
        try:
            with sdpa_kernel([backend]):
                return _with_gradients(F.scaled_dot_product_attention, *inputs)
        except RuntimeError as error:
            if "No viable backend" in str(error) or "No available kernel" in str(error):
                raise NotImplementedError(str(error)) from error
            raise

    return run


def _plain_loss(velocity: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    return (velocity.float() - (x1.float() - x0.float())).square().mean(dim=1)


def _plain_loss_grad(velocity: Tensor, x1: Tensor, x0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    error = velocity.float() - (x1.float() - x0.float())
    return error.square().mean(dim=1), (2 / error.shape[1] * weight[:, None] * error).to(velocity.dtype)
