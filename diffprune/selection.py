"""``select``: score tables -> kept.parquet, the samples to keep. Exact counts; ties go to the smaller key."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune._version import __version__
from diffprune.choosing import choose_rows
from diffprune.embedding_folders import EmbeddingFolders
from diffprune.errors import InputError
from diffprune.extra_columns import add_columns, has_extra_columns
from diffprune.files import fingerprint
from diffprune.outputs import PARQUET, check_output, is_stream
from diffprune.requests import NEEDS, Request, read_quota
from diffprune.storage import AnyPath, as_path
from diffprune.tables import BASE_COLUMNS, read_tables, table_header, table_metadata, write_table
from diffprune.unique_keys import repeated_key

__all__ = ["select"]

_PLACE = ("key", "shard", "index", "offset", "size", "uid")


def select(
    scores: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    by: str | None = None,
    order: str = "highest",
    keep: float | None = None,
    prune: float | None = None,
    count: int | None = None,
    seed: int = 0,
    within: str = "nearest",
    per: str | None = None,
    shares: str = "proportional",
    quota: str | os.PathLike | Mapping[str, int] | None = None,
    dedup: float | None = None,
    dedup_keep: str = "farthest",
    embeddings: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Choose the samples to keep and write them to ``out``, a parquet of key, shard, offset and size.

    Args:
        scores: a folder of score tables, or several, which are joined by key; also folders of ``embed`` and, without
            a score column or a shard, of clip-retrieval, for orders that need none; and parquet files with a column
            ``key``, or folders of them such as img2dataset's, whose other columns ``by``, ``within`` and ``per`` may
            name.
        out: the file to write (kept.parquet); an earlier selection there is replaced.
        keep, prune, count: how much to keep; exactly one of them, unless ``quota`` says it, or ``dedup`` alone is to
            decide: then no order is needed. ``keep`` is a fraction of the samples that did not fail, ``prune`` the
            fraction to leave out; keep·N is rounded half up, in exact decimal arithmetic.
        quota: how many of each group of ``per``, by name, "*" for all others: a mapping, the text "0=100,1=50,*=20",
            or a JSON file with an object.
        by, order, seed, within, per, shares, dedup, dedup_keep, device: see ``choose``.
        embeddings: the folder, or folders of one model, that k-center, herding and ``dedup`` work on.
        dry_run: write nothing; say how many would be kept, where that does not take embeddings to know.

    Samples that failed are never kept; ``failed`` in the result says how many there are. ``out`` is sorted by shard
    and place in it, has a column ``uid`` where the tables have uids, and its metadata holds the arguments, count,
    total and a fingerprint of the inputs.

    Returns order (None where ``dedup`` alone decides), by, within, count, total (samples that did not fail), failed,
    seed, ``column_keeps`` (the end of ``by`` that its methods mean to keep, "highest" or "lowest", where the tables say
    so and agree), fingerprint, out, and, if they were given, per, shares, quota, dedup and dedup_keep.

    Raises:
        InputError: an unknown order or column, a ``by`` that cannot be read, tables of different data sets, NaN or
            missing scores, more samples asked for than there are (in all, in a group, or without near-duplicates) or
            none, or an ``out`` that is no selection.
    """
    out = as_path(out)
    given = [scores] if isinstance(scores, (str, os.PathLike)) else list(scores)
    extra = [path for path in given if has_extra_columns(path)]
    folders = [path for path in given if path not in extra]
    quota = None if quota is None else read_quota(quota)
    request = Request(order, by, seed, within, per, shares, quota, dedup, dedup_keep)
    counted = any(value is not None for value in (keep, prune, count))
    inputs: list[Any] = []
    if extra:
        table = read_tables(folders, fingerprints=inputs)
    else:
        request.check(table_header(folders), counted=counted)
        names = sorted(request.columns().difference(BASE_COLUMNS))
        table = read_tables(folders, names, fingerprints=inputs)
    table, extra_inputs = add_columns(table, extra, request.columns() if order in NEEDS else frozenset())
    request.check(table, counted=counted)
    total = int(pc.sum(pc.equal(table["status"], "ok")).as_py() or 0)
    count = resolve_count(total, keep, prune, count, request)
    inputs += extra_inputs
    points_folder = _open_embeddings(embeddings, request)
    if points_folder is not None:
        inputs.append(points_folder.fingerprint)
    about = {"stage": "select", "version": __version__, **_settings(request), "total": total}
    _check_out(out)
    report = {
        **about,
        "count": count,
        "failed": table.num_rows - total,
        "column_keeps": _column_keeps(table, request),
        "out": str(out),
        "dry_run": dry_run,
    }
    if dry_run:
        return report | {"count": _planned(table, request, count, device)}
    points = None if points_folder is None else _aligned(table, points_folder)
    table = table.select([*_PLACE, "status", *sorted(request.columns().difference(_PLACE, ["status"]))])
    rows = choose_rows(table, request, count, points, device)
    about["count"] = report["count"] = len(rows)
    about["fingerprint"] = report["fingerprint"] = fingerprint({**about, "inputs": inputs})
    write_table(out, _kept(table, rows), about)
    return report


