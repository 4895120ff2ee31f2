"""The op ``gated_residual``: a residual connection whose branch each sample gates."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("gated_residual")
_backward_implementations = Op("gated_residual_backward")


@any_array
def gated_residual(residual: Array, branch: Array, gate: Array, *, impl: str = "auto") -> Array:
    """y = residual + gate·branch: adaLN-Zero's residual connection (DiT, arXiv 2212.09748, section 3.2).

    Args:
        residual: [B, T, D]; float16, bfloat16, float32 or float64; B, T and D may be 0.
        branch: [B, T, D], any of these dtypes: the output of attention or MLP.
        gate: [B, D], of branch's dtype; rows may be strided (chunks of one modulation tensor).
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        y: [B, T, D] contiguous, residual's dtype. Computed in float32 (float64 if an input is).

    Differentiable with respect to all three. The residual's gradient is y's; the backward keeps branch and gate and
    moves three tensors of their size (reads y's gradient and branch, writes branch's gradient). Sums over tokens are
    made in a fixed order, so that gradients repeat bit for bit.
    Not under forward-mode differentiation: NotImplementedError, which has the expression to take there.
    Raises ValueError for another rank, shape, dtype or device.
    """
    return _op(residual, branch, gate, impl)


@custom_op("gated_residual", forward_mode="residual + gate[:, None] * branch")
def _op(residual: Tensor, branch: Tensor, gate: Tensor, impl: str = "auto") -> Tensor:
    _check(residual, branch, gate)
    return _implementations(impl, residual, branch, gate)


@_op.register_fake
def _fake(residual: Tensor, branch: Tensor, gate: Tensor, impl: str = "auto") -> Tensor:
    _check(residual, branch, gate)
    return residual.new_empty(residual.shape)


@custom_op("gated_residual_backward")
def _op_backward(grad_y: Tensor, branch: Tensor, gate: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    return _backward_implementations(impl, grad_y, branch, gate)


@_op_backward.register_fake
def _fake_backward(grad_y: Tensor, branch: Tensor, gate: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, branch, gate, ctx.impl = inputs
    ctx.save_for_backward(branch, gate)


def _backward(ctx, grad_y: Tensor):
    return grad_y, *_op_backward(grad_y, *ctx.saved_tensors, ctx.impl), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(residual: Tensor, branch: Tensor, gate: Tensor) -> None:
    expect("residual", residual, "B, T, D")
    expect("branch", branch, "B, T, D")
    expect("gate", gate, "B, D")
    expect_equal("shape", "residual and branch", tuple(residual.shape), tuple(branch.shape))
    expect_equal("B, D", "branch and gate", (branch.shape[0], branch.shape[2]), tuple(gate.shape))
    expect_equal("dtype", "branch and gate", branch.dtype, gate.dtype)
    expect_equal("device", "residual, branch and gate", residual.device, branch.device, gate.device)
