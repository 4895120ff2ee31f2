"""Score tables: parquet, one row per sample (failed ones too), keyed by sample key.

A folder of tables holds one ``<shard stem>.parquet`` per shard and a ``stage.json`` that says which shards and which
run they belong to. Tables of different runs are joined by key, never by position.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffprune.errors import InputError
from diffprune.files import atomic_path, fingerprint, open_file, read_json
from diffprune.shards import Sample
from diffprune.storage import THREADS, AnyPath, as_path, existing, for_arrow
from diffprune.unique_keys import repeated_key

if TYPE_CHECKING:
    from diffprune.clip_retrieval import ClipRetrievalFolder

METADATA_KEY = b"diffprune"
STAGE_FILE = "stage.json"
Seen = Callable[[str, pa.Table], object]  # is told a shard's name and table
_ROWS_AT_ONCE = 1 << 20

BASE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # the tar's file name
        ("index", pa.int32()),
        ("offset", pa.int64()),  # bytes of the sample's whole tar members
        ("size", pa.int64()),
        ("uid", pa.string()),
        ("label", pa.int64()),
        ("status", pa.string()),  # "ok" or "failed"
        ("error", pa.string()),
    ]
)
BASE_COLUMNS = BASE_SCHEMA.names


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _text_as(text: pa.DataType, schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(text) if _is_text(field.type) else field for field in schema], schema.metadata)


# A ``string`` column, which files have, ends at 2 GiB: fewer than 100 million keys.
BASE_SCHEMA_IN_MEMORY = _text_as(pa.large_string(), BASE_SCHEMA)


def base_table(
    shard: str,
    samples: Sequence[Sample],
    labels: Sequence[int | None],
    uids: Sequence[str | None],
    errors: Sequence[str | None],
    notes: Sequence[str | None] | None = None,
) -> pa.Table:
    """The base columns of samples of one shard, in memory; a sample with an error is "failed".

    ``notes`` say what is wrong with samples that are "ok" all the same; they stand in the column ``error`` too.
    """
    samples = list(samples)  # a SampleList makes them anew each time
    columns = [
        [sample.key for sample in samples],
        [shard] * len(samples),
        [sample.index for sample in samples],
        [sample.offset for sample in samples],
        [sample.size for sample in samples],
        list(uids),
        list(labels),
        ["failed" if error else "ok" for error in errors],
        [error or note for error, note in zip(errors, notes or [None] * len(samples), strict=True)],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, BASE_SCHEMA_IN_MEMORY, strict=True)]
    return pa.Table.from_arrays(arrays, schema=BASE_SCHEMA_IN_MEMORY)


def write_table(path: str | os.PathLike, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a table atomically with ``metadata`` (JSON) in its schema; field metadata is kept."""
    encoded = json.dumps(metadata, sort_keys=True, allow_nan=False).encode()
    table = _in_file(table)
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: encoded}), for_arrow(temporary))


def _in_file(table: pa.Table) -> pa.Table:
    """Text as ``string``."""
    schema = _text_as(pa.string(), table.schema)
    try:
        return table.cast(schema)
    except pa.ArrowInvalid:  # over 2 GiB in one piece; a slice would keep its far offsets, so that rows are copied
        pieces = [table.slice(start, _ROWS_AT_ONCE) for start in range(0, table.num_rows, _ROWS_AT_ONCE)]
        return pa.concat_tables([piece.take(pa.array(range(len(piece)), pa.int64())).cast(schema) for piece in pieces])


def table_metadata(table: pa.Table | str | os.PathLike) -> dict[str, Any]:
    """The metadata that ``write_table`` stored; InputError if there is none."""
    if isinstance(table, pa.Table):
        return _metadata(table.schema, "table")
    return _metadata(_schema(table), table)


def _metadata(schema: pa.Schema, where: str | os.PathLike) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise InputError(f"{where}: not a table of diffprune's (its schema metadata has no 'diffprune')")
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its metadata is no JSON ({error}); make the table again") from error
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: expected metadata that is a JSON object, found a {type(metadata).__name__}")
    return metadata


