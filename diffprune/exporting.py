"""``export``: a selection in the formats of other tools."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from diffprune.errors import InputError, short
from diffprune.files import atomic_path, open_file
from diffprune.outputs import KEY_LIST, NPY, Kind, check_output
from diffprune.progress import progress
from diffprune.shards import ShardIndex, ShardSpec, index_shards, show_spec
from diffprune.storage import AnyPath, as_path
from diffprune.tables import read_table, selection_about


def export(
    kept: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str,
    shards: ShardSpec | None = None,
    split: str = "train",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write a selection (kept.parquet) as a file that another tool reads.

    Args:
        kept: the selection.
        out: the file to write, "-" for standard output; an earlier one of this kind that is there is replaced.
        format: "keys": a text file, one sample key a line, in the selection's order.
            "datacomp": a ``.npy`` of the 128-bit uids as ``u8,u8``, sorted: a DataComp subset file.
            "energon": ``split.yaml`` for the folder ``.nv-meta`` that ``energon prepare`` made beside ``shards``, the
            shards that the selection was made from: it excludes what is not kept, with nothing rewritten.
            "wids": the JSON index of ``shards``, those that ``prune`` wrote, for ``wids.ShardListDataset``; urls are
            relative to ``out``.
            "timm": ``_info.json`` of ``shards``, those that ``prune`` wrote; timm wants it in their folder.
        shards: for energon, wids and timm.
        split: the split's name, for energon and timm.
        dry_run: check everything and write nothing.

    Returns format, count (samples kept), ``shards`` where there are any, out.

    Raises:
        InputError: an unknown format; a sample without a uid, or two of one uid ("datacomp"); shards that lack a kept
            key, or, for wids and timm, hold another one; for timm, shards that do not lie beside ``out``; an ``out``
            that is one of the inputs, or another kind of file.
    """
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    writes, needs_shards, kind = FORMATS[format]
    if needs_shards and shards is None:
        raise InputError(f"format {format!r} describes shards: give those that {needs_shards}")
    if shards is not None and not needs_shards:
        raise InputError(f"format {format!r} needs no shards, got {show_spec(shards)}; leave them out")
    source = _Source(as_path(kept), index_shards(shards) if shards is not None else [], as_path(out), split)
    check_output(out, kind, [kept, *(index.path for index in source.indexes)])
    content = writes(source)
    report = {"format": format, "count": source.count, "out": str(out), "dry_run": dry_run}
    if shards is not None:
        report["shards"] = len(source.indexes)
    if not dry_run:
        with atomic_path(out) as temporary:
            temporary.write_bytes(content)
    return report


@dataclass
class _Source:
    """What an export is made from."""

    kept: AnyPath
    indexes: list[ShardIndex]
    out: AnyPath
    split: str

    @cached_property
    def keys(self) -> list[str]:
        selection_about(self.kept)
        keys = read_table(self.kept, ["key"])["key"].to_pylist()
        if not keys or None in keys:
            raise InputError(f"{self.kept}: expected a selection with a key in every row; select again")
        return keys

    @property
    def count(self) -> int:
        return len(self.keys)

    def check_there(self) -> None:
        """InputError unless every kept key is in the shards."""
        there = {key for index in self.indexes for key in index.samples.keys}
        if lost := [key for key in self.keys if key not in there]:
            raise InputError(
                f"{self.kept}: {len(lost)} of {self.count} keys, {short(lost[0])} first, are not in the shards given; "
                "give the shards of this selection"
            )

    def check_pruned(self) -> None:
        """InputError unless the shards hold the kept keys and no other."""
        self.check_there()
        kept = set(self.keys)
        others = [(index.path, key) for index in self.indexes for key in index.samples.keys if key not in kept]
        if others:
            raise InputError(
                f"{others[0][0]}: {len(others)} samples of the shards are not kept, {others[0][1]!r} first; "
                "run `diffprune prune` and give the shards that it writes"
            )


def _keys(source: _Source) -> bytes:
    for key in source.keys:
        if "\n" in key or "\r" in key:  # not of shards, where it is damage
            raise InputError(f"{source.kept}: key {short(key)} has a line break; a list has a key per line")
    return "".join(f"{key}\n" for key in source.keys).encode()


