"""Embedding folders that clip-retrieval wrote, from img2dataset's shards or from folders of images.

    <folder>/img_emb/img_emb_0.npy            [n, D] float16 or float32
             metadata/metadata_0.parquet      n rows: image_path (of shards: the sample key), and key, uid, … where the
                                              images came with them

They are read as they are, wherever an embeddings folder is (``ArrayFolder``), or bound to the shards that they were
made of by ``diffprune embed --model clip-retrieval:FOLDER``. Which model made them is not in them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.arrays import ArrayFolder, array_digest, load_array, write_array
from diffprune.decode import read_all_annotations
from diffprune.engines import Engine, Made, run_stage
from diffprune.errors import InputError
from diffprune.failures import MAX_FAILURES
from diffprune.files import fingerprint, sha256_file
from diffprune.progress import Progress
from diffprune.shards import ShardIndex, ShardSpec, index_shards
from diffprune.storage import AnyPath, as_path
from diffprune.tables import BASE_COLUMNS, BASE_SCHEMA_IN_MEMORY, STAGE_FILE, base_table, column_names, read_table
from diffprune.unique_keys import repeated_key

MODEL = "clip-retrieval"
ROWS_AT_A_TIME = 65_536
# float16 rounding moves the length of a unit vector by less; embeddings that are not normalised are far off
UNIT_TOLERANCE = 2e-3
_STEM = re.compile(r"img_emb_(\d+)")


def is_clip_retrieval(folder: str | os.PathLike) -> bool:
    """Whether a folder has clip-retrieval's layout, and not one of diffprune's stages in it."""
    folder = as_path(folder)
    return (folder / "img_emb").is_dir() and not (folder / STAGE_FILE).is_file()


class ClipRetrievalFolder(ArrayFolder):
    """The same as any embeddings folder, without a failed row.

    Its tables have the key, the uid where there is one, and null for shard, offset, size and label. Rows are
    L2-normalised: arrays whose rows are not get divided by their lengths, in memory.
    """

    def __init__(self, folder: str | os.PathLike, kind: str | None = None) -> None:
        self.folder = as_path(folder)
        self._check_kind(kind, "embeddings")
        names = [path.stem for path in (self.folder / "img_emb").glob("*.npy")]
        self.stems = sorted((name for name in names if _STEM.fullmatch(name)), key=lambda name: (int(name[8:]), name))
        if not self.stems:
            raise InputError(f"{self.folder / 'img_emb'}: expected img_emb_0.npy, …, found no such file")
        first = self._stored(self.stems[0])
        width, self._dtype = first.shape[1], first.dtype
        self.metadata = {"kind": "embeddings", "model": MODEL, "model_sha256": None, "shape": [width]}
        self._unit: dict[str, bool] = {}
        self._unique = False
        for path in map(self._metadata_path, self.stems):
            if not path.is_file():
                raise InputError(f"{path}: no such file: it has the keys; copy clip-retrieval's whole output")

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of all its files."""
        return fingerprint(self._digests)

    @cached_property
    def _digests(self) -> dict[str, str]:
        paths = [path for stem in self.stems for path in (self._array_path(stem), self._metadata_path(stem))]
        return {path.name: sha256_file(path) for path in paths}

    def check_finished(self) -> None:
        pass  # nothing says what is still to come

    def identity(self, stem: str) -> dict[str, Any]:
        array, index = (self._digests[path.name] for path in (self._array_path(stem), self._metadata_path(stem)))
        return {"array": array, "index": index}

    def identities(self) -> dict[str, dict[str, Any]]:
        return {stem: self.identity(stem) for stem in self.stems}

    def table(self, stem: str) -> pa.Table:
        path = self._metadata_path(stem)
        names = column_names(path)
        source = "image_path" if "key" not in names and "image_path" in names else "key"
        found = read_table(path, [source, *(["uid"] if "uid" in names else [])], foreign=True)
        keys = self._strings(found[source], path, source)
        if keys.null_count:
            raise InputError(f"{path}: {source}: row {pc.index(pc.is_null(keys), True).as_py()} has no key")
        if source == "image_path":  # a sample key already, or a path: up to the first dot of its last part
            keys = pc.replace_substring_regex(keys, r"\.[^/]*$", "")
        columns = {field.name: pa.nulls(len(keys), field.type) for field in BASE_SCHEMA_IN_MEMORY}
        columns |= {"key": keys, "index": pa.array(np.arange(len(keys), dtype=np.int32))}
        columns["status"] = pa.array(["ok"] * len(keys), pa.large_string())
        if "uid" in found.column_names:
            uids = self._strings(found["uid"], path, "uid")
            columns["uid"] = pc.if_else(pc.match_substring_regex(uids, "^[0-9a-fA-F]{32}$"), uids, None)
        return pa.Table.from_arrays([columns[name] for name in BASE_COLUMNS], schema=BASE_SCHEMA_IN_MEMORY)

    def keys(self, stem: str) -> pa.Table:
        if not self._unique:
            self.whole_table()
        return self.table(stem).select(["key", "status"])

    def array(self, stem: str, *, by_rows: bool = False) -> np.ndarray:
        """[n, D] float16 or float32 of length 1, memory-mapped if they are so on disk, row-aligned with the table."""
        array, rows = self._stored(stem), self.table(stem).num_rows
        path = self._array_path(stem)
        if len(array) != rows:
            raise InputError(
                f"{path}: {len(array)} embeddings, but {self._metadata_path(stem).name} has {rows} rows; "
                f"one of them is cut short or of another run: copy both again"
            )
        if array.shape[1] != self.metadata["shape"][0]:
            raise InputError(
                f"{path}: embeddings of {array.shape[1]} dimensions, but {self.stems[0]}.npy has "
                f"{self.metadata['shape'][0]}: they are of two models"
            )
        if array.dtype != self._dtype:
            raise InputError(f"{path}: {array.dtype}, but {self.stems[0]}.npy has {self._dtype}: of two runs")
        if stem not in self._unit:
            self._unit[stem] = all(np.all(np.abs(lengths - 1) < UNIT_TOLERANCE) for lengths in _lengths(array))
        if self._unit[stem]:
            return array
        lengths = np.concatenate(list(_lengths(array)))
        zero = np.flatnonzero(lengths == 0)
        if len(zero):
            key = self.table(stem)["key"][int(zero[0])].as_py()
            raise InputError(f"{path}: {len(zero)} embeddings are all zero, key {key!r} first; make them again")
        with np.errstate(invalid="ignore"):  # inf / inf; ``load`` tells about NaN, by key
            return (array.astype(np.float32) / lengths[:, None]).astype(self._dtype)

    def whole_table(self) -> pa.Table:
        """As ``ArrayFolder.whole_table``."""
        table = pa.concat_tables([self.table(stem) for stem in self.stems])
        if (twice := repeated_key(table["key"])) is not None:
            raise InputError(f"{self.folder}: key {twice!r} stands in it twice; keys must be unique")
        self._unique = True
        return table

    @staticmethod
    def _strings(column: pa.ChunkedArray, path: AnyPath, name: str) -> pa.ChunkedArray:
        try:
            return column.cast(pa.large_string())
        except pa.ArrowException as error:
            raise InputError(f"{path}: {name}: expected strings, found {column.type}") from error

    def _stored(self, stem: str) -> np.ndarray:
        path = self._array_path(stem)
        array = load_array(path, "copy it again")
        if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
            raise InputError(f"{path}: expected [n, D] float16 or float32, found {list(array.shape)} {array.dtype}")
        return array

    def _array_path(self, stem: str) -> AnyPath:
        return self.folder / "img_emb" / f"{stem}.npy"

    def _metadata_path(self, stem: str) -> AnyPath:
        return self.folder / "metadata" / f"metadata_{stem.removeprefix('img_emb_')}.parquet"


