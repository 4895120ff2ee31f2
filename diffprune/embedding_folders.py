"""Embeddings of one or several folders, as one folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffprune.arrays import ArrayFolder
from diffprune.errors import InputError
from diffprune.tables import reading_pool
from diffprune.unique_keys import repeated_key


class EmbeddingFolders:
    """One or several folders that ``embed`` wrote, by the same model, with ``ArrayFolder``'s methods.

    Raises InputError for folders of different models, and for a shard that is in two of them.
    """

    def __init__(self, folders: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        paths = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        if not paths:
            raise InputError("expected at least one folder of embeddings, got none")
        self.opened = [ArrayFolder(path, kind="embeddings") for path in paths]
        self.folder = ", ".join(str(folder.folder) for folder in self.opened)  # for messages
        self.metadata: dict[str, Any] = self.opened[0].metadata
        for folder in self.opened:
            _same_model(self.opened[0], folder)
        self.of_stem = {stem: folder for folder in self.opened for stem in folder.stems}
        self.stems = [stem for folder in self.opened for stem in folder.stems]
        if len(self.of_stem) != len(self.stems):
            twice = next(stem for stem in self.stems if self.stems.count(stem) > 1)
            raise InputError(f"{self.folder}: shard {twice!r} is in two of the folders; names of shards must be unique")

    @property
    def fingerprint(self) -> str | list[str]:
        """Of one folder, or of each."""
        each = [folder.fingerprint for folder in self.opened]
        return each[0] if len(each) == 1 else each

    def check_finished(self) -> None:
        """InputError where a shard is not done."""
        for folder in self.opened:
            folder.check_finished()

    def identities(self) -> dict[str, dict[str, Any]]:
        """As ``ArrayFolder.identities``."""
        return {stem: about for folder in self.opened for stem, about in folder.identities().items()}

    def table(self, stem: str) -> pa.Table:
        """The base columns of one shard's samples, failed ones too."""
        return self.of_stem[stem].table(stem)

    def whole_table(self) -> pa.Table:
        """As ``ArrayFolder.whole_table``."""
        table = pa.concat_tables([folder.whole_table() for folder in self.opened])
        if len(self.opened) > 1 and (twice := repeated_key(table["key"])) is not None:
            raise InputError(f"{self.folder}: key {twice!r} stands in two of the folders; keys must be unique")
        return table

    def keys(self, stem: str) -> pa.Table:
        """As ``ArrayFolder.keys``."""
        return self.of_stem[stem].keys(stem)

    def opened_each(self, stems: Sequence[str]) -> Iterator[tuple[str, pa.Table, np.ndarray]]:
        """Of each of these shards, in order: its name, ``keys`` and ``array`` by rows; several are opened at a time."""

        def opened(stem: str) -> tuple[str, pa.Table, np.ndarray]:
            return stem, self.keys(stem), self.array(stem, by_rows=True)

        with reading_pool(self.opened[0].folder) as pool:
            yield from map(opened, stems[:1])  # alone, as clip-retrieval's folder looks at all keys before the first
            yield from pool.map(opened, stems[1:])

    def array(self, stem: str, *, by_rows: bool = False) -> np.ndarray:
        """As ``ArrayFolder.array``."""
        return self.of_stem[stem].array(stem, by_rows=by_rows)


def _same_model(first: ArrayFolder, other: ArrayFolder) -> None:
    for name in ("model", "model_sha256", "shape"):
        one, another = first.metadata.get(name), other.metadata.get(name)
        if one != another:
            raise InputError(
                f"{other.folder}: expected embeddings of the same model as {first.folder}, found {name} {another!r}, "
                f"not {one!r}; distances between them mean nothing"
            )
