"""``attention`` by PyTorch, with its autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 64
"""Keys that a vector register of a CPU may hold."""


def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See ``kernels/attention.py``; the output alone."""
    if query.shape[1] == 0:  # without heads PyTorch 2.11 divides by zero on a CPU, which ends the process
        return query * key * value
    out = F.scaled_dot_product_attention(query, key, value)
    if query.device.type == "cpu" and query.shape[2] < FEW:
        # PyTorch's CPU kernel takes scores that are all NaN, and fewer than a register holds, for masked: answers 0.
        out = out * torch.where(query.isnan().any(dim=3, keepdim=True), torch.nan, 1.0).to(out.dtype)
    return out
