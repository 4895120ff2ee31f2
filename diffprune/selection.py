"""``select``: score tables -> kept.parquet, the samples to keep. Exact counts; ties go to the smaller key."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune._version import __version__
from diffprune.arrays import ArrayFolder
from diffprune.choosing import NEEDS, ORDERS, check_arguments, choose
from diffprune.errors import InputError
from diffprune.files import fingerprint
from diffprune.tables import read_stage, read_tables, table_metadata, write_table

__all__ = ["ORDERS", "choose", "select"]


def select(
    scores: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    by: str | None = None,
    order: str = "highest",
    keep: float | None = None,
    prune: float | None = None,
    count: int | None = None,
    seed: int = 0,
    within: str = "nearest",
    embeddings: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Choose the samples to keep and write them to ``out``, a parquet of key, shard, offset and size.

    Args:
        scores: a folder of score tables, or several, which are joined by key.
        out: the file to write (kept.parquet); an earlier selection there is replaced.
        keep, prune, count: how much to keep; exactly one of them. ``keep`` is a fraction of the samples that did not
            fail, ``prune`` the fraction to leave out; keep·N is rounded half up, in exact decimal arithmetic.
        by, order, seed, within: see ``choose``.
        embeddings: the embeddings folder that k-center and herding work on.
        dry_run: choose nothing, write nothing; say how many would be kept.

    Samples that failed are never kept; ``failed`` in the result says how many there are. ``out`` is sorted by shard
    and place in it, and its metadata holds order, by, within, count, total, seed and a fingerprint of the inputs.

    Returns order, by, within, count, total (samples that did not fail), failed, seed, ``column_keeps`` (the end of
    ``by`` that its method means to keep, "highest" or "lowest", where its table says so), fingerprint, out.

    Raises:
        InputError: an unknown order or column, tables of different data sets, NaN or missing scores, too many or no
            samples asked for, or an ``out`` that is no selection.
    """
    folders = [scores] if isinstance(scores, (str, Path)) else list(scores)
    table = read_tables(folders)
    check_arguments(table, order, by, within, seed)
    total = int(pc.sum(pc.equal(table["status"], "ok")).as_py() or 0)
    count = _resolve_count(total, keep, prune, count)
    used_within = within if "within" in NEEDS[order] else None
    inputs = [read_stage(folder).get("fingerprint") for folder in folders]
    needs_points = "embeddings" in NEEDS[order] or used_within == "herding"
    points_folder = _open_embeddings(embeddings, needs_points, order if used_within is None else f"within={within}")
    if points_folder is not None:
        inputs.append(points_folder.fingerprint)
    about = {
        "stage": "select",
        "version": __version__,
        "order": order,
        "by": by,
        "within": used_within,
        "count": count,
        "total": total,
        "seed": seed,
    }
    about["fingerprint"] = fingerprint({**about, "inputs": inputs})
    _check_out(Path(out))
    report = {
        **about,
        "failed": table.num_rows - total,
        "column_keeps": None if by is None else _column_keeps(table, by),
        "out": str(out),
        "dry_run": dry_run,
    }
    if dry_run:
        return report
    points = None if points_folder is None else _aligned(table, points_folder)
    rows = choose(table, order, count, by=by, seed=seed, within=within, embeddings=points)
    kept = table.select(["key", "shard", "index", "offset", "size"]).take(pa.array(rows))
    kept = kept.sort_by([("shard", "ascending"), ("index", "ascending")]).drop_columns(["index"])
    write_table(out, kept, about)
    return report


def _column_keeps(table: pa.Table, name: str) -> str | None:
    value = (table.schema.field(name).metadata or {}).get(b"keep")
    return None if value is None else value.decode()


def _resolve_count(total: int, keep: float | None, prune: float | None, count: int | None) -> int:
    given = {name: value for name, value in (("keep", keep), ("prune", prune), ("count", count)) if value is not None}
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


def _open_embeddings(folder: str | Path | None, needed: bool, what: str) -> ArrayFolder | None:
    if needed == (folder is not None):
        return ArrayFolder(folder, kind="embeddings") if needed else None
    if needed:
        raise InputError(f"{what}: works on embeddings: give the folder that `diffprune embed` wrote")
    raise InputError(f"order {what!r} works on no embeddings, got {folder}; leave `embeddings` out")


def _aligned(table: pa.Table, folder: ArrayFolder) -> np.ndarray:
    """Embeddings row-aligned with the table: [N, D] float32, NaN where a row failed and has none."""
    theirs, values = folder.load()
    where = pc.index_in(table["key"], value_set=theirs["key"].combine_chunks())
    found = pc.is_valid(where).to_numpy()
    lost = np.flatnonzero(~found & pc.equal(table["status"], "ok").to_numpy())
    if len(lost):
        raise InputError(
            f"{folder.folder}: no embedding for {len(lost)} of {table.num_rows} samples, first key "
            f"{table['key'][int(lost[0])].as_py()!r}; were they made from other shards? Run `diffprune embed` on these"
        )
    rows = where.drop_null().to_numpy()
    for name in ("shard", "offset"):
        differs = pc.not_equal(table[name].filter(pa.array(found)), theirs[name].take(pa.array(rows))).to_numpy()
        if differs.any():
            key = table["key"][int(np.flatnonzero(found)[np.argmax(differs)])].as_py()
            raise InputError(f"{folder.folder}: of another data set than the scores: key {key!r} has another {name}")
    points = np.full((table.num_rows, int(np.prod(values.shape[1:]))), np.nan, dtype=np.float32)
    points[found] = values.reshape(len(values), -1)[rows]
    return points


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, such as kept.parquet, found a folder")
    if out.exists() and table_metadata(out).get("stage") != "select":
        raise InputError(f"{out}: already there and no selection; write to another file")
