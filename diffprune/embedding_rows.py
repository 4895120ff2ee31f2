"""Embeddings as k-means reads them: the rows of samples that are ok."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.embedding_folders import EmbeddingFolders
from diffprune.engines import Engine
from diffprune.errors import InputError
from diffprune.kmeans_points import Part
from diffprune.quantities import parse_bytes
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.unique_keys import told_twice


class EmbeddingRows:
    """The embeddings of one or several folders of the same model: the rows that are ok, in shard order, on disk.

    With several processes, ``talk``, each has the rows of its share of the shards: ``parts``, ``keys``, ``rows``.
    """

    def __init__(self, folders: str | os.PathLike | Sequence[str | os.PathLike], talk: RankTalk = ALONE) -> None:
        self.folders = EmbeddingFolders(folders)
        self.metadata, self.stems = self.folders.metadata, self.folders.stems
        self.fingerprint = self.folders.fingerprint
        self.folders.check_finished()
        self.parts: list[Part] = []
        self.spans: dict[str, tuple[int, np.ndarray, int]] = {}  # its first row here, which rows are ok, of how many
        self.rows, keys = 0, []
        for stem, table, array in self.folders.opened_each(Engine(ranks=talk).mine(self.stems)):
            ok = pc.equal(table["status"], "ok")
            rows = np.flatnonzero(ok.to_numpy())
            self.parts.append(Part(array, None if len(rows) == len(array) else rows))
            self.spans[stem] = (self.rows, rows, len(array))
            keys.append(table["key"].filter(ok))
            self.rows += len(rows)
        self.keys = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.large_string())
        if not self.parts and self.stems:  # more processes than shards: this one has none of their rows
            array = self.folders.array(self.stems[0], by_rows=True)
            self.parts.append(Part(array, np.zeros(0, dtype=np.int64)))
        self.dimensions = self.parts[0].array.shape[1] if self.parts else 0
        if talk.max(self.rows) == 0:
            raise InputError(f"{self.folders.folder}: no sample has an embedding")
        if twice := told_twice(self.keys, talk):
            raise InputError(f"{self.folders.folder}: {twice}; keys must be unique")

    @cached_property
    def identities(self) -> dict[str, dict[str, Any]]:
        """As ``ArrayFolder.identities``, of other processes' shards too."""
        return self.folders.identities()

    def memory(self, given: int | str | None) -> int | None:
        """Bytes of rows to hold at a time, as they were given; InputError for less than a row."""
        memory, array = parse_bytes(given), self.parts[0].array
        least = array.shape[1] * array.dtype.itemsize
        if memory is not None and memory < least:
            raise InputError(
                f"memory: expected at least the {least:,} bytes of an embedding, got {memory:,}; write 500MB or 2GiB"
            )
        return memory

    def table(self, stem: str) -> pa.Table:
        """The base columns of one shard's samples, failed ones too."""
        return self.folders.table(stem)

    def part(self, stem: str) -> tuple[Part, pa.ChunkedArray]:
        """The rows of one shard of this process, and their keys."""
        first, rows, total = self.spans[stem]
        part = Part(self.folders.array(stem, by_rows=True), None if len(rows) == total else rows)
        return part, self.keys.slice(first, len(rows))

    def column(self, stem: str, values: np.ndarray, dtype: pa.DataType) -> pa.Array:
        """The part of ``values`` [rows] that is of one shard, null for failed samples."""
        first, rows, _ = self.spans[stem]
        return self.shard_column(stem, values[first : first + len(rows)], dtype)

    def shard_column(self, stem: str, values: np.ndarray, dtype: pa.DataType) -> pa.Array:
        """The same of the values of that shard's rows alone."""
        _, rows, total = self.spans[stem]
        column, missing = np.zeros(total, values.dtype), np.ones(total, bool)
        column[rows], missing[rows] = values, False
        return pa.array(column.astype(dtype.to_pandas_dtype()), dtype, mask=missing)
