"""What a report is made from, read and checked: score tables, selections, evaluations, training logs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.errors import InputError, short
from diffprune.files import read_json
from diffprune.shards import ShardSpec, list_shards
from diffprune.storage import AnyPath, as_path
from diffprune.tables import METADATA_KEY, read_folder, read_stage, read_table, score_columns, table_metadata

PathLike = str | os.PathLike

_NUMBER, _NONE = (int, float), type(None)
_NEEDED: dict[str, type | tuple[type, ...]] = {  # of an evaluation, and what it is
    "name": str,
    "metrics.frechet_distance": (*_NUMBER, _NONE),
    "memorization.closest_pairs": list,
    "context.embedder": dict,
    "context.reference.count": int,
    "context.samples.count": int,
    "context.samples.path": str,
}
_MAY_BE = {  # where they are there
    "classes": (dict, _NONE),
    "classes.shares": dict,
    "classes.reference_shares": dict,
    "context.k": int,
    "context.kept": (str, _NONE),
    "context.sampling": (dict, _NONE),
    "context.sampling.steps": (int, _NONE),
    "context.training_images": (int, _NONE),
}
_OF_NUMBERS = {"metrics": (*_NUMBER, _NONE), "classes.shares": _NUMBER, "classes.reference_shares": _NUMBER}


@dataclass(frozen=True)
class Score:
    """One score column over the rows of ``Scores``: float64 [N], NaN where the sample failed.

    ``keep`` is "highest", "lowest" or "": the end that the method would keep.
    """

    name: str
    values: np.ndarray
    keep: str
    meaning: str


@dataclass(frozen=True)
class Scores:
    """Score tables of one data set, joined by key. ``labels`` and ``cluster`` are -1 where there is none."""

    keys: list[str]
    shards: list[str]
    labels: np.ndarray
    scores: list[Score]
    cluster: np.ndarray | None


@dataclass(frozen=True)
class Selection:
    """A kept.parquet."""

    name: str
    keys: frozenset[str]
    metadata: dict[str, Any]

    @property
    def by(self) -> str:
        """The score column that it was ranked by, or ""."""
        return str(self.metadata.get("by") or "")


@dataclass(frozen=True)
class Log:
    """The training loss by step, in file order."""

    name: str
    steps: np.ndarray
    losses: np.ndarray


def read_scores(folders: Mapping[str, PathLike]) -> Scores | None:
    """Join folders of score tables by key. A folder's name is put before its columns if two folders share one."""
    tables = {name: read_folder(folder) for name, folder in folders.items()}
    if not tables:
        return None
    first_name, first = next(iter(tables.items()))
    every = [column for table in tables.values() for column in score_columns(table)]
    scores, cluster = [], None
    for name, table in tables.items():
        rows = pc.index_in(first["key"], value_set=table["key"].combine_chunks())
        if rows.null_count or table.num_rows != first.num_rows:
            raise InputError(
                f"{folders[name]}: of another data set than {folders[first_name]}: {table.num_rows} and "
                f"{first.num_rows} samples, {rows.null_count} keys of the second are not in the first"
            )
        for column in score_columns(table):
            field, values = table.schema.field(column), table[column].take(rows)
            if column == "cluster":
                cluster = pc.fill_null(values, -1).to_numpy()
            elif pa.types.is_floating(field.type) or pa.types.is_integer(field.type):
                label = column if every.count(column) == 1 else f"{name} {column}"
                told = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
                array = _without_nan(values, first["key"], folders[name], column)
                scores.append(Score(label, array, told.get("keep", ""), told.get("meaning", "")))
    labels = pc.fill_null(first["label"], -1).to_numpy()
    return Scores(first["key"].to_pylist(), first["shard"].to_pylist(), labels, scores, cluster)