def _datacomp(source: _Source) -> bytes:
    table = read_table(source.kept)
    if "uid" not in table.column_names:
        raise InputError(
            f"{source.kept}: no column 'uid': the samples' json have none, and DataComp knows samples by uid"
        )
    uids = table["uid"].to_pylist()
    for key, uid in zip(source.keys, uids, strict=True):
        if uid is None or not re.fullmatch(r"[0-9a-fA-F]{32}", uid):
            raise InputError(f"{source.kept}: key {short(key)}: expected a uid of 32 hex digits, found {uid!r}")
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    array = np.sort(np.array(halves, dtype="u8,u8"))
    if len(twice := np.flatnonzero(array[1:] == array[:-1])):
        high, low = array[twice[0]].tolist()
        raise InputError(f"{source.kept}: {len(twice)} uids stand in it twice, first {high:016x}{low:016x}")
    buffer = pa.BufferOutputStream()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue().to_pybytes()


def _energon(source: _Source) -> bytes:
    source.check_there()
    kept = set(source.keys)
    folder = source.out.parent.resolve()
    root = folder.parent if folder.name == ".nv-meta" else None  # of the names that energon knows shards by
    paths = [_relative(index.path, root) if root else index.path.name for index in source.indexes]
    exclude, named = [], [_braces_escaped(path) for path in paths]
    for index, name in zip(source.indexes, named, strict=True):
        others = [key for key in index.samples.keys if key not in kept]
        if len(others) == len(index.samples):
            exclude.append(name)
        else:
            exclude += [f"{name}/{_braces_escaped(key)}" for key in others]
    parts = {
        part: named if part == source.split else [] for part in dict.fromkeys([source.split, "train", "val", "test"])
    }
    lines = ["split_parts:"]
    for part, shards in parts.items():
        lines += (
            [f"  {_yaml(part)}:", *(f"  - {_yaml(name)}" for name in shards)] if shards else [f"  {_yaml(part)}: []"]
        )
    lines += ["exclude:", *(f"- {_yaml(one)}" for one in exclude)] if exclude else ["exclude: []"]
    return ("\n".join(lines) + "\n").encode()


def _wids(source: _Source) -> bytes:
    source.check_pruned()
    shards = []
    with progress("md5", total=len(source.indexes), unit="shards") as bar:
        for index in source.indexes:
            url = _relative(index.path, source.out.parent)
            shards.append(
                {"url": url, "md5sum": _md5(index.path), "nsamples": len(index.samples), "filesize": index.size}
            )
            bar.advance()
    return _json({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards})


def _timm(source: _Source) -> bytes:
    source.check_pruned()
    if away := [index.path for index in source.indexes if index.path.parent.resolve() != source.out.parent.resolve()]:
        raise InputError(f"{source.out}: timm looks for its shards beside this file, {away[0]} is elsewhere")
    if "tar" in source.split or ".." in source.split:
        raise InputError(f"split: timm takes {source.split!r} for file names ('tar' or '..' in it); give another name")
    info = {
        "name": source.split,
        "num_samples": source.count,
        "filenames": [index.path.name for index in source.indexes],
        "shard_lengths": [len(index.samples) for index in source.indexes],
    }
    return _json({"splits": {source.split: info}})


# What writes it, which shards it needs, and what an earlier one is known by.
FORMATS: dict[str, tuple[Callable[[_Source], bytes], str, Kind]] = {
    "keys": (_keys, "", KEY_LIST),
    "datacomp": (_datacomp, "", NPY),
    "energon": (_energon, "the selection was made from", Kind("split.yaml", b"split_parts:")),
    "wids": (_wids, "`diffprune prune` wrote", Kind("wids index", b'"__kind__"')),
    "timm": (_timm, "`diffprune prune` wrote", Kind("_info.json", b'"splits"')),
}


def _relative(path: AnyPath, folder: AnyPath) -> str:
    """A path as seen from a folder. Links of folders are followed, the file's own is not: it is the name to find."""
    path, folder = path.parent.resolve() / path.name, folder.resolve()
    below = type(path) is type(folder) and path.is_relative_to(folder)
    return str(path.relative_to(folder)) if below else str(path)


def _md5(path: AnyPath) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _braces_escaped(text: str) -> str:
    """energon expands braces in every name."""
    return re.sub(r"[\\{}]", r"\\\g<0>", text)


def _yaml(text: str) -> str:
    return json.dumps(text)  # a JSON string is a YAML one


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
