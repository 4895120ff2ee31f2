"""`monotonicity`: how often training made a sample worse."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.scores import score_field

MONOTONICITY = score_field("monotonicity", "share of successive checkpoints at which the sample's loss rose")


def monotonicity(losses: Tensor) -> Tensor:
    """Share of steps from one checkpoint to the next at which the loss rose.

    Args: losses [C, n], the samples' losses at C >= 2 checkpoints in order of training, at the same draws.
    Returns: [n] float64 in [0, 1]; NaN for a sample with a loss that is not finite.
    Raises: InputError for fewer than 2 checkpoints.
    """
    if len(losses) < 2:
        raise InputError(f"monotonicity: expected at least 2 checkpoints, got {len(losses)}; give a run folder")
    share = (losses[1:] > losses[:-1]).double().mean(dim=0)
    return torch.where(losses.isfinite().all(dim=0), share, torch.nan)
