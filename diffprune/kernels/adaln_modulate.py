"""The op ``adaln_modulate``: LayerNorm without weights, then each sample's shift and scale."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

EPS = 1e-6
"""Added to the variance, as in the published DiT."""

_implementations = Op("adaln_modulate")
_backward_implementations = Op("adaln_modulate_backward")


@any_array
def adaln_modulate(x: Array, shift: Array, scale: Array, *, impl: str = "auto") -> Array:
    """y = LN(x)·(1 + scale) + shift, with LN(x) = (x − mean)/√(variance + 1e-6) over the features of a token.

    adaLN of DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3.2; LayerNorm: Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: tokens, [B, T, D]; float16, bfloat16, float32 or float64; B and T may be 0, D is at least 1.
        shift, scale: [B, D], both of one of these dtypes; rows may be strided (chunks of one modulation tensor).
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        y: [B, T, D] contiguous, in shift's dtype: under autocast x is float32, shift comes from a half-precision layer,
            and y goes into one. Computed in float32 (float64 for float64). NaN over the whole token where x holds one.

    Differentiable with respect to x, shift and scale. The backward keeps x and scale and no statistics: it has the
    whole token at hand and computes mean and variance again. Sums over tokens are made in a fixed order, so that
    gradients repeat bit for bit.
    Not under forward-mode differentiation: NotImplementedError, which has the expression to take there.
    Raises ValueError for another rank, shape, dtype or device.
    """
    return _op(x, shift, scale, impl)


@custom_op(
    "adaln_modulate",
    forward_mode=f"F.layer_norm(x, x.shape[-1:], eps={EPS}) * (1 + scale[:, None]) + shift[:, None]",
)
def _op(x: Tensor, shift: Tensor, scale: Tensor, impl: str = "auto") -> Tensor:
    _check(x, shift, scale)
    return _implementations(impl, x, shift, scale)


@_op.register_fake
def _fake(x: Tensor, shift: Tensor, scale: Tensor, impl: str = "auto") -> Tensor:
    _check(x, shift, scale)
    return shift.new_empty(x.shape)


@custom_op("adaln_modulate_backward")
def _op_backward(grad_y: Tensor, x: Tensor, scale: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    return _backward_implementations(impl, grad_y, x, scale)


@_op_backward.register_fake
def _fake_backward(grad_y: Tensor, x: Tensor, scale: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, _, scale, ctx.impl = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx, grad_y: Tensor):
    return *_op_backward(grad_y, *ctx.saved_tensors, ctx.impl), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    expect("x", x, "B, T, D")
    expect("shift", shift, "B, D")
    expect("scale", scale, "B, D")
    expect_equal("B, D", "x, shift and scale", (x.shape[0], x.shape[2]), tuple(shift.shape), tuple(scale.shape))
    expect_equal("dtype", "shift and scale", shift.dtype, scale.dtype)
    expect_equal("device", "x, shift and scale", x.device, shift.device, scale.device)
    if x.shape[2] == 0:
        raise ValueError(f"expected x [B, T, D] with D at least 1, got {tuple(x.shape)}")
