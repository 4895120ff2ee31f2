"""``train_vqvae`` and ``train_dit``: what is learned from what. How a run goes is in ``training_loop``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.arrays import ArrayFolder
from diffprune.config import DitConfig, DitRun, VqvaeConfig, VqvaeRun
from diffprune.decode import load_images
from diffprune.device import pick_device
from diffprune.errors import DiffpruneError, InputError
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.models.dit import DiT
from diffprune.models.vqvae import VQVAE, VqvaeOutput
from diffprune.shards import ShardSpec
from diffprune.training_loop import Objective, run_training

LATENT_SCALE_IMAGES = 10_000


def train_vqvae(
    config: VqvaeRun,
    shards: ShardSpec,
    out: str | Path,
    *,
    kept: str | Path | None = None,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a VQ-VAE on the images of shards, or on those of a ``kept.parquet``.

    The loss is the mean squared error of the reconstruction plus ``commitment_weight`` times that of the latents to
    their codes. Images are decoded once and kept in memory as bytes (uint8). One that cannot be decoded is left out
    and counted. ``latent_scale`` is set at every checkpoint, from at most 10,000 images.

    ``out`` gets ``step_*`` folders (see ``checkpoints``) and ``log.jsonl``. A run that was stopped goes on from its
    last checkpoint and ends in the same bytes (on a CPU) as one that was not; ``resume=False`` refuses a folder that
    holds checkpoints.

    Returns: kind, out, images, failed, parameters, device, precision, steps, first_step, images_seen, epochs; and
    after training checkpoint, loss, and the last log line's metrics. With ``dry_run`` nothing is written.

    Raises:
        InputError: no usable image, or an argument that does not fit.
        ResumeError: ``out`` holds a run with another config, seed or data; it names what differs.
        DiffpruneError: a loss that is not finite; it names the step and the sample keys.
    """
    table, images = load_images(shards, size=config.model.image_size, channels=config.model.in_channels, kept=kept)
    usable = np.array([status == "ok" for status in table["status"].to_pylist()], dtype=bool)
    keys = [key for key, ok in zip(table["key"].to_pylist(), usable, strict=True) if ok]
    if not keys:
        raise InputError(f"{shards}: expected images to train on, found {table.num_rows} samples and none usable")
    images = images if usable.all() else images[usable]
    objective = _VqvaeObjective(config.model, config.train.seed, config.train.device, keys, images)
    report = run_training(objective, config, out, resume=resume, dry_run=dry_run)
    return {**report, "failed": int((~usable).sum())}


