"""Which samples a training step sees, and the random generator of each step: functions of (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def batch_rows(count: int, batch_size: int, seed: int, step: int, stream: str = "epoch") -> Tensor:
    """The rows of a step's batch, [batch_size] int64 below ``count``.

    Batches are consecutive pieces of an endless sequence, one random permutation of all rows after the other. So each
    epoch sees each row once, and a batch may span epochs: with fewer rows than ``batch_size`` rows repeat in it.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    parts = []
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        parts.append(_permutation(count, seed, stream, epoch)[positions[epochs == epoch] % count])
    return torch.cat(parts)


class BalancedOrder:
    """An order that sees every group (class or cluster) equally often, however small it is, or by weight.

    An epoch has about as many places as there are rows, the same number for each group, or with ``weights`` a number
    in proportion. A group fills its places with the next rows of its own endless sequence of permutations, so none of
    its rows is seen twice before all are seen once; the places of all groups are shuffled together.

    Args:
        groups: of each row, a value that stands for its group.
        weights: of each group, at least 0: its rows are seen that much more often than those of a group of weight 1,
            together. A group of weight 0 is never seen, any other at least once per epoch.
    """

    def __init__(self, groups: Sequence[int] | Tensor, seed: int, weights: Mapping[int, int] | None = None) -> None:
        values, group = torch.unique(torch.as_tensor(groups), return_inverse=True)
        self.rows = [torch.nonzero(group == number).flatten() for number in range(len(values))]
        self.places = [-(-len(group) // len(values))] * len(values)
        if weights is not None:
            each = [weights[value] for value in values.tolist()]
            self.places = [max(weight > 0, round(len(group) * weight / sum(each))) for weight in each]
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._new_epoch)

    def batch(self, batch_size: int, step: int) -> Tensor:
        """The rows of a step's batch, [batch_size] int64."""
        length = sum(self.places)
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // length
        first, last = int(epochs[0]), int(epochs[-1])
        return torch.cat([self._epoch(epoch)[positions[epochs == epoch] % length] for epoch in range(first, last + 1)])

    def _new_epoch(self, epoch: int) -> Tensor:
        parts = [
            rows[batch_rows(len(rows), places, self.seed, epoch, f"group {number}")]
            for number, (rows, places) in enumerate(zip(self.rows, self.places, strict=True))
            if places
        ]
        every = torch.cat(parts)
        return every[torch.randperm(len(every), generator=step_generator(self.seed, "balanced epoch", epoch))]


def step_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for one purpose (``stream``) and one step or epoch."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stream: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=step_generator(seed, stream, epoch))
