"""Columns of other programs' parquet files, such as img2dataset's width, joined to score tables by key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set

import pyarrow as pa
import pyarrow.compute as pc

from diffprune.clip_retrieval import is_clip_retrieval
from diffprune.errors import InputError
from diffprune.storage import AnyPath, as_path
from diffprune.tables import BASE_COLUMNS, STAGE_FILE, column_names, read_table, reading_pool
from diffprune.unique_keys import repeated_key


def has_extra_columns(path: str | os.PathLike) -> bool:
    """Whether this is a parquet file, or a folder of them that no stage wrote, such as img2dataset's."""
    path = as_path(path)
    if path.suffix == ".parquet":
        return path.is_file()
    if not path.is_dir() or (path / STAGE_FILE).is_file() or is_clip_retrieval(path):
        return False
    return bool(_files(path))


def add_columns(table: pa.Table, paths: Sequence[str | os.PathLike], names: Set[str]) -> tuple[pa.Table, list[str]]:
    """The table with those of the columns ``names`` that are in the files, and what identifies these columns.

    The files' column ``key`` holds sample keys; rows of other samples don't matter. Raises InputError for a file
    without that column, a key that stands twice, a column that the table has already, a path that has none of these
    columns, and samples, but failed ones, of which there is no row.
    """
    digests = []
    for path in map(as_path, paths):
        found = _read(path, names - frozenset(BASE_COLUMNS))
        rows = pc.index_in(table["key"], value_set=found["key"].combine_chunks())
        lost = table["key"].filter(pc.and_(pc.is_null(rows), pc.equal(table["status"], "ok")))
        if len(lost):
            raise InputError(
                f"{path}: no row for {len(lost)} of {table.num_rows} samples, key {lost[0].as_py()!r} first"
            )
        digest = hashlib.sha256()
        for name in found.column_names[1:]:
            if name in table.column_names:
                raise InputError(f"{path}: column {name!r} is in the score tables too; give only one of the two")
            column = found[name].take(rows).combine_chunks()
            table = table.append_column(name, column)
            digest.update(name.encode())
            for batch in pa.table({name: column}).to_batches():
                digest.update(batch.serialize())
        digests.append(digest.hexdigest())
    return table, digests


def _files(path: AnyPath) -> list[AnyPath]:
    return sorted(path.glob("[!.]*.parquet")) if path.is_dir() else [path]


def _read(path: AnyPath, names: Set[str]) -> pa.Table:
    """Keys, and those of the columns that are there."""
    files = _files(path)
    there = column_names(files[0])
    wanted = [name for name in there if name in names]
    if "key" not in there:
        raise InputError(f"{files[0]}: expected a column key, of sample keys, found {', '.join(there)}")
    if not wanted:
        asked = ", ".join(sorted(names)) or "none"
        raise InputError(f"{path}: expected a column that is asked for ({asked}), found {', '.join(there)}")
    with reading_pool(path) as pool:
        tables = list(pool.map(lambda file: read_table(file, ["key", *wanted], threads=False, foreign=True), files))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{path}: its files have different columns ({error})") from error
    if not pa.types.is_large_string(table.schema.field("key").type):
        raise InputError(f"{path}: key: expected strings, found {table.schema.field('key').type}")
    if (twice := repeated_key(table["key"])) is not None:
        raise InputError(f"{path}: key {twice!r} stands in it twice")
    return table
