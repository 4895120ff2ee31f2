"""``sample``: noise -> latents by the DiT's ODE -> images by the VQ-VAE."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffprune.config_checks import as_known
from diffprune.decode import load_images
from diffprune.device import pick_device
from diffprune.engines import Engine, explained, open_workers, swept
from diffprune.errors import BusyError, InputError
from diffprune.files import atomic_path
from diffprune.generation import PRECISIONS, Sampler, Solver, sample_key
from diffprune.local_workers import Advance, Task
from diffprune.locks import shard_claim
from diffprune.outputs import PNG, check_output
from diffprune.packing import PackedSample, shard_paths, write_shard
from diffprune.plans import claim_folder
from diffprune.progress import progress
from diffprune.shards import index_each
from diffprune.sources.mnist import encode_png
from diffprune.storage import AnyPath, as_path, existing, stats

PREFIX = "samples"
MANIFEST = "sample.json"
GRID_IMAGES = 100


def sample(
    checkpoint: str | os.PathLike,
    vqvae: str | os.PathLike,
    out: str | os.PathLike | None,
    *,
    count: int,
    steps: int | None = None,
    method: Literal["euler", "midpoint", "heun", "dopri5"] = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    coarse: str | os.PathLike | None = None,
    coarse_until: float | None = None,
    labels: str | Sequence[int] = "uniform",
    seed: int = 0,
    batch_size: int = 256,
    shard_size: int = 1000,
    weights: Literal["ema", "model"] = "ema",
    precision: Literal["float32", "bf16"] = "float32",
    grid: str | os.PathLike | None = None,
    device: str = "auto",
    workers: int = 1,
    part: str | None = None,
    ray: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Generate ``count`` images into shards ``<out>/samples-000000.tar``, ..., and the first ones into a grid PNG.

    Sample i has the key ``sample-<i, 8 digits>``, noise that depends on the seed and this key alone, and label i of
    ``labels``. So models sampled with one seed can be compared image by image, and batch and shard size change an
    image by rounding at most. A run that was stopped goes on with the shards that are missing. No batch goes over the
    end of a shard: whoever draws it, it has the same bytes.

    Args:
        checkpoint: of a DiT, or a run folder.
        vqvae: the VQ-VAE whose latents it was trained on.
        out: folder for the shards (``png``, ``cls`` and ``json`` with ``uid``), or None for a grid alone.
        steps: of "euler", "midpoint" and "heun", 50 by default; the last two evaluate the model twice per step.
        method: of the ODE solver, see ``flow.sample_ode``; "dopri5" chooses the steps of each image by itself, see
            ``ode.solve_adaptive``.
        rtol, atol: the tolerances of "dopri5", 1e-3 and 1e-6 by default.
        guidance: classifier-free guidance scale, see ``flow.guided_velocity``; 1 is none.
        guidance_channels: guide only the first so many channels of the latent, as the published DiT's sampler did with
            3; None guides all.
        coarse, coarse_until: a second, smaller DiT of the same latents and labels that goes from noise (t=0) to
            t=coarse_until, after which ``checkpoint``'s takes over. ``steps`` are shared out by the length of the two
            parts, at least one each; where ``coarse_until·steps`` is a whole number, these are the steps of one model.
        labels: "uniform" (classes in turn), "null" (no class, and no ``cls``), or class numbers, in turn, as a
            sequence or with commas. An unconditional model takes "uniform" or "null", which then mean the same.
        weights: "ema" or "model".
        precision: of the models: "bf16" runs them under autocast. Latents, the solver and the VQ-VAE stay in float32.
        grid: PNG file of the first 100 images; with labels "uniform" and at most 20 classes, a column per class.
        workers, part, ray: who draws the shards, as for ``encode``, see docs/scale.md. The part that finds all shards
            drawn at its end writes the grid.

    Returns: out, shards (paths), count, written and present (shards), grid (None of a part that did not write it),
        labels (count per label), model_evaluations (rows through the DiT that is ``checkpoint``'s), coarse_evaluations
        (through ``coarse``'s; for "dopri5" both are counted while sampling, and None in a dry run), checkpoint, and the
        arguments. Shards and evaluations are those of the part; count and labels those of all.

    Raises:
        InputError: a checkpoint trained on another VQ-VAE's latents, an argument that does not fit the model, or a
            shard that is there but damaged.
        ResumeError: ``out`` was begun with other settings.
        BusyError: another run is at work in ``out``.
        WorkerError, DiskFullError: as of other stages; finished shards are kept.
        DiffpruneError: an image that is not finite; it names the key.
    """
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if out is None and grid is None:
        raise InputError("expected a folder for shards (out), a PNG file (grid), or both; got neither")
    if out is None and (workers > 1 or part or ray):
        raise InputError("workers, part and ray share out shards: give a folder for them (out), not a grid alone")
    paths = [] if out is None else shard_paths(out, PREFIX, count, shard_size)
    if grid is not None:
        check_output(grid, PNG, [checkpoint, vqvae, coarse, *paths])
    precision = as_known(precision, PRECISIONS)
    solver = Solver.checked(method, steps, rtol, atol)
    models = (checkpoint, vqvae, coarse, coarse_until, weights)
    how = (solver, guidance, guidance_channels, labels, seed, precision)
    recipe = partial(_drawer, models, how, batch_size, device=device)
    with open_workers(recipe, workers, part=part, ray=ray) as engine:
        # Where others draw, this process only says what: it takes no GPU's memory.
        drawer = engine.ranks.together(lambda: recipe(device="cpu") if engine.workers else recipe())
        sampler, ours = drawer.sampler, engine.whole(paths)
        settings = {"count": count, **asdict(solver), "guidance": guidance, "seed": seed}
        settings |= {"guidance_channels": guidance_channels, "coarse_until": coarse_until}
        settings["precision"] = None if precision == "float32" else precision  # as before there was a choice
        plan = {**settings, **sampler.identity(), "shard_size": shard_size, "image_size": sampler.vqvae.image_size}
        beside = [Path(grid).name] if grid is not None and out is not None and Path(grid).parent == Path(out) else []
        wanted = {path: range(count)[i * shard_size :][:shard_size] for i, path in enumerate(paths)}
        first = range(min(count, GRID_IMAGES) if grid is not None else 0)
        with nullcontext(set()) if out is None else _drawn(drawer, engine, wanted, plan, beside, dry_run) as missing:
            report = {
                **settings,
                "out": None if out is None else str(out),
                "shards": [str(path) for path in ours],
                "written": len(missing),
                "present": len(ours) - len(missing),
                "grid": None if grid is None else str(grid),
                "labels": sampler.label_counts(count),
                **sampler.planned_evaluations(
                    len(first) if out is None else sum(len(wanted[path]) for path in missing)
                ),
                "checkpoint": sampler.dit_state["path"],
                "coarse": sampler.coarse_state and sampler.coarse_state["path"],
                "weights": weights,
            }
            if dry_run:
                return {**report, "dry_run": True}
            if engine.part and len(existing(paths)) < len(paths):
                report["grid"] = None  # another part will write it
            elif grid is not None and not engine.ranks.rank:
                columns = grid_columns(len(first), sampler.dit.num_classes if labels == "uniform" else 0)
                # Where another part has come to its end too, and is writing it: the same bytes.
                with suppress(BusyError), shard_claim(as_path(out), "grid") if engine.part else nullcontext():
                    write_grid(grid, drawer.alone(first) if out is None else _read(wanted, first, sampler), columns)
        return {**report, **{name: engine.ranks.count(rows) for name, rows in sampler.evaluations.items()}}


