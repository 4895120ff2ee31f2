"""The op ``gated_residual_adaln``: ``gated_residual`` and ``adaln_modulate`` of its result, as they follow in DiT."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("gated_residual_adaln")
_backward_implementations = Op("gated_residual_adaln_backward")


@any_array
def gated_residual_adaln(
    residual: Array, branch: Array, gate: Array, shift: Array, scale: Array, *, impl: str = "auto"
) -> tuple[Array, Array]:
    """x = residual + gate·branch and y = LN(x)·(1 + scale) + shift: what DiT does between one branch and the next.

    Args:
        residual, branch, gate: as in ``gated_residual``; D at least 1.
        shift, scale: as in ``adaln_modulate``, of branch's dtype.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        x: [B, T, D] contiguous, residual's dtype.
        y: [B, T, D] contiguous, branch's dtype: of the x that is returned, rounded as it is.

    Differentiable with respect to all five. The backward keeps x, branch, gate and scale. In one pass: 4 tensors of the
    tokens' size moved where the two ops move 5, and 6 in the backward where they and the sum of x's gradients move 9.
    Sums over tokens are made in a fixed order, so that gradients repeat bit for bit.
    Not under forward-mode differentiation: NotImplementedError, which has the expressions to take there.
    Raises ValueError for another rank, shape, dtype or device.
    """
    return _op(residual, branch, gate, shift, scale, impl)


@custom_op(
    "gated_residual_adaln",
    forward_mode="x = residual + gate[:, None] * branch and "
    f"F.layer_norm(x, x.shape[-1:], eps={EPS}) * (1 + scale[:, None]) + shift[:, None]",
)
def _op(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(residual, branch, gate, shift, scale)
    return _implementations(impl, residual, branch, gate, shift, scale)


@_op.register_fake
def _fake(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check(residual, branch, gate, shift, scale)
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape)


@custom_op("gated_residual_adaln_backward")
def _op_backward(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_implementations(impl, grad_x, grad_y, x, branch, gate, scale)


@_op_backward.register_fake
def _fake_backward(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = [gate.new_empty(gate.shape) for _ in range(3)]
    return x.new_empty(x.shape), branch.new_empty(branch.shape), rows[0], rows[1], rows[2]


def _setup_context(ctx, inputs, output) -> None:
    _, branch, gate, _, scale, ctx.impl = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)


def _backward(ctx, grad_x: Tensor, grad_y: Tensor):
    return *_op_backward(grad_x, grad_y, *ctx.saved_tensors, ctx.impl), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> None:
    expect("residual", residual, "B, T, D")
    expect("branch", branch, "B, T, D")
    expect_equal("shape", "residual and branch", tuple(residual.shape), tuple(branch.shape))
    rows = gate, shift, scale
    for name, tensor in zip(("gate", "shift", "scale"), rows, strict=True):
        expect(name, tensor, "B, D")
    names = "branch, gate, shift and scale"
    samples_and_features = branch.shape[0], branch.shape[2]
    expect_equal("B, D", names, samples_and_features, *(tuple(tensor.shape) for tensor in rows))
    expect_equal("dtype", names, branch.dtype, *(tensor.dtype for tensor in rows))
    expect_equal("device", f"residual, {names}", residual.device, branch.device, *(tensor.device for tensor in rows))
    if branch.shape[2] == 0:
        raise ValueError(f"expected residual [B, T, D] with D at least 1, got {tuple(residual.shape)}")
