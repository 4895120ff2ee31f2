"""Support sets: which samples MoSo's mean gradient is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffprune.draws import KeyHashes, uniform


@dataclass(frozen=True)
class Support:
    """`trials` disjoint sets of about equal size, as MoSo's paper splits its data set (arXiv 2310.14664): a sample is
    scored against the mean gradient of its own. (The paper trains a surrogate on each, too; here there is one for all.)
    Of each, a `fraction` makes the mean. Both are chosen by the key's hash and the seed, and so are the same in any
    order of samples and shards.
    """

    seed: int
    trials: int = 1
    fraction: float = 1.0

    def trial(self, hashes: KeyHashes) -> Tensor:
        """[B] int64: the set of each sample, 0 ... trials − 1."""
        if self.trials == 1:
            return torch.zeros_like(hashes)
        return (uniform(self.seed, hashes, "moso trial") * self.trials).long()

    def inside(self, hashes: KeyHashes) -> Tensor:
        """[B] bool: whether a sample is one of those that make its set's mean."""
        if self.fraction == 1:
            return torch.ones_like(hashes, dtype=torch.bool)
        return uniform(self.seed, hashes, "moso support") < self.fraction