def train_dit(
    config: DitRun,
    latents: str | Path,
    out: str | Path,
    *,
    kept: str | Path | None = None,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a DiT by flow matching on a latents folder of ``encode``, or on the samples of a ``kept.parquet`` in it.

    Each step draws for each sample of its batch a time t, uniform in [0, 1), and noise x0, and takes the mean of
    ``‖v(xt, t, label) − (x1 − x0)‖²`` per element (arXiv 2401.08740, equations 2 and 5). A label is replaced by the
    null label with probability ``class_dropout_prob``. Latents are kept in memory in float32. A data set smaller
    than a batch is gone through more than once per step.

    What ``out`` holds, how a run is resumed, what is returned and raised: as ``train_vqvae``. InputError too where
    latents or labels do not fit the model.
    """
    folder = ArrayFolder(latents, kind="latents")
    missing = [name for name in ("model_sha256", "latent_scale") if name not in folder.metadata]
    if missing:
        raise InputError(f"{latents}: its metadata lacks {missing[0]}; make the latents again with `diffprune encode`")
    table, values = folder.load(kept)
    keys = table["key"].to_pylist()
    if not keys:
        raise InputError(f"{kept or latents}: expected samples to train on, found none")
    expected = (config.model.in_channels, config.model.input_size, config.model.input_size)
    if values.shape[1:] != expected:
        raise InputError(
            f"{latents}: expected latents {list(expected)} (model.in_channels, input_size, input_size), "
            f"found {list(values.shape[1:])}"
        )
    labels = _checked_labels(keys, table["label"].to_pylist(), config.model.num_classes, latents)
    source = {name: folder.metadata[name] for name in ("model_sha256", "latent_scale")}
    objective = _DitObjective(config.model, config.train.seed, config.train.device, keys, values, labels, source)
    return run_training(objective, config, out, resume=resume, dry_run=dry_run)


class _VqvaeObjective(Objective):
    """Reconstruct images through a codebook."""

    kind = "vqvae"
    latents = None

    def __init__(self, model: VqvaeConfig, seed: int, device: str, keys: Sequence[str], images: np.ndarray) -> None:
        self.device = pick_device(device)
        self.model = VQVAE(model, seed=seed).to(self.device)
        self.keys = keys
        self.images = torch.from_numpy(images)
        self.data = {"samples": len(keys), "sha256": _sha256(keys, images)}
        self.output: VqvaeOutput | None = None

    def losses(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        self.output = self.model(self._batch(rows))
        return self.output.reconstruction_error + self.model.config.commitment_weight * self.output.commitment_error

    def after_step(self, generator: torch.Generator) -> None:
        self.model.update_codebook(self.output.latents.detach(), self.output.codes, generator)

    def metrics(self) -> dict[str, float]:
        counts = torch.bincount(self.output.codes.flatten(), minlength=self.model.config.codebook_size).double()
        share = counts / counts.sum()
        return {
            "reconstruction_error": self.output.reconstruction_error.mean().item(),
            "commitment_error": self.output.commitment_error.mean().item(),
            "code_perplexity": torch.special.entr(share).sum().exp().item(),
        }

    @torch.no_grad()
    def before_checkpoint(self) -> None:
        """latent_scale = 1 / std of the latents' elements, over images evenly spread over the training set."""
        count = min(len(self.images), LATENT_SCALE_IMAGES)
        rows = torch.arange(count) * len(self.images) // count
        moments = torch.zeros(3, dtype=torch.float64)
        for part in rows.split(500):
            values = self.model.encoder(self._batch(part)).double()
            moments += torch.tensor([values.numel(), values.sum().item(), values.square().sum().item()])
        number, total, squares = moments.tolist()
        variance = squares / number - (total / number) ** 2
        if not variance > 0:
            raise DiffpruneError(f"the latents of all {count} images are equal (variance {variance}): nothing learned")
        self.model.latent_scale.fill_(variance**-0.5)

    def _batch(self, rows: Tensor) -> Tensor:
        return self.images[rows].to(self.device).float() / 127.5 - 1


class _DitObjective(Objective):
    """Predict the velocity of latents on the linear path."""

    kind = "dit"

    def __init__(
        self,
        model: DitConfig,
        seed: int,
        device: str,
        keys: Sequence[str],
        values: np.ndarray,
        labels: Tensor | None,
        source: dict[str, Any],
    ) -> None:
        self.device = pick_device(device)
        self.model = DiT(**asdict(model), seed=seed).to(self.device)
        self.keys = keys
        self.values, self.labels = torch.from_numpy(values), labels
        self.latents = source
        parts = [values] if labels is None else [values, labels.numpy()]
        self.data = {"samples": len(keys), "sha256": _sha256(keys, *parts)}

    def losses(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        x1 = self.values[rows]
        t = torch.rand(len(rows), generator=generator)
        x0 = torch.randn(x1.shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < self.model.config.class_dropout_prob
        labels = None
        if self.labels is not None:
            labels = torch.where(dropped, self.model.num_classes, self.labels[rows]).to(self.device)
        x1, x0, t = x1.to(self.device), x0.to(self.device), t.to(self.device)
        velocity = self.model(interpolate(x1, x0, t), t, labels)
        return velocity_loss(velocity.float(), velocity_target(x1, x0))


def _checked_labels(keys: list[str], labels: list[int | None], num_classes: int, where: str | Path) -> Tensor | None:
    """[N] int64; None for an unconditional model."""
    if not num_classes:
        return None
    for key, label in zip(keys, labels, strict=True):
        if label is None or not 0 <= label < num_classes:
            found = "no label" if label is None else f"label {label}"
            raise InputError(
                f"{where}: key {key!r}: expected a label from 0 to {num_classes - 1}, found {found}; "
                "set model.num_classes (0 trains without labels)"
            )
    return torch.tensor(labels, dtype=torch.int64)


def _sha256(keys: Sequence[str], *arrays: np.ndarray) -> str:
    """Of the keys in order and of the arrays' bytes."""
    digest = hashlib.sha256("\0".join(keys).encode())
    for array in arrays:
        digest.update(str((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
