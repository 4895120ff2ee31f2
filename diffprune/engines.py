"""A stage: a map over shards whose finished files are the ledger.

Every stage that walks over shards goes through ``run_stage``: it writes one table per shard, skips the shards that
are done, refuses to go on with the work of another run, and leaves nothing half-written behind.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffprune._version import __version__
from diffprune.errors import DiskFullError, ResumeError
from diffprune.files import TEMPORARY_PREFIX, fingerprint, write_json
from diffprune.progress import Progress, progress
from diffprune.storage import AnyPath, as_path, existing
from diffprune.tables import STAGE_FILE, read_stage, read_table, write_table


def run_stage(
    name: str,
    out: str | Path,
    config: dict[str, Any],
    shards: Sequence[str],
    work: Callable[[str, Progress], pa.Table],
    *,
    total: int,
    unit: str = "images",
    metadata: dict[str, Any] | None = None,
    prepare: Callable[[], None] | None = None,
    begin: Callable[[], None] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run ``work(stem, progress)`` for every shard that has no table in ``out`` yet, and write the tables.

    ``config`` is everything that the result depends on (inputs included, JSON-able): its fingerprint goes into the
    folder and into each table, and a folder with another one is refused with a ResumeError that names what differs.
    ``metadata`` is told to readers but not compared. ``prepare`` runs once, if any shard is to be done, before anything
    is written; ``begin`` runs after it, when ``out`` is there and this stage's, and may keep files of its own in it.
    ``work`` advances the progress itself; ``total`` counts ``unit``s over all shards. Returns counts: shards,
    shards_done_before, samples, failed, first_error, out. A full disk is a DiskFullError.
    """
    out = as_path(out)
    stage = {
        "stage": name,
        "version": __version__,
        "fingerprint": fingerprint(config),
        "config": config,
        "shards": list(shards),
        "metadata": metadata or {},
    }
    check_resume(out, stage)
    there = existing(out / f"{stem}.parquet" for stem in shards)
    todo = [stem for stem in shards if out / f"{stem}.parquet" not in there]
    plan = {"stage": name, "shards": len(shards), "shards_done_before": len(shards) - len(todo), "out": str(out)}
    if dry_run:
        return {**plan, "dry_run": True, f"{unit}_in_all": total}
    if todo and prepare:
        prepare()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(TEMPORARY_PREFIX + "*"):  # of a run that was killed
            leftover.unlink()
        if not (out / STAGE_FILE).is_file():
            write_json(out / STAGE_FILE, stage)
        if todo and begin:
            begin()
        if todo:
            with progress(name, total=total, unit=unit) as bar:
                done_rows = sum(_rows(out / f"{stem}.parquet") for stem in shards if stem not in set(todo))
                if done_rows:
                    bar.advance(min(done_rows, total))
                for stem in todo:
                    write_table(out / f"{stem}.parquet", work(stem, bar), stage)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        done = sum((out / f"{stem}.parquet").is_file() for stem in shards)
        raise DiskFullError(
            f"{out}: no space left on the disk ({error}). {done} of {len(shards)} shards are finished and kept; free "
            "some space and run the same command again"
        ) from error
    return {**plan, **count_rows(out, shards)}


def check_resume(out: AnyPath, stage: dict[str, Any]) -> None:
    """Raise ResumeError if ``out`` holds the work of another stage, config or data set."""
    if not (out / STAGE_FILE).is_file():
        if out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in out.iterdir()):
            raise ResumeError(f"{out}: holds other files; give an empty or new folder")
        return
    found = read_stage(out)
    if found.get("fingerprint") == stage["fingerprint"] and found.get("stage") == stage["stage"]:
        return
    differences = _differences(found.get("config") or {}, stage["config"])
    raise ResumeError(
        f"{out}: holds a run of `{found.get('stage')}` with another config, refusing to mix them. "
        f"Different: {'; '.join(differences[:5]) or 'the stage'}. Give another --out, or delete that folder"
    )


def count_rows(out: AnyPath, shards: Sequence[str]) -> dict[str, Any]:
    """How many samples the tables of a stage hold, how many failed, and the first failure."""
    samples, failed, first_error = 0, 0, None
    for stem in shards:
        table = read_table(out / f"{stem}.parquet", ["key", "status", "error"])
        bad = table.filter(pc.equal(table["status"], "failed"))
        samples, failed = samples + table.num_rows, failed + bad.num_rows
        if first_error is None and bad.num_rows:
            first_error = {"shard": stem, "key": bad["key"][0].as_py(), "error": bad["error"][0].as_py()}
    return {"samples": samples, "failed": failed, "first_error": first_error}


def _rows(path: AnyPath) -> int:
    return read_table(path, ["status"]).num_rows


def _differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key} was {_short(there)}, is now {_short(here)}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
