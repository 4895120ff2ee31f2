"""MoSo's first pass: a gradient sum per shard, folded in shard order into the mean gradient."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.tensor_files import load_tensors, save_tensors

COMMIT_EVERY = 20  # times as long as a commit takes: at most 5% of the time goes into them
MOST_PARTS = 8  # sums of other processes that wait on disk for a commit


@dataclass
class GradientSum:
    """Σ g over some samples: by parameter name, float64, on the device that made them."""

    sums: dict[str, Tensor]
    samples: int  # in it
    population: int  # of how many the samples were taken, or all those in it

    def add_(self, other: GradientSum) -> None:
        """Add the other in place, on its device: for an XL/2 there are 5 GB to read, write and add for each shard."""
        if self.sums.keys() != other.sums.keys():
            raise InputError("gradient sums of different models")
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name].to(value.device).add_(value)
        self.samples += other.samples
        self.population += other.population


@dataclass(frozen=True)
class Mean:
    """A mean gradient as it is used."""

    gradient: dict[str, Tensor]  # by parameter name, float32
    sqnorm: float  # of all of it, in float64
    samples: int
    population: int


class MeanGradient:
    """The mean gradient over all shards at one checkpoint, as files beside `path` until nothing needs it any more.

        <path>.sum   the sum over the first shards, and over how many of them
        <path>.part/<shard>   a sum that came before its turn, by `put`
        <path>.mean  the end

    Sums are added in shard order, so the mean does not depend on who made them, or when. Two sums' worth of disk is
    taken, however many shards there are, and one more for each that waits for its turn.
    """

    def __init__(self, path: Path, shards: Sequence[str]) -> None:
        self.shards = list(shards)
        self._sum, self._mean, self._parts = (path.with_name(path.name + end) for end in (".sum", ".mean", ".part"))

    def missing(self) -> list[str]:
        """The shards whose sums `make` would ask for."""
        if self._mean.is_file():
            return []
        start = int(load_tensors(self._sum, only_metadata=True)[1]["shards"]) if self._sum.is_file() else 0
        return [shard for shard in self.shards[start:] if not self.has_part(shard)]

    def make(
        self,
        shard_sum: Callable[[str], GradientSum],
        *,
        talk: RankTalk = ALONE,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the mean from ``shard_sum(shard)``, which is not asked again for what is there already.

        With several processes, each is asked for the shards of its turn, and the first adds up what the others send:
        it needs to know what the tensors are ``like``. Raises: InputError for fewer than 2 samples with a finite
        gradient.
        """
        if talk.first([self._mean.is_file()])[0]:
            return
        total, start = _load(self._sum) if self._sum.is_file() and not talk.rank else (None, 0)
        [start] = talk.first([start])
        committed, took, parts = time.monotonic(), 0.0, 0
        for number, shard in enumerate(self.shards[start:], start=start):
            owner = number % talk.size
            if owner == talk.rank:
                one = self.part(shard) if self.has_part(shard) else shard_sum(shard)
                parts += self.has_part(shard)
                if talk.rank:
                    _send(one, talk)
            elif not talk.rank:
                one = _receive(like or {}, owner, talk)
            if talk.rank:
                continue
            if total is None:
                total = one
            else:
                total.add_(one)
            one = None  # on a GPU there is room for the sum and one shard's, not for three
            began = time.monotonic()
            if began - committed >= COMMIT_EVERY * took or parts >= MOST_PARTS:
                self._commit(total, number + 1)
                committed, parts = time.monotonic(), 0
                took = committed - began
        if not talk.rank:
            self._finish(total)
        talk.wait()

    def put(self, shard: str, one: GradientSum) -> None:
        """Leave the sum of a shard for `make` to take up in its turn, from whatever process."""
        _save(self._parts / shard, one, 1)

    def part(self, shard: str) -> GradientSum:
        """What was `put` for a shard."""
        return _load(self._parts / shard)[0]

    def has_part(self, shard: str) -> bool:
        return (self._parts / shard).is_file()

    def read(self, device: torch.device) -> Mean:
        """What `make` has made."""
        found = _load(self._mean)[0]
        gradient = {name: value.to(device, torch.float32) for name, value in found.sums.items()}
        sqnorm = sum(value.square().sum().item() for value in found.sums.values())
        return Mean(gradient, sqnorm, found.samples, found.population)

    def remove(self) -> None:
        for path in (self._sum, self._mean):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _finish(self, total: GradientSum | None) -> None:
        if total is None or total.samples < 2:
            found = 0 if total is None else total.samples
            raise InputError(f"moso: expected at least 2 samples with a finite gradient, found {found}")
        mean = {name: value.div_(total.samples) for name, value in total.sums.items()}
        _save(self._mean, GradientSum(mean, total.samples, total.population), len(self.shards))
        self._sum.unlink(missing_ok=True)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _commit(self, total: GradientSum, shards: int) -> None:
        _save(self._sum, total, shards)
        if self._parts.is_dir():
            for part in {entry.name for entry in self._parts.iterdir()}.intersection(self.shards[:shards]):
                (self._parts / part).unlink()


def _send(one: GradientSum, talk: RankTalk) -> None:
    talk.send(torch.tensor([one.samples, one.population]))
    for name in sorted(one.sums):
        talk.send(one.sums[name].cpu())


def _receive(like: Mapping[str, Tensor], rank: int, talk: RankTalk) -> GradientSum:
    samples, population = talk.receive(torch.zeros(2, dtype=torch.int64), rank).tolist()
    sums = {}
    for name in sorted(like):
        received = talk.receive(torch.empty(like[name].shape, dtype=torch.float64), rank)
        sums[name] = received.to(like[name].device)
    return GradientSum(sums, samples, population)


def _save(path: Path, total: GradientSum, shards: int) -> None:
    counts = {"samples": total.samples, "population": total.population, "shards": shards}
    save_tensors(path, total.sums, {name: str(count) for name, count in counts.items()})


def _load(path: Path) -> tuple[GradientSum, int]:
    tensors, counts = load_tensors(path)
    return GradientSum(tensors, int(counts["samples"]), int(counts["population"])), int(counts["shards"])
