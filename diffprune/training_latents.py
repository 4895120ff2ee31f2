"""The latents that a DiT is trained on: in memory where that is little of it, else read from their files, row by row.

Both ways give the same latents under the same row numbers, so the same run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffprune.arrays import ArrayFolder, check_latent_shape, refuse_unfinite, sha256_rows
from diffprune.errors import InputError
from diffprune.live_latents import LiveLatents
from diffprune.memory import free_bytes
from diffprune.prefetch import Prefetch
from diffprune.progress import progress
from diffprune.rank_talk import environment_number
from diffprune.ranks import Ranks
from diffprune.row_files import RowFile
from diffprune.storage import RemotePath
from diffprune.storage.arrays import RemoteArray
from diffprune.tables import reading_pool

# Of the memory that is free: what all processes of a machine may hold. Reading from files costs little, once their
# pages are in the system's cache, and of that there is one for all of them; from an object store it costs more.
HELD_SHARE, HELD_SHARE_OF_REMOTE = 1 / 8, 1 / 2
_BLOCK_BYTES = 4 << 20  # when all rows are read
_READERS = 8  # threads for the rows of one batch


class TrainingLatents(NamedTuple):
    """Samples that can be trained on, in shard order, and row-aligned their latents, float16 [N, C, H, W]."""

    table: pa.Table
    """Base columns."""
    values: np.ndarray | StoredLatents
    twins: np.ndarray | StoredLatents | None
    """Of the mirrored images, if wanted."""


def training_latents(
    folder: ArrayFolder | LiveLatents,
    kept: str | os.PathLike | None,
    *,
    twins: bool,
    shape: Sequence[int],
    ranks: Ranks,
) -> TrainingLatents:
    """Find all latents of the samples that are ok, or of those of ``kept``, and hold them in memory if they are few.

    All processes do the same, but encode shares of ``LiveLatents``. Raises InputError for a key of ``kept`` that is not
    here or failed, a missing file, and latents that are not [C, H, W] of ``shape``.
    """
    if isinstance(folder, LiveLatents):
        table, values, mirrored = folder.load(kept, twins=twins, ranks=ranks)
        for array in (values, mirrored):
            if array is not None and len(array):
                check_latent_shape(folder.folder, array.shape[1:], shape)
        return TrainingLatents(table, values, mirrored)
    table, use = folder.used(kept)
    stored = [StoredLatents(folder, table, use, shape, twins=which) for which in ([False, True] if twins else [False])]
    share = HELD_SHARE_OF_REMOTE if isinstance(folder.folder, RemotePath) else HELD_SHARE
    room = free_bytes() * share / environment_number("LOCAL_WORLD_SIZE", 1)
    if all(ranks.gathered_objects(sum(rows.nbytes for rows in stored) <= room)):
        stored = [rows.held() for rows in stored]
    return TrainingLatents(table.filter(use), stored[0], stored[1] if twins else None)


class StoredLatents:
    """Rows in the files of a latents folder, float16 [N, ...], read when they are asked for.

    What of them is in memory is in the system's cache of files, which all processes of a machine share. No file stays
    open. InputError that names the file where one is gone, or is not the one that it was.
    """

    def __init__(
        self, folder: ArrayFolder, table: pa.Table, use: pa.ChunkedArray, shape: Sequence[int], *, twins: bool = False
    ) -> None:
        self._folder, self._table, self._use = folder, table, use
        read = folder.twins if twins else folder.array
        with reading_pool(folder.folder) as pool:
            self._files: list[RowFile | RemoteArray] = list(
                pool.map(lambda stem: read(stem, by_rows=True), folder.stems)
            )
        for stem, file in zip(folder.stems, self._files, strict=True):
            check_latent_shape(f"{folder.folder}/{stem}{': mirrored' if twins else ''}", file.shape[1:], shape)
        ends = np.cumsum([0, *map(len, self._files)])
        used = np.flatnonzero(use.to_numpy())
        self._starts = np.searchsorted(used, ends)  # of each file the first of its rows here
        self._places = used - np.repeat(ends[:-1], np.diff(self._starts))  # of each row, in its file
        self.shape, self.dtype = (len(used), *shape), np.dtype(np.float16)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="latents")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by number [n], in any order: several files are read at a time."""
        wanted = rows.numpy()
        order = np.argsort(wanted, kind="stable")
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype)

        def read(places: np.ndarray) -> None:
            found[places] = self._read(wanted[places])

        list(self._pool.map(read, np.array_split(order, min(_READERS, max(1, len(order))))))
        return torch.from_numpy(found)

    def held(self) -> np.ndarray:
        """All rows in memory; InputError as for ``blocks``."""
        held, end = np.empty(self.shape, self.dtype), 0
        for block in self.blocks():
            held[end : end + len(block)] = block
            end += len(block)
        return held

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, some at a time, the next ones read meanwhile; at last InputError if one isn't finite."""
        size = max(1, _BLOCK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        finite = np.ones(len(self), bool)

        def read(_: str) -> Iterator[np.ndarray]:
            for start in range(0, len(self), size):
                yield self._read(np.arange(start, min(start + size, len(self))))

        with Prefetch(read, ["rows"]) as ahead, progress("read latents", total=len(self), unit="images") as bar:
            end = 0
            for block in ahead.parts("rows"):
                finite[end : end + len(block)] = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
                end += len(block)
                yield block
                bar.advance(len(block))
        refuse_unfinite(self._folder.folder, finite, self._table.filter(self._use))

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, ascending."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner):
            own = slice(*np.searchsorted(owner, [number, number + 1]))
            file, places = self._files[number], self._places[rows[own]]
            found[own] = file.take(places) if isinstance(file, RowFile) else file[places]
        return found


def sha256_of_training(
    keys: Sequence[str], values: np.ndarray | StoredLatents, *more: np.ndarray | StoredLatents, ranks: Ranks
) -> str:
    """``sha256_rows``, the same in all processes of the run; InputError where they do not see the same data.

    What lies in files is read by one process of each machine. Where another one sees a file that was changed
    meanwhile, so does that one, when it comes to read rows of it.
    """
    answer: str | InputError | None = None
    if isinstance(values, np.ndarray) or 0 in (ranks.rank, environment_number("LOCAL_RANK", 0)):
        try:
            answer = sha256_rows(keys, values, *more)
        except InputError as error:  # the others wait for an answer
            answer = error
    answers = [answer for answer in ranks.gathered_objects(answer) if answer is not None]
    for answer in answers:
        if isinstance(answer, InputError):
            raise answer
    if len(set(answers)) != 1:
        raise InputError(
            f"the processes of this run see {len(set(answers))} different sets of latents; give all machines the same "
            "latents folder, and change nothing in it meanwhile"
        )
    return answers[0]
