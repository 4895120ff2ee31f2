"""The op ``linear_grad_dot``: per sample, the inner product of a linear layer's gradient with a given direction."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype, expect, expect_equal
from diffprune.kernels.dispatch import Op
from diffprune.kernels.registration import custom_op

_implementations = Op("linear_grad_dot")


@any_array
def linear_grad_dot(
    input: Array, grad_output: Array, direction: Array, bias_direction: Array | None = None, *, impl: str = "auto"
) -> Array:
    """⟨∂ℓ_b/∂W, M⟩ (+ ⟨∂ℓ_b/∂bias, m⟩) of y = x·Wᵀ + bias for each sample b, with ∂ℓ_b/∂W = Gᵀ·A.

    Args:
        input: A, [B, T, I]: the layer's input, T rows (tokens) per sample; float16, bfloat16, float32 or float64.
        grad_output: G, [B, T, O]: the gradient of the sum of the samples' losses with respect to the layer's output;
            any of these dtypes.
        direction: M, [O, I], any of these dtypes: for MoSo the mean weight gradient.
        bias_direction: m, [O], or None to leave the bias out.
        impl: "auto", or the implementation to run, see ``dispatch``.

    Returns:
        dot: [B] float32 (float64 if an input is). NaN where the sample's inputs hold a NaN.

    Equal forms: Σ(Gᵀ·A)∘M, Σ(A·Mᵀ)∘G with T·O·(I + 1) multiply-adds per sample, Σ(G·M)∘A with T·I·(O + 1). Nothing of
    size B·I·O is materialised, except in ``reference``. Not differentiable.
    Raises ValueError for another rank, shape, dtype or device.
    """
    bias_direction = None if bias_direction is None else bias_direction.detach()
    return _op(input.detach(), grad_output.detach(), direction.detach(), bias_direction, impl)


@custom_op("linear_grad_dot")
def _op(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    check(input, grad_output, direction, bias_direction)
    return _implementations(impl, input, grad_output, direction, bias_direction)


@_op.register_fake
def _fake(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    check(input, grad_output, direction, bias_direction)
    return input.new_empty(input.shape[0], dtype=compute_dtype(input, grad_output, direction))


def check(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> None:
    """ValueError unless these are a layer's input and gradient, and a direction of its weight and bias."""
    expect("input", input, "B, T, I")
    expect("grad_output", grad_output, "B, T, O")
    expect("direction", direction, "O, I")
    expect_equal("B, T", "input and grad_output", tuple(input.shape[:2]), tuple(grad_output.shape[:2]))
    expect_equal("I", "input and direction", input.shape[2], direction.shape[1])
    expect_equal("O", "grad_output and direction", grad_output.shape[2], direction.shape[0])
    expect_equal("device", "input, grad_output and direction", input.device, grad_output.device, direction.device)
    if bias_direction is not None:
        expect("bias_direction", bias_direction, "O")
        expect_equal("O", "grad_output and bias_direction", grad_output.shape[2], bias_direction.shape[0])
        expect_equal("device", "grad_output and bias_direction", grad_output.device, bias_direction.device)
