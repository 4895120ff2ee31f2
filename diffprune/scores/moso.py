"""`moso`: what training would lose with a sample, from its gradient's alignment with the mean gradient.

MoSo is the moving-one-sample-out score of Tan et al. (arXiv 2310.14664). With N samples, ḡ their mean gradient, g the
gradient of one and h = (N·ḡ − g)/(N−1) the mean without it:

    paper    (T/N)·η·⟨h, g⟩. The paper's first-order form; T training steps, η the learning rate.
    loo1     η·⟨h, ḡ − h⟩ = η·[(N+1)⟨ḡ,g⟩ − N‖ḡ‖² − ‖g‖²]/(N−1)². The loss of the other samples after one step without
             this one, minus their loss after one step with it: exact to first order in η.
    authors  [(2N−3)‖ḡ‖² + (2N−4)⟨ḡ,g⟩ − (3−4/N)‖g‖²]/(N−1)². What the paper's published code computes, kept to compare
             with. It is not the leave-one-out change: ‖ḡ‖² has the other sign and ‖g‖² another weight.

The score is the mean over the surrogate's checkpoints, each with its own η and ḡ.

ḡ is made in a first pass over all samples, or over a part of them (the *support set*); the second one takes norms and
dot products. In one pass, ḡ can be estimated from the few samples that are in memory together: `in_group`.
"""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor, nn

from diffprune.errors import InputError
from diffprune.memory import BatchSize
from diffprune.per_sample import per_sample_gradients
from diffprune.scores import score_field
from diffprune.scores.batches import Advance, Draws, Network, Samples, draw_losses, in_batches
from diffprune.scores.mean_gradients import GradientSum

MODES = {
    "paper": "(T/N)·η·⟨(N·ḡ − g)/(N−1), g⟩",
    "loo1": "η·[(N+1)⟨ḡ,g⟩ − N‖ḡ‖² − ‖g‖²]/(N−1)², the one-step leave-one-out change",
    "authors": "[(2N−3)‖ḡ‖² + (2N−4)⟨ḡ,g⟩ − (3−4/N)‖g‖²]/(N−1)², not the leave-one-out change",
}
SUM_ROWS = {"cpu": 32, "cuda": 128}  # draws in a sum in float32, whatever the batch size: it shows in the last digits


def moso_field(mode: str, mean: str = "") -> pa.Field:
    """The column of a mode; `mean` says where ḡ is from, if not from all samples."""
    return score_field("moso", f"mean over checkpoints of {MODES[mode]}{mean and '; '}{mean}")


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