def grid_columns(count: int, classes: int) -> int:
    """One for each class, if these come in turn and are 1 to 20; else as many as rows."""
    return classes if 0 < classes <= 20 else math.ceil(math.sqrt(count))


def write_grid(path: str | os.PathLike, images: np.ndarray, columns: int) -> None:
    """Write uint8 [N, C, H, W] as one PNG, row by row, with a margin of 2 gray pixels."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 64, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(_pixels(canvas.transpose(2, 0, 1))))


@contextmanager
def _drawn(
    drawer: _Drawer,
    engine: Engine,
    wanted: dict[AnyPath, range],
    plan: dict[str, Any],
    beside: Sequence[str],
    dry_run: bool,
) -> Iterator[set[AnyPath]]:
    """Hold the folder with this run's shards, all there; yields those that were missing."""
    paths = list(wanted)
    out, ours = paths[0].parent, engine.whole(paths)

    def claim() -> set[AnyPath]:
        """Those that are missing; the others are looked at."""
        if engine.ranks.rank:
            return set()
        with shard_claim(out, MANIFEST) if engine.part and not dry_run else nullcontext():
            missing = claim_folder(out, MANIFEST, plan, paths, extra=beside, dry_run=dry_run)
        _check_shards({path: wanted[path] for path in ours if path not in missing})
        return missing.intersection(ours)

    if dry_run:
        yield engine.ranks.together(claim)
        return
    with explained(out, ours), engine.lock(out) as lock:
        found = engine.ranks.together(claim)
        with swept(out, engine, [path.stem for path in ours]):
            is_missing = engine.ranks.first([path in found for path in ours])
            missing = {path for path, told in zip(ours, is_missing, strict=True) if told}
            if engine.workers and lock is not None:
                engine.workers.hold(lock)
            mine = [path for path in engine.mine(paths) if path in missing]
            tasks = [Task(path.stem, "write", (path, wanted[path], engine.part is not None)) for path in mine]
            with progress("sample", total=sum(len(wanted[path]) for path in mine), unit="images") as bar:
                if engine.workers:
                    for _, rows in engine.workers.map(tasks, bar.advance):
                        drawer.sampler.add_evaluations(rows)
                else:
                    for task in tasks:
                        drawer.write(*task.args, bar.advance)
            engine.ranks.wait()
        yield missing


