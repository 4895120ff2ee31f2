"""The op ``flow_matching_loss``: per sample, the error of a velocity against the linear path's, and its gradient."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import FLOATING, compute_dtype, expect, expect_dense, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.philox import expect_counter, expect_words
from diffprune.kernels.registration import custom_op

_implementations = Op("flow_matching_loss")
_grad_implementations = Op("flow_matching_loss_grad")


@any_array
def flow_matching_loss(velocity: Array, x1: Array, hashes: Array, seed: int, draw: int, *, impl: str = "auto") -> Array:
    """ℓ_b = mean((v − (x1 − x0))²) over the elements of sample b, with x0 re-made from the counter.

    Args:
        velocity: v, the model's output at xt, [B, ...]; float16, bfloat16, float32 or float64; B may be 0, but a sample
            has at least one element.
        x1: data, of v's shape, any of these dtypes.
        hashes, seed, draw: those that ``flow_interpolate`` made xt from.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        loss: [B] float32 (float64 if an input is). NaN where the sample's inputs hold a NaN. EL2N, the error's norm
            ‖v − (x1 − x0)‖₂ (arXiv 2107.07075), is √(n·ℓ) for samples of n elements.

    Differentiable with respect to v alone: ∂ℓ_b/∂v = 2/n·(v − (x1 − x0)). What the backward needs are v, x1 and the
    hashes, which the caller holds: it keeps no state of its own. It makes the noise a second time, because storing the
    error in the forward moves as many bytes (one write and two reads of a latent in place of three reads) and takes
    room. Where the gradient is wanted at once, ``flow_matching_loss_grad`` has both for one pass.
    Not under forward-mode differentiation: NotImplementedError, which has the expression to take there.
    Raises ValueError for another rank, shape, dtype or device, and for a seed or draw out of range.
    """
    expect_words(seed, draw)  # torch passes 64 bits on
    return _op(velocity, x1.detach(), hashes, seed, draw, impl)


@any_array
def flow_matching_loss_grad(
    velocity: Array, x1: Array, hashes: Array, seed: int, draw: int, weight: Array, *, impl: str = "auto"
) -> tuple[Array, Array]:
    """``flow_matching_loss`` and the gradient of Σ_b w_b·ℓ_b with respect to the velocity, in one pass.

    For a step of training with the mean loss: w = 1/B and ``velocity.backward(grad_velocity)``.

    Args:
        velocity, x1, hashes, seed, draw, impl: as there.
        weight: w, [B], any of these dtypes.

    Returns:
        loss: as there.
        grad_velocity: [B, ...] contiguous, v's dtype: w_b·2/n·(v − (x1 − x0)).

    Reads v and x1 once and writes the gradient: 3 latents moved, where loss and backward one after the other move 5.
    Not differentiable. Raises what ``flow_matching_loss`` raises.
    """
    expect_words(seed, draw)  # torch passes 64 bits on
    return _op_grad(velocity.detach(), x1.detach(), hashes, seed, draw, weight.detach(), impl)


@custom_op(
    "flow_matching_loss",
    forward_mode="(velocity - (x1 - x0)).square().flatten(1).mean(dim=1), "
    "x0 being what flow_interpolate makes of t = 0",
)
def _op(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, impl: str = "auto") -> Tensor:
    _check(velocity, x1, hashes, seed, draw)
    return _implementations(impl, velocity, x1, hashes, seed, draw)


@_op.register_fake
def _fake(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, impl: str = "auto") -> Tensor:
    _check(velocity, x1, hashes, seed, draw)
    return velocity.new_empty(velocity.shape[0], dtype=compute_dtype(velocity, x1))


@custom_op("flow_matching_loss_grad")
def _op_grad(
    velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check_grad(velocity, x1, hashes, seed, draw, weight)
    return _grad_implementations(impl, velocity, x1, hashes, seed, draw, weight)


@_op_grad.register_fake
def _fake_grad(
    velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check_grad(velocity, x1, hashes, seed, draw, weight)
    loss = velocity.new_empty(velocity.shape[0], dtype=compute_dtype(velocity, x1))
    return loss, velocity.new_empty(velocity.shape)


def _setup_context(ctx, inputs, output) -> None:
    velocity, x1, hashes, ctx.seed, ctx.draw, ctx.impl = inputs
    ctx.save_for_backward(velocity, x1, hashes)


def _backward(ctx, grad_loss: Tensor):
    velocity, x1, hashes = ctx.saved_tensors
    _, grad_velocity = _op_grad(velocity, x1, hashes, ctx.seed, ctx.draw, grad_loss, ctx.impl)
    return grad_velocity, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> None:
    expect_counter(x1, hashes, seed, draw)
    expect_equal("shape", "velocity and x1", tuple(velocity.shape), tuple(x1.shape))
    expect_equal("device", "velocity and x1", velocity.device, x1.device)
    expect_dense("velocity", velocity)
    if velocity.dtype not in FLOATING:
        raise ValueError(f"expected velocity of a floating dtype, got {velocity.dtype}")
    if velocity.shape[1:].numel() == 0:
        raise ValueError(f"expected samples of at least one element, got velocity {tuple(velocity.shape)}")


def _check_grad(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor) -> None:
    _check(velocity, x1, hashes, seed, draw)
    expect("weight", weight, "B")
    expect_equal("B", "velocity and weight", velocity.shape[0], weight.shape[0])
    expect_equal("device", "velocity and weight", velocity.device, weight.device)