def read_table(
    path: str | os.PathLike, columns: list[str] | None = None, *, threads: bool = True, foreign: bool = False
) -> pa.Table:
    """Read one parquet file; InputError that names it if it is missing, malformed or lacks a column.

    Text is ``large_string``. Base columns must be of their types, and keys not null, unless the file is ``foreign``.
    ``threads``: decode columns in parallel; where many small files are read at once, that costs more than it saves.
    """
    with _readable(path) as file:
        schema = file.schema_arrow
        missing = [name for name in columns or [] if name not in schema.names]
        if missing:
            raise InputError(f"{as_path(path)}: no column {missing[0]!r}; it has {', '.join(schema.names)}")
        _check_columns(path, schema, foreign)
        table = file.read(columns=columns, use_threads=threads)
        table = table.cast(_text_as(pa.large_string(), table.schema))
        if not foreign and "key" in table.column_names and table["key"].null_count:
            raise InputError(f"{as_path(path)}: key: {table['key'].null_count} rows have no key")
        return table


def _check_columns(path: str | os.PathLike, schema: pa.Schema, foreign: bool) -> None:
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise InputError(f"{as_path(path)}: column {twice[0]!r} stands in it twice")
    for field in () if foreign else BASE_SCHEMA:
        found = schema.field(field.name).type if field.name in schema.names else field.type
        fits = pa.types.is_integer if pa.types.is_integer(field.type) else _is_text
        if not (fits(found) or (pa.types.is_null(found) and field.name != "key")):
            what = "integers" if pa.types.is_integer(field.type) else "strings"
            raise InputError(f"{as_path(path)}: {field.name}: expected {what}, found {found}")


def column_names(path: str | os.PathLike) -> list[str]:
    """The columns of one parquet file, of diffprune's or not; InputError as ``read_table``."""
    return _schema(path).names


def read_folder(folder: str | os.PathLike, columns: list[str] | None = None, *, seen: Seen | None = None) -> pa.Table:
    """The tables of one folder, concatenated in shard order. All its shards must be finished.

    ``seen`` is told each shard's table, as what else is asked of it is another request.
    """
    table = _read_shards(as_path(folder), columns, seen)
    _check_unique(table, folder)
    return table


