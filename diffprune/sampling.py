"""``sample``: noise -> latents by the DiT's ODE -> images by the VQ-VAE."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffprune.config_checks import as_known
from diffprune.device import pick_device
from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.generation import PRECISIONS, Sampler, Solver, sample_key
from diffprune.outputs import PNG, check_output
from diffprune.packing import PackedSample, shard_paths, write_shard
from diffprune.plans import claim_folder
from diffprune.progress import progress
from diffprune.sources.mnist import encode_png

PREFIX = "samples"
GRID_IMAGES = 100


def sample(
    checkpoint: str | Path,
    vqvae: str | Path,
    out: str | Path | None,
    *,
    count: int,
    steps: int | None = None,
    method: Literal["euler", "midpoint", "heun", "dopri5"] = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    coarse: str | Path | None = None,
    coarse_until: float | None = None,
    labels: str | Sequence[int] = "uniform",
    seed: int = 0,
    batch_size: int = 256,
    shard_size: int = 1000,
    weights: Literal["ema", "model"] = "ema",
    precision: Literal["float32", "bf16"] = "float32",
    grid: str | Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Generate ``count`` images into shards ``<out>/samples-000000.tar``, ..., and the first ones into a grid PNG.

    Sample i has the key ``sample-<i, 8 digits>``, noise that depends on the seed and this key alone, and label i of
    ``labels``. So models sampled with one seed can be compared image by image, and batch and shard size change an
    image by rounding at most. A run that was stopped goes on at the first shard that is missing.

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

    Returns: out, shards (paths), count, written and present (shards), grid, labels (count per label),
        model_evaluations (rows through the DiT that is ``checkpoint``'s), coarse_evaluations (through ``coarse``'s; for
        "dopri5" both are counted while sampling, and None in a dry run), checkpoint, and the arguments.

    Raises:
        InputError: a checkpoint trained on another VQ-VAE's latents, or an argument that does not fit the model.
        ResumeError: ``out`` was begun with other settings.
        DiffpruneError: an image that is not finite; it names the key.
    """
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if out is None and grid is None:
        raise InputError("expected a folder for shards (out), a PNG file (grid), or both; got neither")
    paths = [] if out is None else shard_paths(out, PREFIX, count, shard_size)
    if grid is not None:
        check_output(grid, PNG, [checkpoint, vqvae, coarse, *paths])
    precision = as_known(precision, PRECISIONS)
    solver = Solver.checked(method, steps, rtol, atol)
    sampler = Sampler.load(checkpoint, vqvae, coarse, coarse_until, weights, pick_device(device))
    sampler.set_up(solver, guidance, guidance_channels, labels, seed, precision)
    ranges = [range(i * shard_size, min((i + 1) * shard_size, count)) for i in range(len(paths))]
    settings = {"count": count, **asdict(solver), "guidance": guidance, "seed": seed}
    settings |= {"guidance_channels": guidance_channels, "coarse_until": coarse_until}
    settings["precision"] = None if precision == "float32" else precision  # as before there was a choice
    missing = set()
    if out is not None:
        plan = {**settings, **sampler.identity(), "shard_size": shard_size, "image_size": sampler.vqvae.image_size}
        beside = [Path(grid).name] if grid is not None and Path(grid).parent == Path(out) else []
        missing = claim_folder(out, "sample.json", plan, paths, extra=beside, dry_run=dry_run)
    grid_count = min(count, GRID_IMAGES) if grid is not None else 0
    shards = [(path, indices) for path, indices in zip(paths, ranges, strict=True) if path in missing]
    drawn = {index for _, indices in shards for index in indices}
    rest = [index for index in range(grid_count) if index not in drawn]  # of shards that were there before, or of none
    todo = len(drawn) + len(rest)
    report = {
        **settings,
        "out": None if out is None else str(out),
        "shards": [str(path) for path in paths],
        "written": len(missing),
        "present": len(paths) - len(missing),
        "grid": None if grid is None else str(grid),
        "labels": sampler.label_counts(count),
        **sampler.planned_evaluations(todo),
        "checkpoint": sampler.dit_state["path"],
        "coarse": sampler.coarse_state and sampler.coarse_state["path"],
        "weights": weights,
    }
    if dry_run:
        return {**report, "dry_run": True}

    shown: dict[int, np.ndarray] = {}
    with progress("sample", total=todo, unit="images") as bar:

        def images(indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                for index, image in zip(batch, sampler.generate(batch), strict=True):
                    if index < grid_count:
                        shown[index] = image.copy()  # not the whole batch
                    yield index, image
                bar.advance(len(batch))

        for path, indices in shards:
            write_shard(path, (_packed(sampler, index, image) for index, image in images(indices)))
        if grid is not None:
            columns = grid_columns(grid_count, sampler.dit.num_classes if labels == "uniform" else 0)
            deque(images(rest), maxlen=0)
            write_grid(grid, np.stack([shown[index] for index in range(grid_count)]), columns)
    return {**report, **sampler.evaluations}


def grid_columns(count: int, classes: int) -> int:
    """One for each class, if these come in turn and are 1 to 20; else as many as rows."""
    return classes if 0 < classes <= 20 else math.ceil(math.sqrt(count))


def write_grid(path: str | Path, images: np.ndarray, columns: int) -> None:
    """Write uint8 [N, C, H, W] as one PNG, row by row, with a margin of 2 gray pixels."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 64, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(_pixels(canvas.transpose(2, 0, 1))))


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
