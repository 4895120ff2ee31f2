"""Latents and embeddings on disk: per shard one fp16 ``.npy``, memory-mapped, row-aligned with a table of keys."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.row_files import RowFile
from diffprune.storage import AnyPath, RemotePath, as_path
from diffprune.tables import (
    METADATA_KEY,
    check_finished,
    input_of,
    kept_keys,
    read_folder,
    read_stage,
    read_table,
    reading_pool,
    table_metadata,
)

TWIN_SUFFIX = ".flip.npy"


def write_array(path: str | os.PathLike, array: np.ndarray) -> str:
    """Write a float16 ``.npy`` atomically; returns its ``array_digest``."""
    array = np.ascontiguousarray(array, np.float16)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # As np.save does, whose errors say neither that a disk is full nor which file it was.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data.cast("B") if array.size else b"")
    return array_digest(array)


def array_digest(array: np.ndarray) -> str:
    """32 hex digits that identify a float16 array's shape and values."""
    found = hashlib.sha256(str(array.shape).encode())
    found.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return found.hexdigest()[:32]


class ArrayFolder:
    """A folder that ``encode`` (latents) or ``embed`` (embeddings) wrote, or embeddings that clip-retrieval wrote.

    ``metadata`` says what the rows are: ``kind`` ("latents" or "embeddings"), ``shape`` of a row, ``model`` and
    ``model_sha256`` that made them, ``latent_scale`` for latents. Rows of failed samples are NaN.
    """

    def __new__(cls, folder: str | os.PathLike, kind: str | None = None) -> ArrayFolder:
        from diffprune.clip_retrieval import ClipRetrievalFolder, is_clip_retrieval

        return super().__new__(ClipRetrievalFolder if is_clip_retrieval(folder) else cls)

    def __getnewargs__(self) -> tuple[AnyPath]:  # for pickle: what ``__new__`` asks for
        return (self.folder,)

    def __init__(self, folder: str | os.PathLike, kind: str | None = None) -> None:
        self.folder = as_path(folder)
        stage = read_stage(self.folder)
        self.metadata: dict[str, Any] = {**stage.get("config", {}), **stage.get("metadata", {})}
        if "fingerprint" not in stage:
            raise InputError(f"{self.folder}: its stage.json has no fingerprint; make the folder again")
        self.fingerprint: str = stage["fingerprint"]
        self.stems: list[str] = stage["shards"]
        self._identities: dict[str, dict[str, Any]] = {}  # and rows: of the tables that were read, as each is a request
        self._rows: dict[str, int] = {}
        self._verified: set[str] = set()
        self._check_kind(kind, self.metadata.get("kind") or stage.get("stage"))

    def table(self, stem: str) -> pa.Table:
        """The base columns of one shard's samples."""
        return self._read(stem)

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """These columns of each shard, in order; several are read at a time."""
        with reading_pool(self.folder) as pool:
            yield from pool.map(lambda stem: self._read(stem, columns), self.stems)

    def keys(self, stem: str) -> pa.Table:
        """The columns key and status of one shard; InputError if its table was copied in from another run."""
        table = self._read(stem, ["key", "status"])
        found = table_metadata(table).get("fingerprint")
        if found != self.fingerprint:
            raise InputError(
                f"{self.folder / f'{stem}.parquet'}: made by another run than {self.folder} (fingerprint {found}, "
                f"expected {self.fingerprint}), maybe by another model; embed its shard again"
            )
        return table

    def _read(self, stem: str, columns: list[str] | None = None) -> pa.Table:
        table = read_table(self.folder / f"{stem}.parquet", columns)
        self._note(stem, table)
        return table

    def _note(self, stem: str, table: pa.Table) -> None:
        self._rows[stem] = table.num_rows
        if METADATA_KEY in (table.schema.metadata or {}):
            self._identities[stem] = input_of(table_metadata(table))

    def check_finished(self) -> None:
        """InputError where a shard is not done."""
        check_finished(self.folder, self.stems)

    def identity(self, stem: str) -> dict[str, Any]:
        """What tells one shard's rows from others, of the images and of the array, as far as its table says so."""
        if stem not in self._identities:
            self._identities[stem] = input_of(table_metadata(self.folder / f"{stem}.parquet"))
        return self._identities[stem]

    def identities(self) -> dict[str, dict[str, Any]]:
        """The same of all shards, some read at a time; InputError where one is not done."""
        if not self._identities.keys() >= set(self.stems):
            self.check_finished()
        with reading_pool(self.folder) as pool:
            return dict(zip(self.stems, pool.map(self.identity, self.stems), strict=True))

    def array(self, stem: str, *, by_rows: bool = False) -> np.ndarray:
        """float16 [n, ...], memory-mapped, row-aligned with ``table(stem)``.

        The first time it is read whole, and InputError raised if its values are not those that its table knows by their
        digest: a damaged disk, or another run's file. ``by_rows``: give a ``RowFile``, or of a URL a
        ``storage.arrays.RemoteArray``: only the rows asked for are read, unchecked, and no file stays open.
        """
        array = self._checked(path := self.folder / f"{stem}.npy", stem, by_rows)
        if not by_rows and stem not in self._verified:
            digest = self.identity(stem).get("array")
            if digest not in (None, array_digest(array)):
                raise InputError(
                    f"{path}: not the values that {stem}.parquet was written with; it was damaged or replaced: "
                    f"delete {stem}.* and make it again"
                )
            self._verified.add(stem)
        return array

    def _checked(self, path: AnyPath, stem: str, by_rows: bool = False) -> np.ndarray:
        array = load_array(path, f"delete {stem}.* and make it again", by_rows)
        if stem not in self._rows:
            self._read(stem, ["status"])
        rows = self._rows[stem]
        if array.dtype != np.float16 or len(array) != rows:
            raise InputError(f"{path}: expected float16 with {rows} rows, found {array.dtype} {array.shape}")
        return array

    def twins(self, stem: str, *, by_rows: bool = False) -> np.ndarray:
        """As ``array``, of the mirrored images; InputError where `encode` did not write them."""
        path = self.folder / f"{stem}{TWIN_SUFFIX}"
        if not path.is_file():
            raise InputError(f"{path}: no such file; make the latents with `diffprune encode --flip-twins`")
        return self._checked(path, stem, by_rows)

    def load(self, kept: str | os.PathLike | None = None, dtype: type = np.float32) -> tuple[pa.Table, np.ndarray]:
        """All rows that are ok, in memory: (table, ``dtype`` [N, ...]), row-aligned, in shard order.

        ``kept`` (a kept.parquet) restricts them to its keys; raises InputError if one of them is not here or failed,
        or if a value is not finite.
        """
        table, use = self.used(kept)
        return table.filter(use), self._gathered(self.array, table, use, dtype)

    def load_twins(self, kept: str | os.PathLike | None = None, dtype: type = np.float32) -> np.ndarray:
        """The mirrored images' rows, aligned with those of ``load``."""
        return self._gathered(self.twins, *self.used(kept), dtype)

    def used(self, kept: str | os.PathLike | None = None) -> tuple[pa.Table, pa.ChunkedArray]:
        """The whole table, and which of its rows ``load`` gives."""
        table = self.whole_table()
        use = pc.equal(table["status"], "ok")
        if kept is not None:
            kept = as_path(kept)
            wanted = kept_keys(kept)
            use = pc.and_(use, pc.is_in(table["key"], value_set=pa.array(sorted(wanted), pa.string())))
            found = pc.sum(use).as_py() or 0
            if found != len(wanted):
                missing = min(wanted.difference(table["key"].filter(use).to_pylist()))
                raise InputError(
                    f"{kept}: {len(wanted) - found} of {len(wanted)} keys, {missing!r} first, are not in {self.folder} "
                    f"or failed there; is this a selection of another data set?"
                )
        return table, use

    def _gathered(
        self, read: Callable[[str], np.ndarray], table: pa.Table, use: pa.ChunkedArray, dtype: type
    ) -> np.ndarray:
        mask = use.to_numpy()
        values, start, end = np.zeros((0, *self.metadata["shape"]), dtype), 0, 0
        finite = np.ones(int(mask.sum()), bool)
        for stem in self.stems:
            array = read(stem)
            part = array[mask[start : start + len(array)]]
            if not end:  # filled shard by shard: joined afterwards, all would be there twice
                values = np.empty((len(finite), *array.shape[1:]), dtype)
            rows = slice(end, end + len(part))
            values[rows] = part
            finite[rows] = np.isfinite(part.reshape(len(part), math.prod(part.shape[1:]))).all(axis=1)
            start, end = start + len(array), rows.stop
        refuse_unfinite(self.folder, finite, table.filter(use))
        return values

    def whole_table(self) -> pa.Table:
        """The base columns of all shards, in shard order; InputError for a key that stands twice."""
        return read_folder(self.folder, seen=self._note)

    def _check_kind(self, kind: str | None, found: str | None) -> None:
        if kind is not None and found != kind:
            raise InputError(f"{self.folder}: expected {kind}, found {found}")


