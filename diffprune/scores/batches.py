"""Samples in batches of one fixed shape, and a surrogate's loss on their draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffprune.draws import KeyHashes, draw_pair
from diffprune.flow import interpolate, velocity_error_norm, velocity_loss, velocity_target


@dataclass(frozen=True)
class Samples:
    """Samples on one device: hashes of their keys [n] int64 (`draws.hash_keys`), latents [n, C, H, W] float32 and
    labels [n] int64, or None for an unconditional surrogate."""

    hashes: KeyHashes
    latents: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: Tensor) -> Samples:
        """The samples at these indices."""
        labels = None if self.labels is None else self.labels[rows]
        return Samples(self.hashes[rows], self.latents[rows], labels)


@dataclass(frozen=True)
class Draws:
    """The draws that a score averages over: `count` of them, t stratified."""

    seed: int
    count: int


Advance = Callable[[int], None]  # told how many more samples are done


def padded_batches(samples: Samples, size: int, advance: Advance | None = None) -> Iterator[tuple[Samples, int]]:
    """Batches of one size, `size` rounded up to a multiple of 8, each with how many of its rows are real.

    The last one is filled up with its last row; what is computed for the filling is to be dropped. So matrix products
    see the same shapes with no ragged edge, and a row's numbers do not depend on which rows are beside it.
    """
    size = -(-size // 8) * 8
    for start in range(0, len(samples), size):
        rows = torch.arange(start, start + size, device=samples.hashes.device)
        real = min(size, len(samples) - start)
        yield samples.take(rows.clamp(max=len(samples) - 1)), real
        if advance is not None:
            advance(real)


def draw_losses(
    model: nn.Module, samples: Samples, draws: Draws, which: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The flow matching loss ℓ of each sample at some of its draws (all by default), and ‖v - target‖₂.

    Returns: two [B, len(which)] float32. The model sees the draws of one sample in successive rows.
    """
    times, noises = [], []
    for draw in range(draws.count) if which is None else which:
        t, noise = draw_pair(draws.seed, samples.hashes, draw, draws.count, samples.latents.shape[1:])
        times.append(t)
        noises.append(noise)
    t, x0 = torch.stack(times, dim=1).flatten(), torch.stack(noises, dim=1).flatten(0, 1)
    x1 = samples.latents.repeat_interleave(len(times), dim=0)
    labels = None if samples.labels is None else samples.labels.repeat_interleave(len(times))
    velocity, target = model(interpolate(x1, x0, t), t, labels), velocity_target(x1, x0)
    shape = (len(samples), len(times))
    return velocity_loss(velocity, target).view(shape), velocity_error_norm(velocity.detach(), target).view(shape)
