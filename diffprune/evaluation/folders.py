"""Embedding folders as the metrics read them: shard by shard, or the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune.arrays import ArrayFolder
from diffprune.errors import InputError

# of a folder's metadata: what it is, and which images they are
_NOT_THE_EMBEDDER = ("kind", "inputs", "embeddings", "model_path", "sampled")


class FeatureFolder:
    """The rows of an embeddings folder that are ok, as float32 on ``device``; iterating gives [n, D] per shard.

    ``rows``: their table, in shard order, which numbers them. ``embedder``: everything that made them but the images.
    ``failed`` counts the other rows. Nothing is held in memory but the table. A row that is not finite raises
    InputError with its key when it is read.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self.folder, self.device = Path(folder), device
        self.arrays = ArrayFolder(folder, "embeddings")
        self.metadata = self.arrays.metadata
        self.embedder = {key: value for key, value in self.metadata.items() if key not in _NOT_THE_EMBEDDER}
        shape = self.metadata.get("shape")
        if not isinstance(shape, list) or len(shape) != 1:
            raise InputError(f"{folder}: expected embeddings, one row of numbers per image, found shape {shape}")
        self.dimensions: int = shape[0]
        table = self.arrays.whole_table()
        self._ok = pc.equal(table["status"], "ok").to_numpy()
        self.rows: pa.Table = table.filter(pa.array(self._ok))
        self.failed = len(table) - len(self.rows)
        if not len(self.rows):
            raise InputError(f"{folder}: no image in it is ok; there is nothing to measure")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return self._read(np.ones(len(self), dtype=bool))

    def part(self, chosen: np.ndarray) -> FeaturePart:
        """Those of the rows where ``chosen`` [len(self)] bool, shard by shard."""
        return FeaturePart(self, chosen)

    def take(self, rows: Tensor) -> Tensor:
        """The rows of these numbers, ascending: [len(rows), D]."""
        chosen = np.zeros(len(self), dtype=bool)
        chosen[rows.numpy()] = True
        return torch.cat([torch.empty(0, self.dimensions, device=self.device), *self._read(chosen)])

    def _read(self, chosen: np.ndarray) -> Iterator[Tensor]:
        mask = np.zeros(len(self._ok), dtype=bool)
        mask[np.flatnonzero(self._ok)] = chosen
        start = 0
        for stem in self.arrays.stems:
            array = self.arrays.array(stem)
            own = mask[start : start + len(array)]
            values = torch.from_numpy(array[own].astype(np.float32))
            finite = values.isfinite().all(dim=1)
            if not finite.all():
                row = start + np.flatnonzero(own)[int(finite.int().argmin())]
                key = self.rows["key"][int(self._ok[:row].sum())].as_py()
                raise InputError(
                    f"{self.folder}: {int((~finite).sum())} rows of {stem} are NaN or infinite, key {key!r} first; "
                    f"make them again"
                )
            start += len(array)
            if len(values):
                yield values.to(self.device)


class FeaturePart:
    """Some rows of a ``FeatureFolder``, to be gone through any number of times."""

    def __init__(self, folder: FeatureFolder, chosen: np.ndarray) -> None:
        self._folder, self._chosen = folder, chosen

    def __iter__(self) -> Iterator[Tensor]:
        return self._folder._read(self._chosen)
