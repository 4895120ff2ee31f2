"""`loss` and `el2n`: how wrong the surrogate is about a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffprune.scores import score_field
from diffprune.scores.batches import Advance, Draws, Samples, draw_losses, padded_batches

LOSS = score_field("loss", "mean over draws of the flow matching loss ℓ = mean((v − (x1 − x0))²)")
EL2N = score_field("el2n", "mean over draws of the velocity's error norm ‖v − (x1 − x0)‖₂")


@torch.no_grad()
def loss_scores(
    model: nn.Module, samples: Samples, draws: Draws, batch_size: int, advance: Advance | None = None
) -> dict[str, Tensor]:
    """`loss` and `el2n` (EL2N: Paul et al., arXiv 2107.07075, for a regression): [n] float64 each."""
    losses, errors = [], []
    for batch, real in padded_batches(samples, batch_size, advance):
        for draw in range(draws.count):
            loss, error = draw_losses(model, batch, draws, [draw])
            losses.append(loss[:real, 0].double())
            errors.append(error[:real, 0].double())
    return {"loss": mean_over_draws(losses, draws), "el2n": mean_over_draws(errors, draws)}


def mean_over_draws(values: list[Tensor], draws: Draws) -> Tensor:
    """Values of batch 0 at draw 0, 1, ..., then of batch 1, ...: [b] each -> [n], the mean over draws."""
    means = [torch.stack(values[i : i + draws.count]).mean(dim=0) for i in range(0, len(values), draws.count)]
    return torch.cat(means) if means else torch.zeros(0, dtype=torch.float64)
