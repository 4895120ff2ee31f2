"""How a DiT's tokens know where in the image they are: an embedding that is added, or heads that are turned."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_position_embedding(side: int, dim: int) -> Tensor:
    """[side * side, dim] float32: sines and cosines of the column, then of the row, at dim/4 frequencies each."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    phase = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)
    column = waves.repeat(side, 1)
    row = waves.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def rotary_turns(side: int, head_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines [side * side, head_size / 2] float32 by which ``rotate`` turns pairs of a head's elements.

    The first half of the pairs turns with the token's column, the other with its row, at head_size / 4 frequencies
    100^(-4i / head_size) each (RoPE, arXiv 2104.09864, in two axes; a base of 100 because sides are tens of tokens).
    """
    count = head_size // 4
    omega = 100.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
    phase = torch.arange(side, dtype=torch.float64, device=device)[:, None] * omega
    angle = torch.cat([phase.repeat(side, 1), phase.repeat_interleave(side, dim=0)], dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of x [..., T, d]; cosine and sine [T, d / 2]."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, one * sine + two * cosine], dim=-1)
