"""``sample``: noise -> latents by the DiT's ODE -> images by the VQ-VAE."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffprune.checkpoints import load_dit, load_vqvae
from diffprune.device import pick_device
from diffprune.draws import draw_noise
from diffprune.errors import DiffpruneError, InputError
from diffprune.files import atomic_path
from diffprune.flow import guided_velocity, sample_ode
from diffprune.models.dit import DiT
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
    steps: int = 50,
    method: Literal["euler", "heun"] = "euler",
    guidance: float = 1.0,
    labels: str | Sequence[int] = "uniform",
    seed: int = 0,
    batch_size: int = 256,
    shard_size: int = 1000,
    weights: Literal["ema", "model"] = "ema",
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
        steps, method: of the ODE solver, see ``flow.sample_ode``; "heun" evaluates the model twice per step.
        guidance: classifier-free guidance scale on all channels, see ``flow.guided_velocity``; 1 is none.
        labels: "uniform" (classes in turn), "null" (no class, and no ``cls``), or class numbers, in turn, as a
            sequence or with commas. An unconditional model takes "uniform" or "null", which then mean the same.
        weights: "ema" or "model".
        grid: PNG file of the first 100 images; with labels "uniform" and at most 20 classes, a column per class.

    Returns: out, shards (paths), count, written and present (shards), grid, labels (count per label),
        model_evaluations (rows through the DiT), checkpoint, and the arguments.

    Raises:
        InputError: a checkpoint trained on another VQ-VAE's latents, or an argument that does not fit the model.
        ResumeError: ``out`` was begun with other settings.
        DiffpruneError: an image that is not finite; it names the key.
    """
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if out is None and grid is None:
        raise InputError("expected a folder for shards (out), a PNG file (grid), or both; got neither")
    sampler = _Sampler(checkpoint, vqvae, weights, pick_device(device))
    sampler.set_up(steps, method, guidance, labels, seed)
    paths = [] if out is None else shard_paths(out, PREFIX, count, shard_size)
    ranges = [range(i * shard_size, min((i + 1) * shard_size, count)) for i in range(len(paths))]
    settings = {"count": count, "steps": steps, "method": method, "guidance": guidance, "seed": seed}
    missing = set()
    if out is not None:
        plan = {**settings, **sampler.identity(), "shard_size": shard_size}
        beside = [Path(grid).name] if grid is not None and Path(grid).parent == Path(out) else []
        missing = claim_folder(out, "sample.json", plan, paths, extra=beside, dry_run=dry_run)
    grid_count = min(count, GRID_IMAGES) if grid is not None else 0
    shards = [(path, indices) for path, indices in zip(paths, ranges, strict=True) if path in missing]
    todo = sum(len(indices) for _, indices in shards) + grid_count
    report = {
        **settings,
        "out": None if out is None else str(out),
        "shards": [str(path) for path in paths],
        "written": len(missing),
        "present": len(paths) - len(missing),
        "grid": None if grid is None else str(grid),
        "labels": sampler.label_counts(count),
        "model_evaluations": todo * sampler.evaluations_per_image(),
        "checkpoint": sampler.dit_state["path"],
        "weights": weights,
    }
    if dry_run:
        return {**report, "dry_run": True}

    with progress("sample", total=todo, unit="images") as bar:

        def images(indices: range) -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                yield from zip(batch, sampler.generate(batch), strict=True)
                bar.advance(len(batch))

        for path, indices in shards:
            write_shard(path, (sampler.packed(index, image) for index, image in images(indices)))
        if grid is not None:
            by_class = labels == "uniform" and 0 < sampler.dit.num_classes <= 20
            columns = sampler.dit.num_classes if by_class else math.ceil(math.sqrt(grid_count))
            write_grid(grid, np.stack([image for _, image in images(range(grid_count))]), columns)
    return report


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


