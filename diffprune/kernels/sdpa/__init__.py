"""PyTorch's ``scaled_dot_product_attention``, which chooses among its own implementations."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why it cannot run on this machine: never."""
    return None
