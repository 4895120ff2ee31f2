"""Where Lloyd's rounds are, in a file: a run that is killed goes on from there, to the same bytes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.rank_talk import ALONE, RankTalk

COMMIT_EVERY = 20  # times as long as a commit takes: at most 5% of the time goes into them


@dataclass(frozen=True)
class Round:
    """After some rounds: the centroids [K, D] that the last labels belong to, those of the next round, and how many
    labels each round changed."""

    last: Tensor
    following: Tensor
    moved: list[int]


class Rounds:
    """Keeps the latest round in a file, as often as that takes little time."""

    def __init__(self, path: Path, talk: RankTalk = ALONE) -> None:
        self.path, self.talk = path, talk
        self._committed, self._took = time.monotonic(), 0.0

    def is_there(self) -> bool:
        return self.talk.first([self.path.is_file()])[0]

    def load(self, device: torch.device) -> Round:
        """Raises InputError for a file that is damaged."""
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                return Round(
                    file.get_tensor("last"), file.get_tensor("following"), json.loads(file.metadata()["moved"])
                )
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: not a readable round ({error}); delete it and run again") from error

    def keep(self, last: Tensor, following: Tensor, moved: list[int]) -> None:
        """Maybe: the first process, if enough time has gone by."""
        began = time.monotonic()
        if self.talk.rank or began - self._committed < COMMIT_EVERY * self._took:
            return
        with atomic_path(self.path) as temporary:
            tensors = {"last": last.cpu().contiguous(), "following": following.cpu().contiguous()}
            save_file(tensors, temporary, metadata={"moved": json.dumps(moved)})
        self._committed = time.monotonic()
        self._took = self._committed - began
