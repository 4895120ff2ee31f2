"""`random`: what every other score has to beat."""

from __future__ import annotations

from torch import Tensor

from diffprune.draws import Keys, uniform
from diffprune.scores import score_field

RANDOM = score_field("random", "uniform in [0, 1), from the key's hash and the seed")


def random_scores(keys: Keys, seed: int) -> Tensor:
    """[B] float64 in [0, 1)."""
    return uniform(seed, keys, "random")
