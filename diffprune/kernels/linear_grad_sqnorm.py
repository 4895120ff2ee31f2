"""The op ``linear_grad_sqnorm``: per sample, the squared norm of a linear layer's gradient."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype, expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("linear_grad_sqnorm")


@any_array
def linear_grad_sqnorm(input: Array, grad_output: Array, bias: bool, *, impl: str = "auto") -> Array:
    """‖∂ℓ_b/∂W‖² (+ ‖∂ℓ_b/∂bias‖²) of y = x·Wᵀ + bias for each sample b, with ∂ℓ_b/∂W = Gᵀ·A.

    Args:
        input: A, [B, T, I]: the layer's input, T rows (tokens) per sample; float16, bfloat16, float32 or float64.
        grad_output: G, [B, T, O]: the gradient of the sum of the samples' losses with respect to the layer's output;
            any of these dtypes.
        bias: count the bias gradient too, Σ_t G.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        sqnorm: [B] float32 (float64 if an input is). NaN where the sample's inputs hold a NaN.

    Equal forms, with multiply-adds per sample: direct Σ(Gᵀ·A)², T·I·O + I·O; Gram Σ(A·Aᵀ + 1)∘(G·Gᵀ), the 1 for the
    bias, T²·(I + O) + T² (Goodfellow 2015, arXiv 1510.01799, for T = 1: ‖a‖²‖g‖²; Li et al. 2021, arXiv 2110.05679,
    section 4, for T > 1). An implementation is free to take the one with fewer operations; nothing of size B·I·O is
    materialised, except in ``reference``. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device.
    """
    return _op(input.detach(), grad_output.detach(), bias, impl)


@custom_op("linear_grad_sqnorm")
def _op(input: Tensor, grad_output: Tensor, bias: bool, impl: str = "auto") -> Tensor:
    _check(input, grad_output)
    return _implementations(impl, input, grad_output, bias)


@_op.register_fake
def _fake(input: Tensor, grad_output: Tensor, bias: bool, impl: str = "auto") -> Tensor:
    _check(input, grad_output)
    return input.new_empty(input.shape[0], dtype=compute_dtype(input, grad_output))


def _check(input: Tensor, grad_output: Tensor) -> None:
    expect("input", input, "B, T, I")
    expect("grad_output", grad_output, "B, T, O")
    expect_equal("B, T", "input and grad_output", tuple(input.shape[:2]), tuple(grad_output.shape[:2]))
    expect_equal("device", "input and grad_output", input.device, grad_output.device)
