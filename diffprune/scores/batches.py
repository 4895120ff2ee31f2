"""Samples in batches of one fixed shape, and a surrogate's loss on their draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffprune.draws import KeyHashes, draw_pair
from diffprune.errors import InputError
from diffprune.flow import interpolate, velocity_error_norm, velocity_loss, velocity_target
from diffprune.gaussian_diffusion import diffuse
from diffprune.memory import BatchSize, fitting


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
        """The samples at these indices, or where a mask is true."""
        labels = None if self.labels is None else self.labels[rows]
        return Samples(self.hashes[rows], self.latents[rows], labels)


@dataclass(frozen=True)
class Draws:
    """The draws that a score averages over: `count` of them, t stratified.

    With `antithetic`, draws 2p and 2p + 1 are a pair: one t, noise x0 and -x0, and t is stratified over the pairs.
    Each draw alone is still a fair one (t uniform in its stratum, x0 normal and independent of t), so a mean over draws
    stays unbiased, while the part of the score that is odd in the noise cancels within a pair.
    """

    seed: int
    count: int
    antithetic: bool = False

    def __post_init__(self) -> None:
        if self.antithetic and self.count % 2:
            raise InputError(f"draws: expected an even number for antithetic pairs, got {self.count}")

    def pair(self, hashes: KeyHashes, draw: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """(t [B], x0 [B, *shape]) of one draw of each key."""
        if not self.antithetic:
            return draw_pair(self.seed, hashes, draw, self.count, shape)
        t, x0 = draw_pair(self.seed, hashes, draw // 2, self.count // 2, shape)
        return t, -x0 if draw % 2 else x0


PREDICTS = ("velocity", "noise")


@dataclass(frozen=True)
class Network:
    """A surrogate and how it is run: `compiled` where no per-sample gradients are wanted, `bf16` under autocast.

    It `predicts` the velocity of the flow, or the noise of a Gaussian diffusion.
    """

    model: nn.Module
    compiled: Callable[..., Tensor] | None = None
    bf16: bool = False
    predicts: str = "velocity"

    def losses_and_norms(self, x1: Tensor, x0: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each row the loss ℓ, the mean of the squared error, with its graph, and the error's norm: [B] each."""
        if self.predicts == "noise":
            found, target = self._output(*diffuse(x1, x0, t), labels), x0
        else:
            found, target = self._output(interpolate(x1, x0, t), t, labels), velocity_target(x1, x0)
        return velocity_loss(found, target), velocity_error_norm(found.detach(), target)

    def _output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """[B, ...] in float32 or wider, as `x`."""
        # Per-sample gradients look at each layer, so they want the model as it was before it was compiled.
        run = self.model if self.compiled is None else self.compiled
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return run(x, t, labels).to(x.dtype)

    def eager(self) -> Network:
        return replace(self, compiled=None)


Advance = Callable[[int], None]  # told how many more samples are done


def in_batches(
    samples: Samples,
    draws_at_once: int,
    size: BatchSize,
    work: Callable[[Samples, int], dict[str, Tensor]],
    advance: Advance | None = None,
) -> dict[str, Tensor]:
    """`work(batch, real)` over all samples, its tensors joined along the first dimension.

    Batches have one size, so many samples that their draws are about `size.rows` rows, a multiple of 8. The last one is
    filled up with its last sample; `work` is told how many are real, and returns that many rows. So matrix products
    see the same shapes with no ragged edge, and a row's numbers do not depend on which rows are beside it.

    Where memory runs out, the size is halved, and the batch done again; OutOfMemory once it cannot be halved.
    """
    parts: list[dict[str, Tensor]] = []
    start = 0

    def piece(rows: int) -> tuple[dict[str, Tensor], int]:
        batch, real = _batch(samples, start, rows, draws_at_once)
        return work(batch, real), real

    while start < len(samples) or not parts:  # no samples: one batch of none, for names and dtypes
        part, real = fitting(
            piece,
            size,
            "use fewer --draws, a smaller surrogate, or another device",
            lambda rows: _at_once(rows, draws_at_once) * draws_at_once,
        )
        parts.append(part)
        start += real
        if advance is not None:
            advance(real)
        if not real:
            break
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _at_once(rows: int, draws_at_once: int) -> int:
    """Samples per batch."""
    step = 8 // math.gcd(8, draws_at_once)
    return -(-max(1, rows // draws_at_once) // step) * step


def _batch(samples: Samples, start: int, rows: int, draws_at_once: int) -> tuple[Samples, int]:
    count = _at_once(rows, draws_at_once)
    real = min(count, len(samples) - start)
    if not real:
        return samples, 0
    places = torch.arange(start, start + count, device=samples.hashes.device)
    return samples.take(places.clamp(max=len(samples) - 1)), real


def draw_losses(network: Network, samples: Samples, draws: Draws, which: range | None = None) -> tuple[Tensor, Tensor]:
    """The loss ℓ of each sample at some of its draws (all by default), and the norm of the error.

    Returns: two [B, len(which)] float32. The model sees the draws of one sample in successive rows.
    """
    which = range(draws.count) if which is None else which
    pairs = [draws.pair(samples.hashes, draw, samples.latents.shape[1:]) for draw in which]
    t = torch.stack([t for t, _ in pairs], dim=1).flatten()
    x0 = torch.stack([x0 for _, x0 in pairs], dim=1).flatten(0, 1)
    x1 = samples.latents.repeat_interleave(len(which), dim=0)
    labels = None if samples.labels is None else samples.labels.repeat_interleave(len(which))
    losses, norms = network.losses_and_norms(x1, x0, t, labels)
    return losses.view(len(samples), len(which)), norms.view(len(samples), len(which))
