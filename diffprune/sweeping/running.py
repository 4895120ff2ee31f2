"""``sweep``: the shared stages once, then the cells, one after the other or several at once; then the page."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffprune._version import __version__
from diffprune.errors import DiffpruneError, InputError, ResumeError
from diffprune.files import is_begun, read_json, write_json
from diffprune.locks import folder_lock
from diffprune.progress import progress, quiet
from diffprune.shards import find_shards, index_found
from diffprune.storage import AnyPath, Stat, local_path
from diffprune.sweeping.cells import Cell, find_cell, list_cells, read_result, run_cell
from diffprune.sweeping.estimates import estimate
from diffprune.sweeping.results import write_results
from diffprune.sweeping.settings import SweepConfig, differences, load_sweep
from diffprune.sweeping.shared import Shared, prepare
from diffprune.tables import input_changes

SWEEP_FILE = "sweep.json"


def sweep(
    config: str | os.PathLike | SweepConfig,
    out: str | os.PathLike,
    *,
    cells: Sequence[str | int] | None = None,
    jobs: int = 1,
    device: str = "auto",
    shared_only: bool = False,
    listing: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare pruning methods: train a model on each selection, sample from it, measure; see ``settings``.

    Packing, VQ-VAE, latents, features, clusters, surrogate and scores are computed once into ``<out>/shared``. A cell
    (a method, a ratio, a seed) has a folder ``<out>/cells/<name>`` and is done when its ``result.json`` is there. What
    was stopped goes on where it was; methods, ratios and seeds may be added to the config later. Cells may be run in
    any order and on several machines that share ``out``: their results are the same.

    At the end (with ``cells``: when no cell is left) ``out`` gets ``results.parquet`` (a row per cell),
    ``summary.parquet`` and ``results.md`` (means and sample standard deviations over seeds, and differences to random
    selection at equal seeds), ``sweep.html``, and PNGs.

    Args:
        config: a TOML file, see ``configs/``.
        cells: only these, by name or number (see ``listing``).
        jobs: cells at a time, each in a process of its own; with several GPUs they take them in turn.
        device: "auto", "cpu", "cuda" or "cuda:N".
        shared_only: compute what the cells share, and no cell.
        listing: only say which cells there are, and which are done.
        dry_run: write nothing; measure a training step and a step of sampling on this device and say how long a cell
            will take. See ``estimates.estimate``.

    Returns ``out``, ``cells`` (in all), ``done``, ``run`` (names, of this call), ``left`` (names), ``seconds``, and the
    paths of ``parquet``, ``page`` and ``table`` if they were written. With ``listing``, ``cells`` is a list of number,
    name, method, prune, seed and done.

    Raises:
        InputError: a config that cannot be used (it names the key; an unknown method lists the known ones).
        ResumeError: ``out`` holds a sweep with another config or over other shards, or files that are no sweep's.
        DiffpruneError: cells that failed, or a process that died; the others are done all the same.
    """
    settings = config if isinstance(config, SweepConfig) else load_sweep(config)
    if jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("sweep: one process trains a cell: start it without torchrun, with jobs or a cell per job")
    out, every = local_path(out, "a sweep's folder"), list_cells(settings)
    _check_folder(settings, out)
    chosen = every if cells is None else [find_cell(every, str(cell)) for cell in cells]
    done = {cell for cell in every if read_result(settings, cell, out) is not None}
    report: dict[str, Any] = {"out": str(out), "cells": len(every), "done": len(done)}
    if listing:
        rows = [
            {"number": i, "name": c.name, "method": c.method, "prune": c.prune, "seed": c.seed, "done": c in done}
            for i, c in enumerate(every)
        ]
        return {**report, "cells": rows}
    todo = [cell for cell in dict.fromkeys(chosen) if cell not in done]
    shards = _checked_shards(settings, out)
    if dry_run:
        return {**report, **estimate(settings, len(todo), jobs, device), "dry_run": True}
    write_json(out / SWEEP_FILE, {"version": __version__, "config": settings.identity(), **shards})
    begin = time.monotonic()
    with _threads(settings.sweep.threads):
        shared = Shared(settings, out / "shared")
        stages = prepare(shared, device)["stages"]
        if shared_only:
            return {**report, "stages": stages, "seconds": round(time.monotonic() - begin, 1)}
        failures = _run(settings, todo, out, jobs, device)
        left = [cell.name for cell in every if read_result(settings, cell, out) is None]
        ran = [cell.name for cell in todo if cell.name not in failures]
        report |= {"done": len(every) - len(left), "run": ran, "left": left}
        if len(left) < len(every) and (cells is None or not left):
            report |= write_results(settings, out)
    report["seconds"] = round(time.monotonic() - begin, 1)
    if failures:
        told = "; ".join(f"{name}: {error}" for name, error in list(failures.items())[:3])
        raise DiffpruneError(
            f"{out}: {len(failures)} of {len(todo)} cells failed ({told}); the others are done: run the same command "
            "again for the rest"
        )
    return report


