"""One visit of samples to one checkpoint: all that any method wants to know there, in as few passes as it takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffprune.memory import BatchSize
from diffprune.per_sample import per_sample_gradients
from diffprune.scores.batches import Advance, Draws, Network, Samples, draw_losses, in_batches


def visit(
    network: Network,
    samples: Samples,
    draws: Draws,
    size: BatchSize,
    *,
    norms: bool = False,
    direction: Mapping[str, Tensor] | None = None,
    advance: Advance | None = None,
) -> dict[str, Tensor]:
    """What the samples look like to a surrogate. With g_ij the gradient of sample i's loss at draw j, g_i their mean:

        loss, el2n    [n, J]  ℓ and the norm of the error, of a velocity or of noise
        grand         [n, J]  ‖g_ij‖₂                   with `norms`
        dot, sqnorm   [n]     ⟨direction, g_i⟩, ‖g_i‖²  with a `direction`, by parameter name

    One forward, and one backward where gradients are wanted, gives all of them; only several draws with `norms` and a
    `direction` take two, as the norm of a mean says nothing about the norms. Everything is float64.
    """
    if direction is None:
        return _draw_by_draw(network, samples, draws, size, norms, advance)
    found = _draws_together(network, samples, draws, size, direction, advance)
    if norms and draws.count == 1:
        found["grand"] = found["sqnorm"].sqrt()[:, None]
    elif norms:
        found |= _draw_by_draw(network, samples, draws, size, norms)
    return found


def _draws_together(
    network: Network,
    samples: Samples,
    draws: Draws,
    size: BatchSize,
    direction: Mapping[str, Tensor],
    advance: Advance | None,
) -> dict[str, Tensor]:
    def work(batch: Samples, real: int) -> dict[str, Tensor]:
        if not real:
            return _nothing(batch, draws, "loss", "el2n") | _nothing(batch, None, "dot", "sqnorm")
        with per_sample_gradients(network.model, direction=direction, rows_per_sample=draws.count) as grads:
            losses, errors = draw_losses(network.eager(), batch, draws)
            losses.mean(dim=1).sum().backward()
        found = {"loss": losses.detach(), "el2n": errors, "dot": grads.dot, "sqnorm": grads.sqnorm}
        return {name: value[:real].double() for name, value in found.items()}

    return in_batches(samples, draws.count, size, work, advance)


def _draw_by_draw(
    network: Network, samples: Samples, draws: Draws, size: BatchSize, norms: bool, advance: Advance | None = None
) -> dict[str, Tensor]:
    names = ("loss", "el2n", "grand") if norms else ("loss", "el2n")

    def work(batch: Samples, real: int) -> dict[str, Tensor]:
        if not real:
            return _nothing(batch, draws, *names)
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        at_once = min(draws.count, size.rows)
        for first in range(0, draws.count, at_once):
            which = range(first, min(first + at_once, draws.count))
            if norms:
                with per_sample_gradients(network.model) as grads:
                    losses, errors = draw_losses(network.eager(), batch, draws, which)
                    losses.sum().backward()
                parts["grand"].append(grads.sqnorm.sqrt().view(losses.shape))
            else:
                with torch.no_grad():
                    losses, errors = draw_losses(network, batch, draws, which)
            parts["loss"].append(losses.detach())
            parts["el2n"].append(errors)
        return {name: torch.cat(values, dim=1)[:real].double() for name, values in parts.items()}

    return in_batches(samples, min(draws.count, size.rows), size, work, advance)


def _nothing(samples: Samples, draws: Draws | None, *names: str) -> dict[str, Tensor]:
    shape = (0,) if draws is None else (0, draws.count)
    return {name: torch.zeros(shape, dtype=torch.float64, device=samples.hashes.device) for name in names}
