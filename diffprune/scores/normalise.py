"""Scores whose draws are comparable: each draw's value over what is usual at its time t.

A surrogate's loss and gradient depend on t far more than on the sample, so that with few draws a score is mostly its
draws' times. Here a value is divided by the mean over all samples of the values whose t lies in the same stratum. The
means are made after all samples were visited, as sums per shard folded in shard order: unlike a running normaliser's,
they do not depend on which sample came first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffprune.scores.batches import Draws, Samples

LEAST_STRATA = 8


def strata(samples: Samples, draws: Draws) -> Tensor:
    """[n, J] int64: which of `strata_count` equal intervals of [0, 1) each draw's t lies in."""
    empty = torch.Size((0,))
    times = [draws.pair(samples.hashes, draw, empty)[0] for draw in range(draws.count)]
    count = strata_count(draws)
    return (torch.stack(times, dim=1).double() * count).long().clamp(max=count - 1)


def strata_count(draws: Draws) -> int:
    """A multiple of the strata that t is drawn from, at least 8."""
    drawn = draws.count // 2 if draws.antithetic else draws.count
    return drawn * math.ceil(LEAST_STRATA / drawn)


def stratum_sums(values: Tensor, where: Tensor, count: int) -> Tensor:
    """[2, count] float64 of one shard: the sum of values [n, J] in each stratum, and how many there are.

    A sample with a value that is not finite is left out.
    """
    good = values.isfinite().all(dim=1)
    one_hot = torch.nn.functional.one_hot(where[good], count).double()  # a matrix product: the same sum every time
    flat = one_hot.flatten(0, 1)
    return torch.stack([values[good].flatten() @ flat, flat.sum(dim=0)])


def normalised(values: Tensor, where: Tensor, sums: Tensor) -> Tensor:
    """[n, J]: each value over its stratum's mean, given the sums of all shards."""
    return values / (sums[0] / sums[1])[where]
