"""Methods × ratios × seeds, each cell a selection, a training run and its metrics; and what they come to."""

from __future__ import annotations

from diffprune.sweeping.running import sweep

__all__ = ["sweep"]