class _Sampler:
    """A DiT and the VQ-VAE of its latents, and how to draw from them."""

    def __init__(self, checkpoint: str | Path, vqvae: str | Path, weights: str, device: torch.device) -> None:
        self.device = device
        self.dit, self.dit_state = load_dit(checkpoint, weights, device)
        self.vqvae, self.vqvae_state = load_vqvae(vqvae, device)
        trained_on = (self.dit_state.get("latents") or {}).get("model_sha256")
        if trained_on != self.vqvae_state["sha256"]:
            raise InputError(
                f"{self.dit_state['path']}: was trained on latents of the VQ-VAE with sha256 {trained_on}, but "
                f"{self.vqvae_state['path']} has {self.vqvae_state['sha256']}; give the one that encoded its latents"
            )

    def set_up(self, steps: int, method: str, guidance: float, labels: str | Sequence[int], seed: int) -> None:
        """Check and keep the arguments of ``sample``."""
        if method not in ("euler", "heun"):
            raise InputError(f"method: expected euler or heun, got {method!r}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed: expected a number from 0 to 2**32 - 1, got {seed}")
        if not math.isfinite(guidance):
            raise InputError(f"guidance: expected a finite number, got {guidance}")
        self.steps, self.method, self.guidance, self.seed = steps, method, guidance, seed
        self.null_label = self.dit.null_label
        self.sequence = _label_sequence(labels, self.dit)
        if guidance != 1 and self.null_label is None:
            raise InputError(f"guidance: expected 1 for a model without a null label, got {guidance}")
        if guidance != 1 and labels == "null":
            raise InputError(f"guidance: expected 1 with labels null, got {guidance}")

    def identity(self) -> dict[str, Any]:
        """What the images depend on beside the settings."""
        models = {"model_sha256": self.dit_state["sha256"], "vqvae_sha256": self.vqvae_state["sha256"]}
        return {**models, "labels": self.sequence}

    def evaluations_per_image(self) -> int:
        """Rows through the DiT."""
        return self.steps * (2 if self.method == "heun" else 1) * (2 if self.guidance != 1 else 1)

    def generate(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices: uint8 [B, C, H, W]."""
        keys = [_key(index) for index in indices]
        size = self.dit.input_size
        x0 = draw_noise(self.seed, keys, 0, (self.dit.in_channels, size, size), self.device)
        labels = [self._label(index) for index in indices]
        y = torch.tensor(labels, device=self.device) if self.sequence else None
        with torch.inference_mode():
            latents = sample_ode(
                lambda x, t: guided_velocity(self.dit, x, t, y, self.guidance, self.null_label),
                x0,
                self.steps,
                self.method,
            )
            finite = latents.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                bad = [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
                raise DiffpruneError(
                    f"{self.dit_state['path']}: {len(bad)} of {len(keys)} generated latents are not finite, key "
                    f"{bad[0]!r} first; use a checkpoint from before the training diverged, or less guidance"
                )
            images = self.vqvae.decode(latents)
        return ((images + 1) * 127.5).round().to(torch.uint8).cpu().numpy()

    def packed(self, index: int, image: np.ndarray) -> PackedSample:
        """One generated image as a sample of a shard."""
        key, data = _key(index), encode_png(_pixels(image))
        members = {"png": data}
        label = self._label(index)
        if label is not None and label != self.null_label:
            members["cls"] = str(label).encode()
        uid = hashlib.blake2b(key.encode() + b"\0" + data, digest_size=16).hexdigest()
        members["json"] = json.dumps({"uid": uid}).encode()
        return PackedSample(key, members)

    def label_counts(self, count: int) -> dict[str, int]:
        """How many of ``count`` samples get each label."""
        labels = [self._label(index) for index in range(count)] if self.sequence else []
        counts = sorted(Counter(labels).items())
        return {"null" if label == self.null_label else str(label): number for label, number in counts}

    def _label(self, index: int) -> int | None:
        return self.sequence[index % len(self.sequence)] if self.sequence else None


def _label_sequence(labels: str | Sequence[int], dit: DiT) -> list[int]:
    """The labels that samples take in turn; empty for an unconditional model."""
    if not dit.num_classes:
        if labels in ("uniform", "null"):
            return []
        raise InputError(f"labels: the model is unconditional: expected uniform or null, got {labels!r}")
    if labels == "uniform":
        return list(range(dit.num_classes))
    if labels == "null":
        if dit.null_label is None:
            raise InputError("labels: the model was trained without a null label (class_dropout_prob 0)")
        return [dit.null_label]
    try:
        chosen = [int(label) for label in (labels.split(",") if isinstance(labels, str) else labels)]
    except (TypeError, ValueError):
        raise InputError(f"labels: expected uniform, null, or class numbers such as 0,3,7, got {labels!r}") from None
    wrong = [label for label in chosen if not 0 <= label < dit.num_classes]
    if wrong or not chosen:
        found = wrong[0] if wrong else "none"
        raise InputError(f"labels: expected numbers from 0 to {dit.num_classes - 1}, got {found}")
    return chosen


def _key(index: int) -> str:
    return f"sample-{index:08d}"


def _pixels(image: np.ndarray) -> np.ndarray:
    """[C, H, W] -> what ``encode_png`` takes."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