def read_selections(paths: Mapping[str, PathLike], scores: Scores | None) -> list[Selection]:
    """Read kept.parquet files; with scores at hand, every key must be in them."""
    known = frozenset(scores.keys) if scores else None
    selections = []
    for name, given in paths.items():
        path = as_path(given)
        table = read_table(path)
        keys = frozenset(read_table(path, ["key"])["key"].to_pylist())
        if known is not None and not keys <= known:
            raise InputError(
                f"{path}: key {min(keys - known)!r} is in none of the score tables; is it of another data set?"
            )
        has_metadata = METADATA_KEY in (table.schema.metadata or {})
        selections.append(Selection(name, keys, table_metadata(table) if has_metadata else {}))
    return selections


def read_evaluations(paths: Sequence[PathLike]) -> list[dict[str, Any]]:
    """Read what ``evaluate`` wrote, in the given order."""
    evaluations = []
    for path in map(as_path, paths):
        evaluation = read_json(path)
        for name in _NEEDED:
            if _found(evaluation, name) is _MISSING:
                raise InputError(f"{path}: expected a file that diffprune's evaluate wrote; it lacks {name}")
        for name, kind in (_NEEDED | _MAY_BE).items():
            if not isinstance(value := _found(evaluation, name), (kind, _Missing)):
                raise InputError(f"{path}: {name}: not what diffprune's evaluate writes: {short(value)}")
        for name, kind in _OF_NUMBERS.items():
            values = _found(evaluation, name)
            for one, value in ({} if values is _MISSING else values).items():
                if not isinstance(value, kind):
                    raise InputError(f"{path}: {name}.{one}: expected a number, found {short(value)}")
        shares, real = (_found(evaluation, f"classes.{name}") for name in ("shares", "reference_shares"))
        if real is not _MISSING and not (shares is not _MISSING and real.keys() <= shares.keys()):
            raise InputError(f"{path}: classes: expected shares of the same classes as reference_shares")
        evaluations.append(evaluation)
    return evaluations


def read_logs(paths: Mapping[str, PathLike]) -> list[Log]:
    """Read training logs: one JSON object a line, those with ``step`` and ``loss`` make the curve."""
    return [_read_log(name, as_path(path)) for name, path in paths.items()]


def class_names(shards: ShardSpec | None) -> list[str]:
    """The names that ``pack`` wrote beside the shards, or none."""
    if shards is None:
        return []
    path = list_shards(shards)[0].parent / "classes.json"
    return [str(name) for name in read_json(path)] if path.is_file() else []


def stage_of(folder: PathLike) -> dict[str, Any]:
    """What a stage says about itself, less its list of shards."""
    return {key: value for key, value in read_stage(folder).items() if key != "shards"}


class _Missing:
    """What ``_found`` finds where there is nothing: null is something."""


_MISSING = _Missing()


def _found(value: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _without_nan(values: pa.ChunkedArray, keys: pa.ChunkedArray, folder: PathLike, column: str) -> np.ndarray:
    array = values.cast(pa.float64()).to_numpy()
    bad = np.flatnonzero(~np.isfinite(array) & values.is_valid().to_numpy())
    if len(bad):
        raise InputError(
            f"{folder}: key {keys[int(bad[0])].as_py()!r}: {column} is {array[bad[0]]}, expected a finite number "
            f"({len(bad)} such); score again from a checkpoint that did not diverge"
        )
    return array


def _read_log(name: str, path: AnyPath) -> Log:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable log ({error})") from error
    steps, losses = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or number == len(lines):  # what follows the last newline was being written
            continue
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry and "loss" in entry:
                steps.append(float(entry["step"]))
                losses.append(float(entry["loss"]))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON ({error})") from error
        except (TypeError, OverflowError) as error:
            raise InputError(f"{path}: line {number}: expected numbers as step and loss ({error})") from error
    if not steps:
        raise InputError(f"{path}: no line with step and loss; expected the log of diffprune train")
    return Log(name, np.asarray(steps), np.asarray(losses))
