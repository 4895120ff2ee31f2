"""A stage: a map over shards whose finished files are the ledger.

Every stage that walks over shards goes through ``run_stage``: it writes one table per shard, skips the shards that
are done, refuses to go on with the work of another run, and leaves nothing half-written behind. The map runs in this
process, in processes of this machine (``local_workers``), on a Ray cluster (``ray_workers``), in several processes that
torchrun started (``rank_talk``), or in several runs of a part each; the files are the same.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from diffprune._version import __version__
from diffprune.errors import DiskFullError, InputError, ResumeError
from diffprune.failures import MAX_FAILURES, Streaks, Tally
from diffprune.files import TEMPORARY_PREFIX, fingerprint, is_begun, is_disk_full, write_json
from diffprune.local_workers import LocalWorkers, Task
from diffprune.locks import LOCK_FILE, folder_lock, is_lock, shard_claim
from diffprune.progress import Progress, progress
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.storage import AnyPath, RemotePath, as_path, existing
from diffprune.tables import (
    STAGE_FILE,
    how_other,
    input_changes,
    input_of,
    read_each,
    read_stage,
    read_table,
    reading_pool,
    table_metadata,
    write_table,
)


@dataclass(frozen=True)
class Made:
    """A shard's table, with more to say of it.

    ``counts``: which of its rows count where failures in a row are counted, if not all do. ``about``: for its metadata.
    """

    table: pa.Table
    counts: list[bool] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def no_failures(table: pa.Table) -> Made:
    """Of a stage in which nothing can fail: rows that failed in an earlier one do not stop it."""
    return Made(table, [status == "ok" for status in table["status"].to_pylist()])


Found: TypeAlias = "pa.Table | Made"

Work = Callable[[str, Progress], Found]

Shard = TypeVar("Shard", str, AnyPath)


class Workers(Protocol):
    """Processes that each have an object with a model: ``LocalWorkers`` is one kind."""

    count: int

    def hold(self, descriptor: int) -> None: ...

    def map(
        self, tasks: Sequence[Task], advance: Callable[[int], Any], window: int | None = None
    ) -> Iterator[tuple[Task, Any]]: ...


@dataclass(frozen=True)
class Engine:
    """How a stage's map over shards runs; by default by this process, in shard order.

    Args:
        workers: processes that do the shards instead, by tasks that call the method ``table`` of their objects.
        part: only the i-th of n parts of the shards, i from 1. Parts may run at once, in one folder.
        ranks: the processes of this run that torchrun started: each does a share, the first has the folder's lock.
        max_failures: stop after so many failures in a row; 0: never.
    """

    workers: Workers | None = None
    part: tuple[int, int] | None = None
    ranks: RankTalk = ALONE
    max_failures: int = MAX_FAILURES

    def whole(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards of this run: all, or those of its part."""
        i, n = self.part or (1, 1)
        return list(shards[(i - 1) * len(shards) // n : i * len(shards) // n])

    def mine(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards that this process, or its workers, have to do: with several ranks, neighbours."""
        whole, rank, size = self.whole(shards), self.ranks.rank, self.ranks.size
        return whole[rank * len(whole) // size : (rank + 1) * len(whole) // size]

    def lock(self, out: AnyPath) -> AbstractContextManager[int | None]:
        """Of the folder; the other ranks of a run leave it to the first."""
        if self.ranks.rank:
            return nullcontext()
        return folder_lock(out, shared=self.part is not None)


@dataclass(frozen=True)
class TableWriter:
    """Writes the table of a shard, in whatever process: once, unless too many of its samples failed."""

    out: AnyPath
    about: dict[str, Any]  # in every table
    max_failures: int
    claim: bool  # other runs may be at work in the folder
    looks: bool = True  # whether a table came meanwhile, of a process that died after it, or of another run

    def about_input(self, identity: Mapping[str, Any]) -> TableWriter:
        """The same for tables of the shard that this identifies."""
        return replace(self, about={**self.about, "input": dict(identity)})

    def run(self, stem: str, work: Callable[[], Found], streaks: Streaks | None = None) -> Tally:
        """Do the shard, unless it is done."""
        path = self.out / f"{stem}.parquet"
        with shard_claim(self.out, stem) if self.claim else nullcontext():
            if self.looks and path.is_file():  # by a process that died after it, or by another run
                return Tally.of(read_table(path, ["key", "status", "error"]))
            if self.claim:
                sweep(self.out, stem)
            found = work()
            made = found if isinstance(found, Made) else Made(found)
            tally = Tally.of(made.table, made.counts)
            if self.looks and path.is_file():  # a copy of this shard came first
                return tally
            (streaks or Streaks([stem], self.max_failures)).add(stem, tally)
            write_table(path, made.table, {**self.about, **made.about})
            return tally


def run_stage(
    name: str,
    out: str | os.PathLike,
    config: dict[str, Any],
    shards: Sequence[str],
    work: Work,
    *,
    total: int,
    unit: str = "images",
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    whole: bool = False,
    at_once: bool = False,
    beside: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
    begin: Callable[[list[str]], object] | None = None,
    dry_run: bool = False,
    engine: Engine | None = None,
    task: Callable[[str, TableWriter], Task] | None = None,
    told: Callable[[str, Tally], Any] | None = None,
) -> dict[str, Any]:
    """Run ``work(stem, progress)`` for every shard that has no table in ``out`` yet, and write the tables.

    ``config`` is everything that the result depends on beside the shards, JSON-able: its fingerprint goes into the
    folder and into each table, and a folder with another one is refused with a ResumeError that names what differs.
    ``inputs``: what identifies each shard, of those that this process knows, see ``tables.input_of``; it goes into the
    shard's table, and a table of another shard of that name is refused. Other shards may join those of the folder,
    unless the result of each depends on all of them: ``whole``; other shards than before are refused then.
    ``metadata`` is told to readers but not compared. ``begin`` runs once, if any shard is to be done, when ``out`` is
    there and this stage's, and is told which this process is to do; it may keep files of its own in ``out``.
    ``work`` advances the progress itself; ``total`` counts ``unit``s to do here. ``at_once``: it has next to nothing to
    do and nothing to fail at, so that tables behind a URL are written several at a time, by threads. ``beside``: ends
    of the names of files that lie beside each table; a table without them is refused with a ResumeError. With the
    engine's ``workers`` they do ``task(stem, writer)`` instead, which has to end in ``writer.run``. ``told`` hears how
    each shard fared.
    Returns counts: shards, shards_done_before, samples, failed, first_error, out; of a part, where there is one.

    Raises: BusyError where another run is at work in ``out``; StoppedError after too many failures in a row;
    WorkerError; DiskFullError; InputError for a folder that cannot be written to. What is finished is kept.
    """
    out, engine, inputs = as_path(out), engine or Engine(), inputs or {}
    stage = {
        "stage": name,
        "version": __version__,
        "fingerprint": fingerprint(config),
        "config": config,
        "shards": list(shards),
        "metadata": metadata or {},
    }
    # A table says nothing of the other shards: their names in each would grow with the square of their number.
    about = {key: value for key, value in stage.items() if key != "shards"}
    if whole:
        stage["inputs"] = {stem: dict(inputs.get(stem, {})) for stem in shards}
    ours = engine.whole(shards)
    if dry_run:
        check_resume(out, stage)
        there = existing(out / f"{stem}.parquet" for stem in ours)
        _check_beside(out, there, beside)
        _done_rows(out, [stem for stem in ours if out / f"{stem}.parquet" in there], inputs)
        plan = {"stage": name, "shards": len(ours), "shards_done_before": len(there), "out": str(out)}
        return {**plan, "dry_run": True, f"{unit}_in_all": total}
    check_resume(out, stage)  # before a folder is made
    finished = [out / f"{stem}.parquet" for stem in ours]
    with explained(out, finished), engine.lock(out) as lock, swept(out, engine, ours):
        todo = _claimed(out, stage, ours, engine, beside)
        plan = {"stage": name, "shards": len(ours), "shards_done_before": len(ours) - len(todo), "out": str(out)}
        if engine.workers and lock is not None:
            engine.workers.hold(lock)
        mine = set(engine.mine(shards))
        done = sorted(mine.difference(todo))
        # Where nothing is to be done and nothing to compare, ``count_rows`` reads the tables soon enough.
        done_rows = engine.ranks.together(lambda: _done_rows(out, done, inputs) if todo or inputs else 0)
        if not engine.ranks.rank:
            with shard_claim(out, STAGE_FILE) if engine.part else nullcontext():
                _write_stage(out, stage, engine)
        engine.ranks.wait()
        if todo:
            wanted = [stem for stem in todo if stem in mine]
            if begin:
                begin(wanted)
            with progress(name, total=total // engine.ranks.size, unit=unit) as bar:
                if done_rows:
                    bar.advance(min(done_rows, total))
                at_once = at_once and isinstance(out, RemotePath) and not (engine.workers or engine.part)
                writer = TableWriter(out, about, engine.max_failures, claim=engine.part is not None, looks=not at_once)
                streaks = Streaks(shards, engine.max_failures)
                for stem, tally in _map(writer, wanted, inputs, streaks, work, bar, engine, task, at_once):
                    if told:
                        told(stem, tally)
        engine.ranks.wait()
    return {**plan, **count_rows(out, ours)}


def _write_stage(out: AnyPath, stage: dict[str, Any], engine: Engine) -> None:
    """Write the folder's stage.json, or put new shards into it."""
    if not (out / STAGE_FILE).is_file():
        write_json(out / STAGE_FILE, stage)
        return
    before, given = read_stage(out)["shards"], stage["shards"]
    if not set(before) < set(given):  # else as if all had been given at first
        there = existing(out / f"{stem}.parquet" for stem in set(before).difference(given))
        # One that was never done and is not given any more would be missed for ever; not so the one of another part.
        kept = [stem for stem in before if stem in given or engine.part or out / f"{stem}.parquet" in there]
        given = [*kept, *(stem for stem in given if stem not in before)]
    if given != before:
        write_json(out / STAGE_FILE, {**stage, "shards": given})


def _done_rows(out: AnyPath, done: list[str], inputs: Mapping[str, Mapping[str, Any]]) -> int:
    """How many rows the tables of these shards have together; ResumeError where one is of another shard."""
    total, changed = 0, []
    for stem, table in zip(done, read_each(out, done, ["status"]), strict=True):
        total += table.num_rows
        if stem in inputs and (other := how_other(input_of(table_metadata(table)), inputs[stem])):
            changed.append(f"{stem} (now {other})")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ResumeError(
            f"{out}: made of other shards than there are now: {', '.join(changed[:3])}{more}. Give another --out, or "
            "delete that folder; to do these shards alone again, delete their files in it"
        )
    return total


def _map(
    writer: TableWriter,
    todo: list[str],
    inputs: Mapping[str, Mapping[str, Any]],
    streaks: Streaks,
    work: Work,
    bar: Progress,
    engine: Engine,
    task: Callable[[str, TableWriter], Task] | None,
    at_once: bool,
) -> Iterator[tuple[str, Tally]]:
    writers = {stem: writer.about_input(inputs[stem]) if stem in inputs else writer for stem in todo}
    if engine.workers and task:
        for done, tally in engine.workers.map([task(stem, writers[stem]) for stem in todo], bar.advance):
            streaks.add(done.shard, tally)
            yield done.shard, tally
        return
    if at_once:
        with reading_pool(writer.out) as pool:
            yield from pool.map(lambda stem: (stem, writers[stem].run(stem, lambda: work(stem, bar))), todo)
        return
    for stem in todo:
        yield stem, writers[stem].run(stem, lambda stem=stem: work(stem, bar), streaks)


def check_resume(out: AnyPath, stage: dict[str, Any]) -> None:
    """Raise ResumeError if ``out`` holds the work of another stage or config, or of other shards that count."""
    if not is_begun(out, STAGE_FILE):
        return
    found = read_stage(out)
    if found.get("fingerprint") == stage["fingerprint"] and found.get("stage") == stage["stage"]:
        if "inputs" in stage:
            _check_inputs(out, found, stage["inputs"])
        return
    if "inputs" in found.get("config", {}) and "inputs" not in stage["config"]:
        raise ResumeError(
            f"{out}: made by a version of diffprune whose tables did not say which shards they were of: nothing can be "
            "added to it. Give another --out, or delete that folder"
        )
    differences = _differences(found.get("config") or {}, stage["config"])
    raise ResumeError(
        f"{out}: holds a run of `{found.get('stage')}` with another config, refusing to mix them. "
        f"Different: {'; '.join(differences[:5]) or 'the stage'}. Give another --out, or delete that folder"
    )


def _check_inputs(out: AnyPath, found: dict[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> None:
    there = found.get("inputs")
    there = there if isinstance(there, dict) else {stem: {} for stem in found["shards"]}
    if changes := input_changes(there, inputs):
        raise ResumeError(
            f"{out}: holds a run of `{found.get('stage')}` over other shards, and its result depends on all of them. "
            f"Different: {changes}. Give another --out, or delete that folder"
        )


def count_rows(out: AnyPath, shards: Sequence[str]) -> dict[str, Any]:
    """How many samples the tables of a stage hold, how many failed, and the first failure."""
    samples, failed, first_error = 0, 0, None
    for stem, table in zip(shards, read_each(out, shards, ["status"]), strict=True):
        bad = pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
        samples, failed = samples + table.num_rows, failed + bad
        if first_error is None and bad:
            table = read_table(out / f"{stem}.parquet", ["key", "status", "error"])
            table = table.filter(pc.equal(table["status"], "failed"))
            first_error = {"shard": stem, "key": table["key"][0].as_py(), "error": table["error"][0].as_py()}
    return {"samples": samples, "failed": failed, "first_error": first_error}


def parse_part(part: str | None) -> tuple[int, int] | None:
    """``"3/64"`` -> (3, 64): the third of 64 parts. Raises InputError for anything else."""
    if part is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"part: expected I/N with I from 1 to N, such as 3/64, got {part!r}")
    return int(found[1]), int(found[2])


@contextmanager
def open_workers(
    recipe: Callable[[], Any],
    workers: int,
    *,
    part: str | None = None,
    ray: str | None = None,
    max_failures: int = MAX_FAILURES,
) -> Iterator[Engine]:
    """The engine that these options of a verb mean; ``recipe`` makes what each worker process holds."""
    if max_failures < 0:
        raise InputError(f"max_failures: expected 0 or more, got {max_failures}")
    if workers < 1:
        raise InputError(f"workers: expected 1 or more, got {workers}")
    ranks, parts = RankTalk.of_torchrun(), parse_part(part)
    if ranks.size > 1 and (workers > 1 or parts or ray):
        raise InputError("torchrun's processes are the workers: give no --workers, --part or --ray with it")
    if ray and parts:
        raise InputError("ray: a cluster does all parts; give no --part with it")
    pool: AbstractContextManager[Workers | None] = nullcontext()
    if ray:
        from diffprune.ray_workers import RayWorkers

        pool = RayWorkers(recipe, ray, workers if workers > 1 else None)
    elif workers > 1:
        pool = LocalWorkers(recipe, workers)
    with pool as held:
        yield Engine(held, parts, ranks, max_failures)


def sweep(out: AnyPath, stem: str | None = None) -> None:
    """Remove what a killed run left half-written: of one shard, or of all, if nobody else is at work in ``out``.

    Of all: its locks on shards too, which nobody holds then.
    """
    for leftover in out.glob(f"{TEMPORARY_PREFIX}*"):
        if stem and (is_lock(leftover) or not leftover.name.startswith(f"{TEMPORARY_PREFIX}{stem}.")):
            continue
        if leftover.name != LOCK_FILE:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _claimed(out: AnyPath, stage: dict[str, Any], whole: list[str], engine: Engine, beside: Sequence[str]) -> list[str]:
    """The shards to do, the same list for all ranks."""
    if not engine.ranks.rank:
        check_resume(out, stage)  # again: before the lock was there, another run may have been
    there = existing(out / f"{stem}.parquet" for stem in whole)
    if not engine.ranks.rank:
        _check_beside(out, there, beside)
    finished = engine.ranks.first([out / f"{stem}.parquet" in there for stem in whole])
    return [stem for stem, is_done in zip(whole, finished, strict=True) if not is_done]


def _check_beside(out: AnyPath, tables: set[AnyPath], beside: Sequence[str]) -> None:
    """ResumeError if a table is there whose files are not, which were written before it."""
    wanted = {out / f"{table.stem}{end}": table for table in tables for end in beside}
    lost = sorted(wanted.keys() - existing(wanted))
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ResumeError(
            f"{lost[0]}: lost, but the table that says it is done is there{more}; delete {wanted[lost[0]].name} and "
            "run the same command again"
        )


@contextmanager
def swept(out: AnyPath, engine: Engine, whole: list[str]) -> Iterator[None]:
    """No leftovers before and after: of a run that was killed, and of this one's workers that were."""

    def sweep_ours() -> None:
        if engine.ranks.rank:
            return
        if engine.part is None:
            sweep(out)
        elif engine.workers:  # what this process has begun, it has removed; and each shard is swept before it is begun
            names = [path.name.removeprefix(TEMPORARY_PREFIX) for path in out.glob(f"{TEMPORARY_PREFIX}*")]
            for stem in whole if names else ():
                if any(name.startswith(f"{stem}.") for name in names):
                    with shard_claim(out, stem):
                        sweep(out, stem)

    sweep_ours()
    try:
        yield
    finally:
        sweep_ours()


@contextmanager
def explained(out: AnyPath, shards: Sequence[AnyPath]) -> Iterator[None]:
    """A full disk as a DiskFullError; ``shards``: the file of each that is there when it is finished."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        done = len(existing(shards))
        raise DiskFullError(
            f"{out}: no space left on the disk ({error}). {done} of {len(shards)} shards are finished and kept; free "
            "some space and run the same command again"
        ) from error


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