def _check_shards(shards: Mapping[AnyPath, range]) -> None:
    """InputError if one does not hold just the samples that it should; those that are missing are left out."""
    for index in index_each(stats(shards)):
        keys = [sample_key(number) for number in shards[index.path]]
        if index.damage:
            damage = f"at byte {index.damage[0].offset:,}: {index.damage[0].message}"
        elif index.samples.keys != keys:
            damage = f"{len(index.samples):,} samples that are not those"
        else:
            continue
        raise InputError(
            f"{index.path}: expected the samples {keys[0]} to {keys[-1]}, found {damage}; "
            "delete it and run the same command again"
        )


def _read(wanted: Mapping[AnyPath, range], numbers: range, sampler: Sampler) -> np.ndarray:
    """The images with these numbers, out of their shards: uint8 [N, C, H, W]."""
    shards = [path for path, held in wanted.items() if held.start < numbers.stop]
    _check_shards({path: wanted[path] for path in shards})
    keys = [sample_key(number) for number in numbers]
    table, images = load_images(shards, size=None, channels=sampler.vqvae.in_channels, keys=keys)
    for key, error in zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True):
        if error is not None:
            raise InputError(
                f"{shards[0].parent}: key {key!r}: {error}; delete its shard and run the same command again"
            )
    return images


def _drawer(models: tuple[Any, ...], how: tuple[Any, ...], batch_size: int, *, device: str) -> _Drawer:
    """``models``: what ``Sampler.load`` takes before the device; ``how``: what ``Sampler.set_up`` does."""
    sampler = Sampler.load(*models, pick_device(device))
    sampler.set_up(*how)
    return _Drawer(sampler, batch_size)


@dataclass(frozen=True)
class _Drawer:
    """Models in memory, and images of them."""

    sampler: Sampler
    batch_size: int

    def write(self, path: AnyPath, numbers: range, claim: bool, advance: Advance) -> dict[str, int]:
        """Draw a shard, unless it is there; returns the rows that went through each DiT. ``claim``: others may too."""
        before = dict(self.sampler.evaluations)
        with shard_claim(path.parent, path.stem) if claim else nullcontext():
            if not path.is_file():  # by a process that died right after it, or by another run
                images = self.images(numbers, advance)
                write_shard(path, (_packed(self.sampler, number, image) for number, image in images))
        return {name: rows - before[name] for name, rows in self.sampler.evaluations.items()}

    def alone(self, numbers: range) -> np.ndarray:
        """For a grid alone: uint8 [N, C, H, W]."""
        with progress("sample", total=len(numbers), unit="images") as bar:
            return np.stack([image for _, image in self.images(numbers, bar.advance)])

    def images(self, numbers: range, advance: Advance) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            yield from zip(batch, self.sampler.generate(batch), strict=True)
            advance(len(batch))


def _packed(sampler: Sampler, index: int, image: np.ndarray) -> PackedSample:
    """One generated image as a sample of a shard."""
    key, data = sample_key(index), encode_png(_pixels(image))
    members = {"png": data}
    label = sampler.label(index)
    if label is not None and label != sampler.null_label:
        members["cls"] = str(label).encode()
    uid = hashlib.blake2b(key.encode() + b"\0" + data, digest_size=16).hexdigest()
    members["json"] = json.dumps({"uid": uid}).encode()
    return PackedSample(key, members)


def _pixels(image: np.ndarray) -> np.ndarray:
    """[C, H, W] -> what ``encode_png`` takes."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
