"""The op ``attention``: every token of a head attends to every token of it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.arrays import Array, any_array
from diffprune.kernels.checks import compute_dtype, expect, expect_equal
from diffprune.kernels.dispatch import PREFERENCE, Op
from diffprune.kernels.registration import custom_op
from diffprune.kernels.sdpa import attention as sdpa

_implementations = Op(
    "attention",
    preference=("sdpa", *PREFERENCE),
    because="PyTorch's scaled_dot_product_attention first, on every device: no GPU has measured ours against it, and "
    "what was not measured to be faster does not go first",
)
_backward_implementations = Op("attention_backward")


@any_array
def attention(query: Array, key: Array, value: Array, *, impl: str = "auto") -> Array:
    """softmax(Q·Kᵀ/√d)·V for each sample and head, not causal (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    Args:
        query, key, value: [B, H, T, d], of one shape and one dtype, float16, bfloat16, float32 or float64; any strides
            (chunks of one projection). B, H and T may be 0, d is at least 1.
        impl: "auto" or "sdpa" for PyTorch's ``scaled_dot_product_attention``, on every device: no implementation here
            has been measured to be faster than it yet. Or the implementation to run, see ``dispatch``.

    Returns:
        [B, H, T, d] of that dtype, computed in float32 (float64 for float64). Except for "sdpa", in memory as
        [B, T, H, d], as the projection after it wants. A NaN in a query stays in its row, one in a key reaches its
        whole head, one in a value its head's column.

    Differentiable with respect to all three. Others than "sdpa" keep query, key, value and output for that, and of each
    row the logarithm of its Σ exp, 4 bytes (FlashAttention 2: Dao 2023, arXiv 2307.08691, section 3.1); their gradients
    repeat bit for bit. Under forward-mode differentiation they raise NotImplementedError; "sdpa" has the derivative in
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    Raises ValueError for another rank, shape, dtype or device.
    """
    _check(query, key, value)
    if impl in ("auto", "sdpa"):  # not through the custom op: it brings its own autograd
        return sdpa.run(query, key, value)
    return _op(query, key, value, impl)[0]


@custom_op("attention", forward_mode='impl="sdpa" in torch.nn.attention.sdpa_kernel(SDPBackend.MATH)')
def _op(query: Tensor, key: Tensor, value: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Also the logsumexp of each row of Q·Kᵀ/√d: [B, H, T] float32 (float64 for float64)."""
    _check(query, key, value)
    return _implementations(impl, query, key, value)


@_op.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    _check(query, key, value)
    return _empty(query), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


@custom_op("attention_backward")
def _op_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_implementations(impl, grad_out, query, key, value, out, logsumexp)


@_op_backward.register_fake
def _fake_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(query), _empty(query)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out: Tensor, _):
    return *_op_backward(grad_out, *ctx.saved_tensors, ctx.impl), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _empty(like: Tensor) -> Tensor:
    """[B, H, T, d] that lies in memory as [B, T, H, d]."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    names = "query, key and value"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        expect(name, tensor, "B, H, T, d")
    expect_equal("shape", names, tuple(query.shape), tuple(key.shape), tuple(value.shape))
    expect_equal("dtype", names, query.dtype, key.dtype, value.dtype)
    expect_equal("device", names, query.device, key.device, value.device)
    if query.shape[3] == 0:
        raise ValueError(f"expected heads of size at least 1, got query {tuple(query.shape)}")
