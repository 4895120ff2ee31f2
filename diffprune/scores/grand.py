"""`grand`: how far a sample would move the surrogate's parameters (GraNd: Paul et al., arXiv 2107.07075, eq. 2)."""

from __future__ import annotations

from diffprune.scores import score_field

GRAND = score_field("grand", "mean over draws of ‖∇ℓ‖₂ over all trainable parameters")
