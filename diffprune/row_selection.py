"""``select_rows``: what ``select`` does, of arrays in memory, with no shards and no files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffprune.choosing import choose_rows
from diffprune.errors import InputError, short
from diffprune.requests import Request, read_quota
from diffprune.selection import resolve_count
from diffprune.tables import BASE_COLUMNS
from diffprune.unique_keys import repeated_key

__all__ = ["select_rows"]

_GROUPS = ("label", "shard")  # of a table's own columns those that mean something without shards


def select_rows(
    columns: Mapping[str, Any] | None = None,
    *,
    keys: Sequence[str] | None = None,
    embeddings: Any = None,
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
    device: str = "auto",
) -> NDArray[Any]:
    """The rows of arrays that an order keeps, ascending, [count] int64: ``array[select_rows(...)]``.

    The same choice that ``select`` makes of tables with these keys and values.

    Args:
        columns: name -> [N] numbers or texts, NumPy, torch or a list: scores for ``by``, groups for ``per``, and for
            the orders of clusters ``cluster`` (whole numbers) and ``distance`` (to the centroid), such as a KMeans'
            ``assignment_`` and ``distance_``.
        keys: [N] texts, each once: ties go to the smaller key, and random choices are drawn for (seed, key), so that
            a sample keeps its luck in other company. None: the row's number, written with twelve digits.
        embeddings: [N, D] finite numbers, NumPy or torch, for k-center, herding and ``dedup``; half precision stays
            as it is, what is not float16 is made float32.
        by, order, within, per, shares, quota, dedup, dedup_keep, keep, prune, count, seed, device: see ``select``.
            Where there are no clusters to look for near-duplicates in, one for all will do:
            ``{"cluster": np.zeros(N, int)}`` with ``dedup_keep="random"``.

    Raises:
        InputError: arrays of other lengths, keys that repeat, and all that ``select`` says of arguments and values.
    """
    request = Request(
        order, by, seed, within, per, shares, None if quota is None else read_quota(quota), dedup, dedup_keep
    )
    arrays = {name: _host(f"column {name!r}", values) for name, values in dict(columns or {}).items()}
    points = None if embeddings is None else _host("embeddings", embeddings)
    if points is not None and points.dtype.kind not in "fiu":
        raise InputError(f"embeddings: expected numbers, got {points.dtype}")
    table = _table(arrays, keys, points)
    request.check(table, counted=any(value is not None for value in (keep, prune, count)))
    needed = request.needs_embeddings
    if needed is not None and points is None:
        raise InputError(f"{needed}: works on embeddings: give embeddings=[{table.num_rows}, D]")
    if needed is None and points is not None:
        raise InputError(f"order {order!r} works on no embeddings, got an array {points.shape}; leave it out")
    return choose_rows(table, request, resolve_count(table.num_rows, keep, prune, count, request), points, device)


def _host(what: str, values: Any) -> np.ndarray:
    """In this machine's byte order; of torch in bfloat16 in float32, of float16 as it is."""
    if np.ma.isMaskedArray(values):
        raise InputError(f"{what}: expected an array without a mask; leave out the rows that are masked")
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            values = values.float() if str(values.dtype) == "torch.bfloat16" else values
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected an array: {error}") from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _table(arrays: Mapping[str, np.ndarray], keys: Sequence[str] | None, points: np.ndarray | None) -> pa.Table:
    """What ``choose_rows`` takes; InputError if the arrays do not belong together."""
    lengths = {name: values.shape[0] if values.ndim else 0 for name, values in arrays.items()}
    lengths |= {} if keys is None else {"keys": len(keys)}
    lengths |= {} if points is None else {"embeddings": len(points) if points.ndim else 0}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"select_rows: expected arrays with a row for each sample, got {told or 'none'}")
    [count] = set(lengths.values())
    if not count:
        raise InputError("select_rows: expected samples to choose from, got arrays of length 0")
    for name, values in arrays.items():
        if name in BASE_COLUMNS and name not in _GROUPS:
            raise InputError(f"column {name!r}: the name has a meaning of its own in tables; give it another")
        if values.ndim != 1:
            raise InputError(f"column {name!r}: expected [{count}], got {values.shape}")
    texts = [f"{row:012d}" for row in range(count)] if keys is None else keys
    named = {"key": _column("keys", texts)}
    if not (pa.types.is_string(named["key"].type) or pa.types.is_large_string(named["key"].type)) or (
        named["key"].null_count
    ):
        raise InputError(f"keys: expected texts, got {named['key'].type} with {named['key'].null_count} missing")
    if keys is not None and (twice := repeated_key(pa.chunked_array([named["key"]]))) is not None:
        raise InputError(f"keys: {short(twice)} stands in them twice; keys must be unique")
    named["status"] = pa.array(["ok"]).take(pa.array(np.zeros(count, np.int64)))
    return pa.table(named | {name: _column(f"column {name!r}", values) for name, values in arrays.items()})


def _column(what: str, values: Any) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype == np.float16:
        values = values.astype(np.float32)  # which arrow ranks
    try:
        made = pa.array(values)
    except (pa.ArrowException, UnicodeError) as error:
        raise InputError(f"{what}: expected numbers or texts: {error}") from error
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made
