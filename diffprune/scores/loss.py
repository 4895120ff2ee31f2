"""`loss` and `el2n`: how wrong the surrogate is about a sample (EL2N: Paul et al., arXiv 2107.07075)."""

from __future__ import annotations

from diffprune.scores import score_field

LOSS = score_field("loss", "mean over draws of the flow matching loss ℓ = mean((v − (x1 − x0))²)")
EL2N = score_field("el2n", "mean over draws of the velocity's error norm ‖v − (x1 − x0)‖₂")
