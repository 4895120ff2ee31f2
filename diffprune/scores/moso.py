"""`moso`: what training would lose with a sample, from its gradient's alignment with the mean gradient.

MoSo is the moving-one-sample-out score of Tan et al. (arXiv 2310.14664). With N samples, ḡ their mean gradient, g the
gradient of one and h = (N·ḡ − g)/(N−1) the mean without it:

    paper    (T/N)·η·⟨h, g⟩. The paper's first-order form; T training steps, η the learning rate.
    loo1     η·⟨h, ḡ − h⟩ = η·[(N+1)⟨ḡ,g⟩ − N‖ḡ‖² − ‖g‖²]/(N−1)². The loss of the other samples after one step without
             this one, minus their loss after one step with it: exact to first order in η.
    authors  [(2N−3)‖ḡ‖² + (2N−4)⟨ḡ,g⟩ − (3−4/N)‖g‖²]/(N−1)². What the paper's published code computes, kept to compare
             with. It is not the leave-one-out change: ‖ḡ‖² has the other sign and ‖g‖² another weight.

The score is the mean over the surrogate's checkpoints, each with its own η and ḡ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients
from diffprune.scores import score_field
from diffprune.scores.batches import Advance, Draws, Samples, draw_losses, padded_batches

MODES = {
    "paper": "(T/N)·η·⟨(N·ḡ − g)/(N−1), g⟩",
    "loo1": "η·[(N+1)⟨ḡ,g⟩ − N‖ḡ‖² − ‖g‖²]/(N−1)², the one-step leave-one-out change",
    "authors": "[(2N−3)‖ḡ‖² + (2N−4)⟨ḡ,g⟩ − (3−4/N)‖g‖²]/(N−1)², not the leave-one-out change",
}
MOSO = {mode: score_field("moso", f"mean over checkpoints of {form}") for mode, form in MODES.items()}


def moso(
    mode: str,
    samples: int,
    total_steps: int,
    learning_rate: float,
    dot: Tensor,
    mean_sqnorm: Tensor | float,
    sqnorm: Tensor,
) -> Tensor:
    """The term of one checkpoint.

    Args:
        mode: "paper", "loo1" or "authors".
        samples: N, at least 2.
        total_steps: T, the surrogate's steps of training in all ("paper" only).
        learning_rate: η at the checkpoint (not in "authors").
        dot, mean_sqnorm, sqnorm: ⟨ḡ, g⟩ [B], ‖ḡ‖² and ‖g‖² [B], float64.

    Returns: [B] float64. Raises: InputError for fewer than 2 samples or another mode.
    """
    n = samples
    if n < 2:
        raise InputError(f"moso: expected at least 2 samples, got {n}")
    if mode == "paper":
        return total_steps / n * learning_rate * (n * dot - sqnorm) / (n - 1)
    if mode == "loo1":
        return learning_rate * ((n + 1) * dot - n * mean_sqnorm - sqnorm) / (n - 1) ** 2
    if mode == "authors":
        return ((2 * n - 3) * mean_sqnorm + (2 * n - 4) * dot - (3 - 4 / n) * sqnorm) / (n - 1) ** 2
    raise InputError(f"moso_mode: expected one of {', '.join(MODES)}, got {mode!r}")


def gradient_sum(
    model: nn.Module, samples: Samples, draws: Draws, batch_size: int, advance: Advance | None = None
) -> tuple[dict[str, Tensor], int]:
    """The sum over samples of g, the gradient of a sample's mean loss over its draws: the first pass.

    Everything is added in float64, so that the sum does not depend on how samples are grouped into batches and shards.
    A sample whose loss or gradient is not finite is left out, and not counted.

    Returns: parameter name -> float64 tensor on the CPU, for every trainable parameter; the number of samples in it.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters() if p.requires_grad}
    count = 0
    for batch, real in padded_batches(samples, samples_per_batch(batch_size, draws), advance):
        parts = [(_finite_sum(model, batch, real, draws), real)]
        if parts[0][0] is None:  # somebody's is not finite: each on its own, in a batch of itself
            rows = torch.arange(real, device=batch.hashes.device)
            parts = [(_finite_sum(model, batch.take(row.expand(len(batch))), 1, draws), 1) for row in rows]
        for gradients, samples_in_it in parts:
            if gradients is not None:
                count += samples_in_it
                for name, value in gradients.items():
                    total[name] += value
    return {name: value.cpu() for name, value in total.items()}, count


def gradient_products(
    model: nn.Module,
    mean: Mapping[str, Tensor],
    samples: Samples,
    draws: Draws,
    batch_size: int,
    advance: Advance | None = None,
) -> tuple[Tensor, Tensor]:
    """⟨ḡ, g⟩ and ‖g‖² of every sample, given ḡ by parameter name: the second pass. Two [n] float64."""
    dots, sqnorms = [], []
    for batch, real in padded_batches(samples, samples_per_batch(batch_size, draws), advance):
        with per_sample_gradients(model, direction=mean, rows_per_sample=draws.count) as grads:
            losses, _ = draw_losses(model, batch, draws)
            losses.mean(dim=1).sum().backward()
        dots.append(grads.dot[:real])
        sqnorms.append(grads.sqnorm[:real])
    empty = torch.zeros(0, dtype=torch.float64)
    return (torch.cat(dots), torch.cat(sqnorms)) if dots else (empty, empty)


def samples_per_batch(batch_size: int, draws: Draws) -> int:
    """All draws of a sample are in one batch: how many samples then fit into `batch_size` rows, at least 1."""
    return max(1, batch_size // draws.count)


def _finite_sum(model: nn.Module, batch: Samples, real: int, draws: Draws) -> dict[str, Tensor] | None:
    """The sum over the first `real` samples, or None if a loss or the sum is not finite."""
    with per_sample_gradients(model, norm=False, total=True) as grads:
        losses = draw_losses(model, batch, draws)[0].mean(dim=1)[:real]
        losses.sum().backward()
    finite = [losses.isfinite().all(), *(value.isfinite().all() for value in grads.total.values())]
    return grads.total if torch.stack(finite).all() else None
