"""The 1000-step Gaussian diffusion of the published DiTs, which predict its noise (Ho et al., arXiv 2006.11239).

A time t in [0, 1) is one of its steps: t = 0 is the last (nearly all noise), t → 1 the first (nearly data), as on the
flow path of this package.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02  # β grows linearly


def diffuse(x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised data √ᾱ·x1 + √(1 − ᾱ)·x0 (equation 4) [B, ...], and the step that each row is at [B], as float32.

    Args: x1 data [B, ...]; x0 noise, the same shape; t [B] in [0, 1].
    """
    step = ((1 - t.double()) * STEPS).long().clamp(max=STEPS - 1)
    kept = _kept(t.device)[step].view(-1, *[1] * (x1.dim() - 1))
    return kept.sqrt().to(x1.dtype) * x1 + (1 - kept).sqrt().to(x1.dtype) * x0, step.to(torch.float32)


@cache
def _kept(device: torch.device) -> Tensor:
    """ᾱ of each step, the share of the data's variance: [1000] float64."""
    return (1 - torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64)).cumprod(0).to(device)
