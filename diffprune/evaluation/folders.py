"""Embedding folders as the metrics read them: shard by shard, or the rows that are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune.embedding_folders import EmbeddingFolders
from diffprune.errors import InputError
from diffprune.storage import AnyPath

# of a folder's metadata: what it is, and which images they are
_NOT_THE_EMBEDDER = ("kind", "inputs", "embeddings", "model_path", "sampled")


class FeatureFolder:
    """The rows of embeddings that are ok, of a folder or more, float32 on ``device``; iterating gives [n, D] per shard.

    ``rows``: their table, in shard order, which numbers them. ``embedder``: everything that made them but the images.
    ``folder`` and ``name`` say where they are. ``failed`` counts the other rows. Nothing is held in memory but the
    table. A row that is not finite raises InputError with its key when it is read; folders that were not embedded
    alike raise one at once.
    """

    def __init__(self, folders: str | os.PathLike | Sequence[str | os.PathLike], device: torch.device) -> None:
        self.arrays, self.device = EmbeddingFolders(folders), device
        self.folder = self.arrays.folder
        self.name = ", ".join(folder.folder.name for folder in self.arrays.opened)
        self.metadata = self.arrays.metadata
        self.embedder = _embedder(self.metadata)
        for folder in self.arrays.opened[1:]:
            check_alike(self.arrays.opened[0].folder, self.embedder, folder.folder, _embedder(folder.metadata))
        precisions = dict.fromkeys(_embedder(folder.metadata).get("precision") for folder in self.arrays.opened)
        if len(precisions) > 1:
            self.embedder["precision"] = " and ".join(map(str, precisions))
        shape = self.metadata.get("shape")
        if not isinstance(shape, list) or len(shape) != 1:
            raise InputError(f"{self.folder}: expected embeddings, one row of numbers per image, found shape {shape}")
        self.dimensions: int = shape[0]
        table = self.arrays.whole_table()
        self._ok = pc.equal(table["status"], "ok").to_numpy()
        self.rows: pa.Table = table.filter(pa.array(self._ok))
        self.failed = len(table) - len(self.rows)
        if not len(self.rows):
            raise InputError(f"{self.folder}: no image in it is ok; there is nothing to measure")

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


def check_alike(one: AnyPath | str, embedder: dict[str, Any], another: AnyPath | str, other: dict[str, Any]) -> None:
    """InputError if two folders' embedders differ in the model, its weights, the image size or anything else but the
    precision."""
    for field in sorted((embedder.keys() | other.keys()) - {"precision"}):
        found = [told.get(field) for told in (embedder, other)]
        if found[0] != found[1]:
            raise InputError(
                f"{one} and {another}: embeddings of two kinds cannot be compared: {field} is {found[0]!r} and "
                f"{found[1]!r}; embed both with the same model and options"
            )


def _embedder(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in _NOT_THE_EMBEDDER}