def _planned(table: pa.Table, request: Request, count: int | None, device: str) -> int | None:
    """How many would be kept; None where near-duplicates decide. InputError for more than there are, as in earnest.

    What embeddings decide inside a cluster, random numbers do here.
    """
    if request.dedup is not None:
        return count
    if request.needs_embeddings is not None:
        inside = "within" in NEEDS[request.order]
        request = replace(request, within="random") if inside else replace(request, order="random")
    return len(choose_rows(table, request, count, None, device))


def _settings(request: Request) -> dict[str, Any]:
    """The arguments that made a difference, for metadata and report."""
    settings: dict[str, Any] = {
        # of near-duplicates left out, and no more, there is none
        "order": request.order if request.by is not None or "by" not in NEEDS[request.order] else None,
        "by": request.by,
        "within": request.within if "within" in NEEDS[request.order] else None,
        "seed": request.seed,
    }
    if request.group is not None:
        settings |= {"per": request.group, "shares": None if request.quota else request.shares}
        settings |= {"quota": dict(request.quota)} if request.quota else {}
    if request.dedup is not None:
        settings |= {"dedup": request.dedup, "dedup_keep": request.dedup_keep}
    return settings


def _kept(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The rows, by shard and place in it; those of no shard, as clip-retrieval's, last and in the table's order."""
    shards = table["shard"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    codes = pc.fill_null(shards.indices, len(shards.dictionary)).to_numpy()
    ranks = np.append(pc.rank(shards.dictionary, tiebreaker="first").to_numpy(), len(shards.dictionary) + 1)[codes]
    index = table["index"].take(pa.array(rows)).to_numpy()
    places = np.where(codes < len(shards.dictionary), index, np.arange(len(rows)))
    kept = table.select([name for name in _PLACE if name != "index"]).take(pa.array(rows[np.lexsort((places, ranks))]))
    return kept if kept["uid"].null_count < len(kept) else kept.drop_columns(["uid"])


def _column_keeps(table: pa.Table, request: Request) -> str | None:
    """The end of ``by`` to keep, as its columns' metadata say; None if they don't, or disagree."""
    ends = set()
    for term in request.ranking.terms if request.ranking else ():
        end = (table.schema.field(term.column).metadata or {}).get(b"keep", b"").decode()
        ends.add({"highest": "lowest", "lowest": "highest"}.get(end, "") if term.reversed else end)
    return (ends.pop() or None) if len(ends) == 1 else None


def resolve_count(
    total: int, keep: float | None, prune: float | None, count: int | None, request: Request
) -> int | None:
    """How many of ``total``; None where a quota or near-duplicates say it. InputError unless one says it."""
    given = {name: value for name, value in (("keep", keep), ("prune", prune), ("count", count)) if value is not None}
    if request.quota is not None:
        if given:
            raise InputError(f"a quota says how many to keep; got {', '.join(given)} too: leave it out")
        return None
    if not given and request.dedup is not None:
        return None
    if len(given) != 1:
        raise InputError(f"expected exactly one of keep, prune and count, got {', '.join(given) or 'none'}")
    [(name, value)] = given.items()
    if name != "count":
        if not 0 <= value <= 1:
            raise InputError(f"{name}: expected a fraction from 0 to 1, got {value}")
        fraction = Fraction(repr(float(value)))  # 0.1 is a tenth, not the nearest binary number
        fraction = 1 - fraction if name == "prune" else fraction
        count = int(fraction * total + Fraction(1, 2))
    if not 1 <= count <= total:
        raise InputError(
            f"{name}: {value} means {count} samples, expected 1 to {total}, the number that there are without failures"
        )
    return count


def _open_embeddings(
    folders: str | os.PathLike | Sequence[str | os.PathLike] | None, request: Request
) -> EmbeddingFolders | None:
    needed = request.needs_embeddings
    if folders is not None:
        if needed is None:
            raise InputError(f"order {request.order!r} works on no embeddings, got {folders}; leave `embeddings` out")
        return EmbeddingFolders(folders)
    if needed is not None:
        raise InputError(f"{needed}: works on embeddings: give the folder that `diffprune embed` wrote")
    return None


def _aligned(table: pa.Table, folder: EmbeddingFolders) -> np.ndarray:
    """Embeddings row-aligned with the table: [N, D] of the dtype on disk, NaN where a row failed and has none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        theirs = pa.concat_tables(pool.map(folder.table, folder.stems))
    rows = _rows_of(table, theirs, folder)
    there = np.flatnonzero(rows >= 0)
    for name in ("shard", "offset"):  # null in the folders of other tools
        differs = pc.not_equal(table[name].take(pa.array(there)), theirs[name].take(pa.array(rows[there])))
        if pc.any(differs).as_py():
            key = table["key"][int(there[pc.index(differs, True).as_py()])].as_py()
            raise InputError(f"{folder.folder}: of another data set than the scores: key {key!r} has another {name}")
    places = np.full(len(theirs), -1)
    places[rows[there]] = there
    arrays = [folder.array(stem, by_rows=True) for stem in folder.stems]
    widths = [math.prod(array.shape[1:]) for array in arrays]
    for stem, width in zip(folder.stems, widths, strict=True):
        if width != widths[0]:
            raise InputError(f"{folder.folder}: {stem}.npy has {width} dimensions, {folder.stems[0]}.npy {widths[0]}")
    points = np.full((table.num_rows, widths[0]), np.nan, dtype=arrays[0].dtype)
    for array, here in zip(arrays, np.split(places, np.cumsum([len(array) for array in arrays])[:-1]), strict=True):
        points[here[here >= 0]] = array[here >= 0].reshape(-1, widths[0])
    return points


def _rows_of(table: pa.Table, theirs: pa.Table, folder: EmbeddingFolders) -> np.ndarray:
    """The row of each key of ``table`` in ``theirs``, -1 where a sample that failed is not there."""
    if theirs["key"].equals(table["key"]):
        rows = np.arange(table.num_rows)
    else:
        if (twice := repeated_key(theirs["key"])) is not None:
            raise InputError(f"{folder.folder}: key {twice!r} stands in it twice; keys must be unique")
        found = pc.index_in(table["key"], value_set=theirs["key"].combine_chunks())
        rows = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    usable = (rows >= 0) & pc.equal(theirs["status"], "ok").to_numpy()[rows] if len(theirs) else rows >= 0
    lost = np.flatnonzero(~usable & pc.equal(table["status"], "ok").to_numpy())
    if len(lost):
        raise InputError(
            f"{folder.folder}: no embedding for {len(lost)} of {table.num_rows} samples, first key "
            f"{table['key'][int(lost[0])].as_py()!r}; were they made from other shards? Run `diffprune embed` on these"
        )
    return rows


def _check_out(out: AnyPath) -> None:
    if is_stream(out):
        raise InputError(f"{out}: a selection is read from any place in it: expected a file to write, found a pipe")
    check_output(out, PARQUET)
    if out.exists() and table_metadata(out).get("stage") != "select":
        raise InputError(f"{out}: already there and no selection; write to another file")