def load_array(path: AnyPath, remedy: str, by_rows: bool = False) -> np.ndarray:
    """A memory-mapped ``.npy``; InputError that names it and says the remedy if it cannot be read. No pickles.

    Of a URL a local copy is mapped, or, if there is no room for copies, it is read into memory. ``by_rows``: see
    ``ArrayFolder.array``.
    """
    try:
        if isinstance(path, RemotePath):
            from diffprune.storage.arrays import RemoteArray

            return RemoteArray(path) if by_rows else RemoteArray(path, copy=True).whole()
        # `open_memmap`, not `np.load`, which opens zip files as well
        return RowFile(path) if by_rows else np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError) as error:  # the last of a length below zero
        raise InputError(f"{path}: not a readable .npy file ({error}); {remedy}") from error


def refuse_unfinite(folder: AnyPath, finite: np.ndarray, table: pa.Table) -> None:
    """InputError that names the first sample of ``table`` [N] that ``finite`` [N] is not true of, if there is one."""
    if not finite.all():
        key = table["key"][int(np.flatnonzero(~finite)[0])].as_py()
        raise InputError(
            f"{folder}: {int((~finite).sum())} rows are NaN or infinite, key {key!r} first; make them again"
        )


def sha256_rows(keys: Sequence[str], *arrays: Any) -> str:
    """Of the keys in order and of the arrays' bytes; float16 ones as if they were float32.

    An array may be one that is not in memory, and gives its ``blocks()`` of rows, as ``StoredLatents``.
    """
    digest = hashlib.sha256("\0".join(keys).encode())
    for array in arrays:
        dtype = np.dtype(np.float32) if array.dtype == np.float16 else array.dtype
        digest.update(str((array.shape, dtype.str)).encode())
        is_held = isinstance(array, np.ndarray)
        for block in (array[i : i + 4096] for i in range(0, len(array), 4096)) if is_held else array.blocks():
            digest.update(np.ascontiguousarray(block, dtype).data)
    return digest.hexdigest()


def what_made(latents: Any, shape: Sequence[int]) -> dict[str, Any]:
    """What tells the autoencoder of latents from others: its model_sha256 and latent_scale.

    ``latents``: an ``ArrayFolder`` or ``LiveLatents``. Raises InputError where one of these is not known, or a DiT of
    latents [C, H, W] of this ``shape`` does not fit.
    """
    names = ("model_sha256", "latent_scale")
    for name in names:
        if name not in latents.metadata:
            raise InputError(f"{latents.folder}: its metadata lacks {name}; make the latents again with `encode`")
    check_latent_shape(latents.folder, latents.metadata.get("shape", shape), shape)
    return {name: latents.metadata[name] for name in names}


def check_latent_shape(where: AnyPath | str, found: Sequence[int], expected: Sequence[int]) -> None:
    if list(found) != list(expected):
        raise InputError(
            f"{where}: expected latents {list(expected)} (model.in_channels, input_size, input_size), found "
            f"{list(found)}"
        )
