"""MoSo's first pass on disk: a gradient sum per shard, folded in shard order into the mean gradient."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffprune.errors import InputError
from diffprune.files import atomic_path

GradientSum = tuple[dict[str, Tensor], int]  # float64 by parameter name, and the number of samples in it


class MeanGradients:
    """The mean gradient at each of a surrogate's checkpoints, kept in a folder until the scores are done.

    ``<folder>/<checkpoint>/<shard>.safetensors`` are sums; ``<folder>/<checkpoint>.safetensors`` is their mean, which
    takes their place. The sums are added in shard order, so the mean does not depend on who made them, or when.
    """

    def __init__(self, folder: Path, shards: Sequence[str]) -> None:
        self.folder, self.shards = folder, list(shards)
        self.read = lru_cache(maxsize=1)(self._read)

    def make(self, checkpoint: int, shard_sum: Callable[[str], GradientSum]) -> None:
        """Make the mean at one checkpoint from ``shard_sum(shard)``; what is there already is not made again.

        Raises: InputError for fewer than 2 samples with a finite gradient.
        """
        mean, sums = self._path(checkpoint), self.folder / str(checkpoint)
        if not mean.is_file():
            total: dict[str, Tensor] = {}
            count = 0
            for shard in self.shards:
                part = sums / f"{shard}.safetensors"
                if not part.is_file():
                    _save(part, *shard_sum(shard))
                gradients, samples = _load(part)
                count += samples
                total = {name: total[name] + value if total else value for name, value in gradients.items()}
            if count < 2:
                raise InputError(f"moso: expected at least 2 samples with a finite gradient, found {count}")
            _save(mean, {name: value / count for name, value in total.items()}, count)
        shutil.rmtree(sums, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, once nothing needs it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, checkpoint: int) -> tuple[dict[str, Tensor], int, float]:
        """(ḡ by parameter name, N, ‖ḡ‖²), float64 on the CPU."""
        gradients, count = _load(self._path(checkpoint))
        return gradients, count, sum(value.square().sum().item() for value in gradients.values())

    def _path(self, checkpoint: int) -> Path:
        return self.folder / f"{checkpoint}.safetensors"


def _save(path: Path, gradients: dict[str, Tensor], samples: int) -> None:
    tensors = {name: value.to(torch.float64).contiguous() for name, value in gradients.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"samples": str(samples)})


def _load(path: Path) -> GradientSum:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["samples"])  # noqa: SIM118
