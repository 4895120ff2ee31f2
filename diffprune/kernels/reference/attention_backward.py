"""Definition of ``attention_backward``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.reference.attention import token_major


def run(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value; see ``kernels/attention.py``."""
    dtype, scale = compute_dtype(query), query.shape[3] ** -0.5
    grad, q, k, v = (tensor.to(dtype) for tensor in (grad_out, query, key, value))
    weights = (q @ k.mT / query.shape[3] ** 0.5 - logsumexp[..., None]).exp()  # rounded as in the forward
    delta = (grad * out.to(dtype)).sum(dim=3, keepdim=True)
    grad_scores = weights * (grad @ v.mT - delta) * scale
    grads = grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad
    return tuple(token_major(tensor.to(query.dtype)) for tensor in grads)