def whole_set(
    support: int, population: int, inside: Tensor, dot: Tensor, mean_sqnorm: float, sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    """⟨ḡ, g⟩ and ‖ḡ‖² [B] of the whole set, as far as a support set tells.

    The mean of the others, h, is taken from the support set, without the sample where it is in it; N·ḡ = (N−1)·h + g.

    Args:
        support, population: how many samples the support set has, and the N of the set that it was taken from.
        inside: [B] bool, which samples are in the support set.
        dot, mean_sqnorm, sqnorm: ⟨m, g⟩ [B], ‖m‖², ‖g‖² [B] with m the mean gradient of the support set.
    """
    if support == population:
        return dot, torch.full_like(dot, mean_sqnorm)
    n = support
    others_dot = torch.where(inside, (n * dot - sqnorm) / (n - 1), dot)
    others = torch.where(inside, (n * n * mean_sqnorm - 2 * n * dot + sqnorm) / (n - 1) ** 2, mean_sqnorm)
    return _with_sample(population, others_dot, others, sqnorm)


def in_group(population: int, dot: Tensor, sqnorm: Tensor) -> tuple[Tensor, Tensor]:
    """⟨ḡ, g⟩ and ‖ḡ‖² [B] of the whole set, estimated from B of its samples alone.

    Each sample's ⟨h, g⟩ and ‖h‖² are estimated from the others in its group. Over random groups both estimates have the
    right mean; ‖h‖² is NaN for B = 2, where there is no pair of others. Samples that are NaN are none of the group's.

    Args: dot [B], ⟨Σ_j g_j, g_i⟩; sqnorm [B], ‖g_i‖². Returns: two [B] float64, to be given to `moso`.
    """
    size, n = int(dot.isfinite().sum()), population
    if size < 2:
        return torch.full_like(dot, torch.nan), torch.full_like(dot, torch.nan)
    others_dot = (dot - sqnorm) / (size - 1)
    sum_of_others = dot.nansum() - 2 * dot + sqnorm  # ‖Σ_{j≠i} g_j‖²
    norms_of_others = sqnorm.nansum() - sqnorm
    pairs = (sum_of_others - norms_of_others) / ((size - 1) * (size - 2) or torch.nan)
    others = norms_of_others / (size - 1) / (n - 1) + (n - 2) / (n - 1) * pairs
    return _with_sample(population, others_dot, others, sqnorm)


def _with_sample(n: int, others_dot: Tensor, others: Tensor, sqnorm: Tensor) -> tuple[Tensor, Tensor]:
    """⟨ḡ, g⟩ and ‖ḡ‖² from ⟨h, g⟩, ‖h‖² and ‖g‖²."""
    mean_sqnorm = ((n - 1) ** 2 * others + 2 * (n - 1) * others_dot + sqnorm) / n**2
    return ((n - 1) * others_dot + sqnorm) / n, mean_sqnorm


def gradient_sum(
    network: Network, samples: Samples, draws: Draws, size: BatchSize, advance: Advance | None = None
) -> GradientSum:
    """The sum over samples of g, the gradient of a sample's mean loss over its draws: the first pass.

    It costs what training costs. A batch is summed in float32, as in every training step, and the batches in float64;
    give `SUM_ROWS` as their `size`. A sample whose loss or gradient is not finite is left out, and not counted.
    """
    parameters = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}

    def work(batch: Samples, real: int) -> dict[str, Tensor]:
        good = torch.arange(len(batch), device=batch.hashes.device) < real
        if real and not _add_gradients(network, parameters, total, batch, good, draws):
            good &= _finite(network, batch, draws)
            filler = good.nonzero()[:1].flatten()
            if len(filler):
                places = torch.where(good, torch.arange(len(batch), device=good.device), filler)
                if not _add_gradients(network, parameters, total, batch.take(places), good, draws):
                    raise InputError("moso: the sum of finite gradients is not finite in float32")
        return {"good": good[:real]}

    good = in_batches(samples, draws.count, size, work, advance)["good"]
    count = int(good.sum())
    return GradientSum(total, count, count)


def group_products(network: Network, samples: Samples, draws: Draws, rows: int) -> dict[str, Tensor]:
    """What `visit` finds, with ⟨Σ_j g_j, g_i⟩ over the group that `samples` are as `dot`: one forward, one backward.

    The group is filled up to `rows` samples with its last one, which adds nothing. A sample that is not finite is left
    out of the sum; its own values are NaN.
    """
    n = len(samples)
    places = torch.arange(rows, device=samples.hashes.device).clamp(max=n - 1)
    found = _group(network, samples.take(places), n, draws)
    good = torch.stack([value.reshape(rows, -1).isfinite().all(dim=1) for value in found.values()]).all(dim=0)[:n]
    if good.all():
        return {name: value[:n] for name, value in found.items()}
    result = {name: torch.full_like(value[:n], torch.nan) for name, value in found.items()}
    bad = ~_finite(network, samples.take(places), draws)[:n]
    if bad.any() and not bad.all():
        for name, value in group_products(network, samples.take(~bad), draws, rows).items():
            result[name][~bad] = value
    return result


def _group(network: Network, group: Samples, real: int, draws: Draws) -> dict[str, Tensor]:
    with per_sample_gradients(network.model, direction="total", rows_per_sample=draws.count) as grads:
        losses, errors = draw_losses(network.eager(), group, draws)
        losses.mean(dim=1)[:real].sum().backward()
    return {"loss": losses.detach().double(), "el2n": errors.double(), "dot": grads.dot, "sqnorm": grads.sqnorm}


def _add_gradients(
    network: Network,
    parameters: dict[str, nn.Parameter],
    total: dict[str, Tensor],
    batch: Samples,
    good: Tensor,
    draws: Draws,
) -> bool:
    """Add the gradient of the good samples' losses, unless something in it is not finite."""
    losses = draw_losses(network, batch, draws)[0].mean(dim=1)[good]
    gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    known = [gradient for gradient in gradients if gradient is not None]
    sizes = torch.stack([losses.detach().norm(), *torch._foreach_norm(known)])
    if not sizes.isfinite().all():
        return False
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient
    return True


def _finite(network: Network, batch: Samples, draws: Draws) -> Tensor:
    """[B]: which samples' loss and gradient are finite."""
    with per_sample_gradients(network.model, rows_per_sample=draws.count) as grads:
        losses = draw_losses(network.eager(), batch, draws)[0].mean(dim=1)
        losses.sum().backward()
    return losses.isfinite() & grads.sqnorm.isfinite()