def _lengths(array: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean lengths of rows, float32, some rows at a time."""
    for start in range(0, len(array), ROWS_AT_A_TIME):
        yield np.linalg.norm(array[start : start + ROWS_AT_A_TIME].astype(np.float32), axis=1)


def bind_embeddings(
    source: str | os.PathLike,
    shards: ShardSpec,
    out: str | os.PathLike,
    *,
    max_failures: int = MAX_FAILURES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write clip-retrieval's embeddings as an embeddings folder of ``shards``, joined by key.

    Then selections know where each sample lies. A sample of the shards without an embedding is a failed row, but, as
    embeddings may be of a part of the shards, none of the ``max_failures`` in a row that end the run; raises InputError
    if not one has an embedding. New shards may be added to ``out``, with embeddings that are new in ``source``;
    ResumeError where those of a shard that is done have changed.
    """
    if max_failures < 0:
        raise InputError(f"max_failures: expected 0 or more, got {max_failures}")
    folder = ClipRetrievalFolder(source)
    table = folder.whole_table()
    keys = table["key"].combine_chunks()
    arrays = [folder.array(stem) for stem in folder.stems]
    starts = np.cumsum([0, *(len(array) for array in arrays)])
    indexes = {index.path.stem: index for index in index_shards(shards)}
    rows = {stem: _rows_of(index, keys) for stem, index in indexes.items()}
    if not any((found >= 0).any() for found in rows.values()):
        example = next((index.samples[0].key for index in indexes.values() if len(index.samples)), None)
        raise InputError(
            f"{source}: none of its keys, such as {keys[0].as_py() if len(keys) else None!r}, is in the shards, where "
            f"they are such as {example!r}; were these embeddings made from other shards?"
        )

    def embeddings(stem: str) -> np.ndarray:
        """float16 [n, D] of a shard's samples, NaN where there is none."""
        found = np.full((len(rows[stem]), *folder.metadata["shape"]), np.nan, dtype=np.float16)
        owner = np.searchsorted(starts, rows[stem], side="right") - 1
        for part in np.unique(owner[owner >= 0]):
            places = np.flatnonzero(owner == part)
            found[places] = arrays[part][rows[stem][places] - starts[part]]
        return found

    def work(stem: str, bar: Progress) -> Made:
        index, array = indexes[stem], embeddings(stem)
        labels, uids, errors = read_all_annotations(index)
        finite = np.isfinite(array).all(axis=1)
        for place, row in enumerate(rows[stem].tolist()):
            if errors[place] is None and row < 0:
                errors[place] = f"no embedding of this key in {source}"
            elif errors[place] is None and not finite[place]:
                errors[place] = f"its embedding in {source} is NaN or infinite"
            if errors[place] is not None:
                array[place] = np.nan
        digest = write_array(as_path(out) / f"{stem}.npy", array)
        bar.advance(len(index.samples))
        table = base_table(index.path.name, index.samples, labels, uids, errors)
        return Made(table, (rows[stem] >= 0).tolist(), {"array": digest})

    total = sum(len(index.samples) for index in indexes.values())
    inputs = {stem: {**index.identity, "embeddings": array_digest(embeddings(stem))} for stem, index in indexes.items()}
    options: dict[str, Any] = {
        "beside": [".npy"],
        "metadata": {"model_path": str(source)},
        "engine": Engine(max_failures=max_failures),
    }
    stems = list(indexes)
    return run_stage("embed", out, folder.metadata, stems, work, total=total, inputs=inputs, **options, dry_run=dry_run)


def _rows_of(index: ShardIndex, keys: pa.Array) -> np.ndarray:
    """The row of each sample's key in ``keys``, -1 where it is not there."""
    wanted = pa.array(index.samples.keys, keys.type)
    return pc.fill_null(pc.index_in(wanted, value_set=keys), -1).to_numpy()
