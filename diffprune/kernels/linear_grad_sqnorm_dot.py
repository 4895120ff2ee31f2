"""The op ``linear_grad_sqnorm_dot``: ``linear_grad_sqnorm`` and ``linear_grad_dot`` of the same layer at once."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.dispatch import Op
from diffprune.kernels.linear_grad_dot import check
from diffprune.kernels.registration import custom_op

_implementations = Op("linear_grad_sqnorm_dot")


@any_array
def linear_grad_sqnorm_dot(
    input: Array, grad_output: Array, direction: Array, bias_direction: Array | None = None, *, impl: str = "auto"
) -> tuple[Array, Array]:
    """‖∂ℓ_b/∂W‖² and ⟨∂ℓ_b/∂W, M⟩ of y = x·Wᵀ + bias for each sample b, with ∂ℓ_b/∂W = Gᵀ·A: GraNd and MoSo at once.

    Args:
        input: A, [B, T, I]: the layer's input, T rows (tokens) per sample; float16, bfloat16, float32 or float64.
        grad_output: G, [B, T, O]: the gradient of the sum of the samples' losses with respect to the layer's output;
            any of these dtypes.
        direction: M, [O, I], any of these dtypes: for MoSo the mean weight gradient.
        bias_direction: m, [O]: + ‖∂ℓ_b/∂bias‖² and + ⟨∂ℓ_b/∂bias, m⟩; None to leave the bias out of both.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        sqnorm: [B] float32 (float64 if an input is). NaN where the sample's inputs hold a NaN.
        dot: [B], likewise.

    Where it pays, both come from one product: Gᵀ·A, T·I·O multiply-adds per sample, is squared and multiplied by M tile
    by tile. Elsewhere (one token; the Gram form of the norm, T²·(I + O), and the dot's product A·Mᵀ, which is not per
    sample, are cheap) the two are computed one after the other, as the other two ops do. An implementation counts
    operations to choose; nothing of size B·I·O is materialised, except in ``reference``. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device.
    """
    bias_direction = None if bias_direction is None else bias_direction.detach()
    return _op(input.detach(), grad_output.detach(), direction.detach(), bias_direction, impl)


@custom_op("linear_grad_sqnorm_dot")
def _op(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    check(input, grad_output, direction, bias_direction)
    return _implementations(impl, input, grad_output, direction, bias_direction)


@_op.register_fake
def _fake(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    check(input, grad_output, direction, bias_direction)
    dtype = compute_dtype(input, grad_output, direction)
    return input.new_empty(input.shape[0], dtype=dtype), input.new_empty(input.shape[0], dtype=dtype)
