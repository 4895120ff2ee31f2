"""`loss` and `el2n`: how wrong the surrogate is about a sample (EL2N: Paul et al., arXiv 2107.07075)."""

from __future__ import annotations

from diffprune.scores import score_field

LOSS = score_field("loss", "mean over draws of the flow matching loss ℓ = mean((v − (x1 − x0))²)")
LOSS_OF_NOISE = score_field(
    "loss", "mean over draws of the denoising loss ℓ = mean((ε − x0)²) at a step of a Gaussian diffusion"
)
EL2N = score_field("el2n", "mean over draws of the velocity's error norm ‖v − (x1 − x0)‖₂")
EL2N_OF_NOISE = score_field("el2n", "mean over draws of the predicted noise's error norm ‖ε − x0‖₂")
