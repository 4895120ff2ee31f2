"""`grand`: how far a sample would move the surrogate's parameters."""

from __future__ import annotations

from torch import Tensor, nn

from diffprune.per_sample import per_sample_gradients
from diffprune.scores import score_field
from diffprune.scores.batches import Advance, Draws, Samples, draw_losses, padded_batches
from diffprune.scores.loss import mean_over_draws

GRAND = score_field("grand", "mean over draws of ‖∇ℓ‖₂ over all trainable parameters")


def grand_scores(
    model: nn.Module, samples: Samples, draws: Draws, batch_size: int, advance: Advance | None = None
) -> dict[str, Tensor]:
    """`grand` (GraNd: Paul et al., arXiv 2107.07075, eq. 2), and `loss` and `el2n`, which cost nothing more.

    One forward and one backward per batch and draw. Returns: [n] float64 each.
    """
    losses, errors, norms = [], [], []
    for batch, real in padded_batches(samples, batch_size, advance):
        for draw in range(draws.count):
            with per_sample_gradients(model) as grads:
                loss, error = draw_losses(model, batch, draws, [draw])
                loss.sum().backward()
            losses.append(loss.detach()[:real, 0].double())
            errors.append(error[:real, 0].double())
            norms.append(grads.sqnorm[:real].sqrt())
    columns = {"loss": losses, "el2n": errors, "grand": norms}
    return {name: mean_over_draws(values, draws) for name, values in columns.items()}
