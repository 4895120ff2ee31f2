"""Header indexes of remote shards, kept on local disk: the walk over a tar's headers is done once per version of it.

A cache file is a parquet of the shard's members that says of itself which object, size and version it is of, by which
code it was made, and the SHA-256 of what it holds. One of which any of it is not so is made again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import astuple
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.files import atomic_path
from diffprune.storage.folders import cache_folder
from diffprune.storage.paths import RemotePath, for_arrow
from diffprune.tar_index import Damage
from diffprune.tar_samples import SampleList

Index = tuple[SampleList, list[Damage], list[str]]

_METADATA_KEY = b"diffprune_index"


def load_index(path: RemotePath, size: int, version: str) -> Index | None:
    """What ``index_tar`` said of this version of a shard, or None if that is not known (any more)."""
    if not version:
        return None
    file = _cache_path(path, size, version)
    try:
        table = pq.read_table(for_arrow(file), memory_map=False)
        about = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        if about["of"] != _identity(path, size, version) or about["sha256"] != _digest(table, about):
            return None
        damage = [Damage(*one) for one in about["damage"]]
        return SampleList.of_table(table), damage, about["ignored"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is made again
        return None


def save_index(path: RemotePath, size: int, version: str, index: Index) -> None:
    if not version:
        return
    samples, damage, ignored = index
    table = samples.table()
    about: dict[str, Any] = {
        "of": _identity(path, size, version),
        "damage": [astuple(one) for one in damage],
        "ignored": ignored,
    }
    about["sha256"] = _digest(table, about)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(about)})
    try:
        with atomic_path(_cache_path(path, size, version)) as temporary:
            pq.write_table(table, for_arrow(temporary), compression="zstd")
    except OSError as error:  # a read-only home, a full disk: the work goes on, and reads headers again next time
        warnings.warn(f"header indexes are not kept ({error}); set DIFFPRUNE_CACHE to a folder", stacklevel=2)


def _identity(path: RemotePath, size: int, version: str) -> list[Any]:
    return [str(path), size, version, _code()]  # without what signs the URL, which differs from day to day


def _digest(table: pa.Table, about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([about["damage"], about["ignored"], about["of"]]).encode())
    for name in table.column_names:
        digest.update(json.dumps([name, table[name].to_pylist()]).encode())
    return digest.hexdigest()


def _cache_path(path: RemotePath, size: int, version: str) -> Path:
    name = hashlib.sha256(json.dumps(_identity(path, size, version)).encode()).hexdigest()
    return cache_folder() / "index" / name[:2] / f"{name}.parquet"


@lru_cache
def _code() -> str:
    """What the index says depends on the code that made it."""
    from diffprune import tar_headers, tar_index, tar_members, tar_samples

    files = [module.__file__ or "" for module in (tar_headers, tar_index, tar_members, tar_samples)]
    compiled = find_spec("diffprune._cpu")
    files += [compiled.origin or ""] if compiled else []
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]