def read_each(folder: AnyPath, stems: Sequence[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables of these shards, in order; several are read at a time."""
    with reading_pool(folder) as pool:
        yield from pool.map(lambda stem: read_table(folder / f"{stem}.parquet", columns, threads=False), stems)


def input_changes(found: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of shards, name -> identity, in words; empty if they are the same."""
    lines = [f"{name} is new" for name in now if name not in found]
    lines += [f"{name} is gone" for name in found if name not in now]
    for name in found.keys() & now.keys():
        if other := how_other(found[name], now[name]):
            lines.append(f"{name} is now {other}")
    more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "; ".join(sorted(lines)[:5] + more)


def check_finished(folder: AnyPath, stems: Sequence[str]) -> None:
    """Raise InputError where one of these shards has no table yet."""
    there = existing(folder / f"{stem}.parquet" for stem in stems)
    missing = [stem for stem in stems if folder / f"{stem}.parquet" not in there]
    if missing:
        raise InputError(
            f"{folder}: {len(stems) - len(missing)} of {len(stems)} shards are done, {missing[0]} is not; "
            f"run the command that made it again to finish the rest"
        )


def _stage_fingerprint(folder: str | os.PathLike, inputs: Sequence[Mapping[str, Any]]) -> str | None:
    """What tells a folder of tables from others: its run's fingerprint, and what its shards were, if the tables say so.

    Of a folder of clip-retrieval its content; None where it says nothing of itself.
    """
    if (foreign := _clip_retrieval(folder)) is not None:
        return foreign.fingerprint
    run = read_stage(folder).get("fingerprint")
    return fingerprint([run, inputs]) if any(inputs) else run


def reading_pool(folder: AnyPath) -> ThreadPoolExecutor:
    """Threads to read many files of a folder."""
    return ThreadPoolExecutor(os.cpu_count() if isinstance(folder, Path) else THREADS)


def input_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's metadata say of the shard that it was made of, and of the array beside it: name -> a digest."""
    found = metadata.get("input")
    found = dict(found) if isinstance(found, dict) else {}
    return {**found, "array": metadata["array"]} if "array" in metadata else found


_OTHERS = {
    "bytes": "of another size",
    "index": "with other names, sizes, times or labels",
    "array": "with other values",
    "embeddings": "with other embeddings",
}


def how_other(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """How the shard of one identity differs from that of the other, by what both know; empty if it does not."""
    names = [name for name in _OTHERS if name in found and name in expected and found[name] != expected[name]]
    return " and ".join(_OTHERS[name] for name in names)


def _first_schema(folder: AnyPath) -> pa.Schema:
    """Of the first shard's table of a folder that is finished."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of tables")
    if _clip_retrieval(folder) is not None:
        return BASE_SCHEMA
    stems = read_stage(folder)["shards"]
    check_finished(folder, stems)
    return _schema(folder / f"{stems[0]}.parquet") if stems else BASE_SCHEMA


def _read_shards(folder: AnyPath, columns: list[str] | Set[str] | None = None, seen: Seen | None = None) -> pa.Table:
    """Of a set of ``columns`` those that are there."""
    if isinstance(columns, Set):
        columns = [name for name in _first_schema(folder).names if name in columns]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of tables")
    if (foreign := _clip_retrieval(folder)) is not None:
        table = foreign.whole_table()
        return table if columns is None else table.select(columns)
    stems = read_stage(folder)["shards"]
    check_finished(folder, stems)
    tables = []
    for stem, table in zip(stems, read_each(folder, stems, columns), strict=True):
        if seen:
            seen(stem, table)
        tables.append(table)
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise InputError(f"{folder}: its tables have different columns ({error})") from error
    return table.replace_schema_metadata(tables[0].schema.metadata)


def _check_unique(table: pa.Table, folder: str | os.PathLike) -> None:
    if "key" in table.column_names and (twice := repeated_key(table["key"])) is not None:
        raise InputError(f"{folder}: key {twice!r} stands in it twice; keys must be unique over all shards")


def read_tables(
    folders: str | os.PathLike | Sequence[str | os.PathLike],
    columns: list[str] | None = None,
    *,
    fingerprints: list[str | None] | None = None,
) -> pa.Table:
    """Folders of tables joined by key: base columns once, then every score column (or those in ``columns`` alone).

    Row order is the first folder's. A row is "failed" if it failed in any of them. Raises InputError if the folders
    are of different data sets, or if two hold the same column. ``fingerprints``: a list that gets one of each folder:
    of its run, and of what its shards were.
    """
    paths = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    names = table_header(paths).column_names
    if missing := [name for name in columns or () if name not in names]:
        there = ", ".join(name for name in names if name not in BASE_COLUMNS)
        raise InputError(f"{', '.join(map(str, paths))}: no column {missing[0]!r}; there are {there}")
    wanted = None if columns is None else {*BASE_COLUMNS, *columns}

    def read(path: str | os.PathLike) -> pa.Table:
        inputs: list[dict[str, Any]] = []

        def seen(stem: str, table: pa.Table) -> None:
            known = METADATA_KEY in (table.schema.metadata or {})
            inputs.append(input_of(_metadata(table.schema, as_path(path) / f"{stem}.parquet")) if known else {})

        table = _read_shards(as_path(path), wanted, seen)
        if fingerprints is not None:
            fingerprints.append(_stage_fingerprint(path, inputs))
        return table

    result = read(paths[0])
    _check_unique(result, paths[0])
    for path in paths[1:]:
        result = _join(result, read(path), paths[0], path)
    if columns is not None:
        result = result.select([*BASE_COLUMNS, *(name for name in columns if name not in BASE_COLUMNS)])
    return result


def table_header(folders: str | os.PathLike | Sequence[str | os.PathLike]) -> pa.Table:
    """What ``read_tables`` gives, without a row. Raises InputError if two folders hold the same column."""
    paths = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if not paths:
        raise InputError("expected at least one folder of score tables, got none")
    fields: dict[str, pa.Field] = {}
    holder: dict[str, str | os.PathLike] = {}
    for path in paths:
        for field in _first_schema(as_path(path)):
            if field.name not in BASE_COLUMNS and field.name in fields:
                where = holder[field.name]
                raise InputError(f"{path}: column {field.name!r} is in {where} too; give only one of the two")
            fields.setdefault(field.name, field)
            holder.setdefault(field.name, path)
    return pa.schema(fields.values()).empty_table()


def score_columns(table: pa.Table) -> list[str]:
    """The columns of a table that are no base columns."""
    return [name for name in table.column_names if name not in BASE_COLUMNS]


def read_stage(folder: str | os.PathLike) -> dict[str, Any]:
    """What a stage wrote about itself into its folder: stage, version, fingerprint, config, shards."""
    path = as_path(folder) / STAGE_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: no {STAGE_FILE}; expected a folder that diffprune's encode, embed, score or cluster wrote"
        )
    stage = read_json(path)
    shards = stage.get("shards") if isinstance(stage, dict) else None
    if not isinstance(shards, list) or not all(isinstance(s, str) and s == os.path.basename(s) and s for s in shards):
        raise InputError(f"{path}: expected a JSON object with a list of shard names, found something else")
    for name, kind in (("config", dict), ("metadata", dict), ("fingerprint", str), ("stage", str)):
        if not isinstance(stage.get(name, kind()), kind):
            raise InputError(f"{path}: {name}: expected {kind.__name__}, found {type(stage[name]).__name__}")
    return stage


def selection_about(path: str | os.PathLike) -> dict[str, Any]:
    """What a selection's metadata says; {} of one made by hand. InputError for a table in the folder of its stage."""
    if METADATA_KEY not in (_schema(path).metadata or {}):
        return {}
    about = table_metadata(path)
    stage = about.get("stage", "select")
    if stage == "select":
        return about
    if (as_path(path).parent / STAGE_FILE).is_file():
        raise InputError(f"{path}: expected a selection, found a table of `{stage}`; make one by `diffprune select`")
    return {}  # rows of such a table that were chosen by hand


def kept_keys(path: str | os.PathLike) -> frozenset[str]:
    """The keys of a selection (kept.parquet)."""
    selection_about(path)
    return frozenset(read_table(path, ["key"])["key"].to_pylist())


def _clip_retrieval(folder: str | os.PathLike) -> ClipRetrievalFolder | None:
    """The folder as clip-retrieval wrote it, if it did."""
    from diffprune.clip_retrieval import ClipRetrievalFolder, is_clip_retrieval

    return ClipRetrievalFolder(folder) if is_clip_retrieval(folder) else None


def _join(left: pa.Table, right: pa.Table, left_path: str | os.PathLike, right_path: str | os.PathLike) -> pa.Table:
    if not left["key"].equals(right["key"]):
        _check_unique(right, right_path)
        rows = pc.index_in(left["key"], value_set=right["key"].combine_chunks())
        if rows.null_count or left.num_rows != right.num_rows:
            lost = left["key"].filter(pc.is_null(rows))
            example = f"; key {lost[0].as_py()!r} is only in the first" if len(lost) else ""
            raise InputError(
                f"{right_path}: of another data set than {left_path}: "
                f"{right.num_rows} and {left.num_rows} samples{example}"
            )
        right = right.take(rows)
    for name in ("shard", "offset", "size"):
        differs = pc.not_equal(left[name], right[name])
        if pc.any(differs).as_py():
            key = left["key"].filter(differs)[0].as_py()
            raise InputError(f"{right_path}: of another data set than {left_path}: key {key!r} has another {name}")
    both = [name for name in score_columns(right) if name in score_columns(left)]
    if both:
        raise InputError(f"{right_path}: column {both[0]!r} is in {left_path} too; give only one of the two")
    failed = pc.or_(pc.equal(left["status"], "failed"), pc.equal(right["status"], "failed"))
    status = pc.if_else(failed, "failed", "ok").cast(left["status"].type)
    left = left.set_column(left.column_names.index("status"), "status", status)
    left = left.set_column(left.column_names.index("error"), "error", pc.coalesce(left["error"], right["error"]))
    for name in score_columns(right):
        left = left.append_column(right.schema.field(name), right[name])
    return left


def _schema(path: str | os.PathLike) -> pa.Schema:
    with _readable(path) as file:
        return file.schema_arrow


@contextmanager
def _readable(path: str | os.PathLike) -> Iterator[pq.ParquetFile]:
    """A parquet file to read; what is wrong with it is an InputError that names it."""
    path = as_path(path)
    try:
        with pq.ParquetFile(for_arrow(path) if isinstance(path, Path) else open_file(path)) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such table") from None
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error