def _run(settings: SweepConfig, todo: Sequence[Cell], out: Path, jobs: int, device: str) -> dict[str, str]:
    """Run cells; by name, why those that failed did. One alone shows the progress of its stages."""
    if len(todo) == 1:
        return _collect((todo[0], _attempt(settings, todo[0], out, device)) for _ in range(1))
    if not todo:
        return {}
    with progress("sweep", total=len(todo), unit="cells") as bar:

        def shown(outcomes: Iterator[tuple[Cell, str | None]]) -> Iterator[tuple[Cell, str | None]]:
            for cell, error in outcomes:
                bar.advance(note=f"{cell.name}{' failed' if error else ''}")
                yield cell, error

        if jobs == 1:
            return _collect(shown((cell, _quietly(settings, cell, out, device)) for cell in todo))
        return _collect(shown(_in_processes(settings, todo, out, jobs, device)))


def _in_processes(
    settings: SweepConfig, todo: Sequence[Cell], out: Path, jobs: int, device: str
) -> Iterator[tuple[Cell, str | None]]:
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads, and a GPU's state
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, context, _begin_worker, (numbers, settings.sweep.threads)) as pool:
        waiting = {pool.submit(_work, settings, cell, out, device): cell for cell in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise DiffpruneError(
                f"{out}: a process of the sweep was killed (was there too little memory for {jobs} at once?); what is "
                "finished is kept: run the same command again, perhaps with fewer jobs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_number = 0  # of this worker


def _begin_worker(numbers: Any, threads: int) -> None:
    global _number
    _number = numbers.get()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(settings: SweepConfig, cell: Cell, out: Path, device: str) -> str | None:
    return _quietly(settings, cell, out, worker_device(device, _number, torch.cuda.device_count()))


def worker_device(device: str, number: int, gpus: int) -> str:
    """The device of a worker: with several GPUs and no certain one asked for, they are taken in turn."""
    return f"cuda:{number % gpus}" if device in ("auto", "cuda") and gpus > 1 else device


def _quietly(settings: SweepConfig, cell: Cell, out: Path, device: str) -> str | None:
    with quiet():
        return _attempt(settings, cell, out, device)


def _attempt(settings: SweepConfig, cell: Cell, out: Path, device: str) -> str | None:
    """Run a cell that no other process is at; why it failed, or None."""
    try:
        with folder_lock(out / "cells" / cell.name):
            run_cell(settings, cell, out, device)
    except DiffpruneError as error:
        return str(error)
    return None


def _collect(outcomes: Iterator[tuple[Cell, str | None]]) -> dict[str, str]:
    return {cell.name: error for cell, error in outcomes if error is not None}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked_shards(settings: SweepConfig, out: Path) -> dict[str, dict[str, Any]]:
    """What identifies the config's shards, for ``sweep.json``; ResumeError where that knows other ones.

    Shards of the places, sizes and times (or versions) that ``sweep.json`` knows are not indexed again, cell by cell.
    """
    path = out / SWEEP_FILE
    found = read_json(path) if path.is_file() else {}
    here: dict[str, dict[str, Any]] = {}
    seen: dict[str, dict[str, Any]] = {}
    for name in ("shards", "held_out_shards"):
        if spec := getattr(settings.data, name):
            there, before, known = find_shards(spec), found.get(name), found.get("seen")
            seen[name] = {str(shard): _stamp(shard, about) for shard, about in there.items()}  # before they are indexed
            is_known = isinstance(known, dict) and known.get(name) == seen[name] and None not in seen[name].values()
            if is_known and isinstance(before, dict):
                here[name] = before
                continue
            here[name] = {index.path.name: index.identity for index in index_found(there)}
            if isinstance(before, dict) and (changes := input_changes(before, here[name])):
                raise ResumeError(
                    f"{out}: holds a sweep over other images: of data.{name} {changes}. Its cells can only be compared "
                    "over the same ones: bring these back, or give another --out"
                )
    return {**here, "seen": seen}


def _stamp(path: AnyPath, about: Stat) -> list[int | str] | None:
    """What changes with a file, JSON-able; None where storage says too little."""
    if isinstance(path, Path):
        return [about.st_size, path.stat().st_mtime_ns]
    return [about.st_size, about.version] if about.version else None


def _check_folder(settings: SweepConfig, out: Path) -> None:
    """ResumeError unless ``out`` is new, empty, or holds a sweep with the same config but for its grid."""
    path = out / SWEEP_FILE
    if not is_begun(out, SWEEP_FILE):
        return
    found = read_json(path)
    theirs = found.get("config") if isinstance(found, dict) else None
    if not isinstance(theirs, dict):
        raise ResumeError(f"{path}: expected the config of a sweep, found something else; give another folder")
    different = differences(theirs, settings.identity())
    if different:
        raise ResumeError(
            f"{out}: holds a sweep with another config ({'; '.join(different[:5])}); give another --out, or delete it. "
            "Only sweep.methods, prune, seeds, full and title may change"
        )
