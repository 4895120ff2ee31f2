"""Where Lloyd's rounds are, in a file: a run that is killed goes on from there, to the same bytes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.tensor_files import load_tensors, save_tensors

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
        return bool(self.talk.first([self.path.is_file()])[0])

    def load(self, device: torch.device) -> Round:
        """Raises InputError for a file that is damaged."""
        try:
            found, about = load_tensors(self.path, device=str(device))
            return Round(found["last"], found["following"], json.loads(about["moved"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: not a readable round ({error}); delete it and run again") from error

    def keep(self, last: Tensor, following: Tensor, moved: list[int]) -> None:
        """Maybe: the first process, if enough time has gone by."""
        began = time.monotonic()
        if self.talk.rank or began - self._committed < COMMIT_EVERY * self._took:
            return
        tensors = {"last": last.cpu(), "following": following.cpu()}
        save_tensors(self.path, tensors, {"moved": json.dumps(moved)})
        self._committed = time.monotonic()
        self._took = self._committed - began
