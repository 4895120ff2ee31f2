"""``train_vqvae`` and ``train_dit``: what is learned from what. How a run goes is in ``training_loop``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from diffprune.arrays import ArrayFolder
from diffprune.autoencoder_objective import AutoencoderObjective
from diffprune.checkpoints import load_start
from diffprune.config import DitRun, TrainConfig, VqvaeRun
from diffprune.decode import MAX_PIXELS
from diffprune.errors import InputError
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.learner import Objective
from diffprune.models.dit import DiT
from diffprune.models.embedders import load_embedder
from diffprune.ranks import Ranks, training_ranks
from diffprune.shards import ShardSpec
from diffprune.tables import read_folder
from diffprune.training_images import training_images
from diffprune.training_loop import run_training
from diffprune.training_order import BalancedOrder


def train_vqvae(
    config: VqvaeRun,
    shards: ShardSpec,
    out: str | Path,
    *,
    kept: str | Path | None = None,
    frechet_encoder: str | None = None,
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a VQ-VAE, or a KL autoencoder, on the images of shards, or on those of a ``kept.parquet``.

    The loss of an image is the mean squared (or absolute) error of its reconstruction; plus, for a VQ-VAE,
    ``commitment_weight`` times the mean squared error of its latents to their codes, for a KL autoencoder ``kl_weight``
    times their divergence over the number of the image's elements; plus ``lpips_weight`` times LPIPS; plus, from step
    ``adversarial_start``, a discriminator's verdict, which has no part in the loss that is told (see ``Adversary``).

    Images are decoded once and kept in memory as bytes (uint8) if they fit into half of what is free; else they are
    decoded anew each time, for the same run. One that cannot be decoded is left out and counted. ``latent_scale`` is
    measured at every checkpoint, on at most 10,000 images. ``strict_decode`` and ``max_pixels``: see
    ``diffprune.decode.Decoding``. ``frechet_encoder``: see below, as ``encoder`` of ``reconstruct``.

    ``out`` gets ``step_*`` folders (see ``checkpoints``) and ``log.jsonl``. A run that was stopped goes on from its
    last checkpoint and ends in the same bytes (on a CPU, with as many processes and parts of a batch) as one that was
    not; ``resume=False`` refuses a folder that holds checkpoints.

    Under torchrun every process computes its share of each batch; draws are those of the whole batch, so the training
    curve is the same but for rounding, for any number of processes. A run may be resumed with another number.

    Returns: kind, out, images, failed, parameters, device, processes, precision, operations_per_image (of a training
    step, without LPIPS and the discriminator), steps, first_step, images_seen, epochs; and after training checkpoint,
    loss, the last log line's metrics, latent_scale, images_per_second and mfu (operations per second over what a large
    matrix product reached just before, on as many devices). Reconstruction_error, psnr, frechet_distance and
    frechet_features, codebook_use and code_perplexity or divergence are then those of ``measured_images`` training
    images, see ``ReconstructionMeasure.result``. With ``dry_run`` nothing is written.

    Raises:
        InputError: no usable image, LPIPS weights that are not there, or an argument that does not fit.
        ResumeError: ``out`` holds a run with another config, seed or data; it names what differs.
        DiffpruneError: a loss that is not finite, or exploded; it names the step and the sample keys, and
            ``<out>/stopped.json`` has the loss of each sample of the batch. The step did not reach the weights.
        DiskFullError: a checkpoint could not be written; the ones before it are whole.
    """
    ranks, device = training_ranks(config.train.device, config.train.batch_size)
    embedder = None if frechet_encoder is None else load_embedder(frechet_encoder, device)
    size, channels = config.model.image_size, config.model.in_channels
    options = {"kept": kept, "strict": strict_decode, "max_pixels": max_pixels, "ranks": ranks}
    images = training_images(shards, size=size, channels=channels, **options)
    objective = AutoencoderObjective(config, ranks, device, images, embedder)
    report = run_training(objective, config, out, resume=resume, dry_run=dry_run)
    return {**report, "failed": images.failed}


def train_dit(
    config: DitRun,
    latents: str | Path,
    out: str | Path,
    *,
    kept: str | Path | None = None,
    oversample_balanced: str | Path | None = None,
    start_from: str | Path | None = None,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a DiT by flow matching on a latents folder of ``encode``, or on the samples of a ``kept.parquet`` in it.

    Each step draws for each sample of its batch a time t, uniform in [0, 1) or as ``train.timesteps`` says, and noise
    x0, and takes the mean of ``‖v(xt, t, label) − (x1 − x0)‖²`` per element (arXiv 2401.08740, equations 2 and 5). A
    label is replaced by the null label with probability ``class_dropout_prob``. Latents are kept in memory in float16,
    as they are on disk. A data set smaller than a batch is gone through more than once per step.

    ``oversample_balanced``: "label", or a folder of `diffprune cluster`: each label or cluster is seen equally often
    (``BalancedOrder``). ``start_from``: initial weights: a checkpoint or run folder (its moving average), or a
    published DiT's or SiT's state dict, ``.pt`` or ``.safetensors``; see ``checkpoints.load_start``.

    What ``out`` holds, how a run is resumed, what is returned and raised: as ``train_vqvae``. InputError too where
    latents, labels, clusters or ``start_from`` do not fit the model.
    """
    folder = ArrayFolder(latents, kind="latents")
    missing = [name for name in ("model_sha256", "latent_scale") if name not in folder.metadata]
    if missing:
        raise InputError(f"{latents}: its metadata lacks {missing[0]}; make the latents again with `diffprune encode`")
    table, values = folder.load(kept, np.float16)
    keys = table["key"].to_pylist()
    if not keys:
        raise InputError(f"{kept or latents}: expected samples to train on, found none")
    expected = (config.model.in_channels, config.model.input_size, config.model.input_size)
    if values.shape[1:] != expected:
        raise InputError(
            f"{latents}: expected latents {list(expected)} (model.in_channels, input_size, input_size), "
            f"found {list(values.shape[1:])}"
        )
    twins = folder.load_twins(kept, np.float16) if config.train.flip else None
    if twins is not None and twins.shape != values.shape:
        raise InputError(f"{latents}: expected mirrored latents {list(expected)}, found {list(twins.shape[1:])}")
    labels = _checked_labels(keys, table["label"].to_pylist(), config.model.num_classes, latents)
    groups = None if oversample_balanced is None else _groups(oversample_balanced, table, latents)
    source = {name: folder.metadata[name] for name in ("model_sha256", "latent_scale")}
    start = None if start_from is None else load_start(start_from, config.model, source)
    ranks, device = training_ranks(config.train.device, config.train.batch_size)
    objective = DitObjective(config, ranks, device, keys, values, twins, labels, source)
    if groups is not None:
        objective.balance(groups, str(oversample_balanced))
    if start is not None:
        objective.start(*start)
    return run_training(objective, config, out, resume=resume, dry_run=dry_run)


class DitObjective(Objective):
    """Predict the velocity of latents on the linear path."""

    kind = "dit"

    def __init__(
        self,
        run: DitRun,
        ranks: Ranks,
        device: torch.device,
        keys: Sequence[str],
        values: np.ndarray,
        twins: np.ndarray | None,
        labels: Tensor | None,
        source: dict[str, Any],
    ) -> None:
        self.ranks, self.device, self.train = ranks, device, run.train
        self.model = DiT(**asdict(run.model), seed=run.train.seed).to(device)
        self.keys = keys
        self.values, self.labels = torch.from_numpy(values), labels
        self.twins = None if twins is None else torch.from_numpy(twins)
        self.latents = source
        self.order: BalancedOrder | None = None
        parts = [values] if labels is None else [values, labels.numpy()]
        if twins is not None:
            parts.append(twins)
        self.data = {"samples": len(keys), "sha256": _sha256(keys, *parts)}

    def balance(self, groups: Tensor, name: str) -> None:
        """See each of these groups [N] equally often."""
        self.order = BalancedOrder(groups, self.train.seed)
        self.data["balanced_by"] = "label" if name == "label" else "cluster"
        self.data["balanced_sha256"] = _sha256([], groups.numpy())

    def start(self, weights: dict[str, Tensor], sha256: str) -> None:
        """Begin with these weights."""
        self.model.load_state_dict(weights)
        self.data["start_sha256"] = sha256

    def rows(self, step: int, train: TrainConfig) -> Tensor:
        return super().rows(step, train) if self.order is None else self.order.batch(train.batch_size, step)

    def draw(self, rows: Tensor, share: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        count = len(rows)
        if self.train.timesteps == "lognormal":
            t = torch.randn(count, generator=generator).sigmoid()
        else:
            t = torch.rand(count, generator=generator)
        x0 = torch.randn((count, *self.values.shape[1:]), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.model.config.class_dropout_prob
        x1 = self.values[rows[share]]
        if self.twins is not None:
            mirrored = torch.rand(count, generator=generator)[share] < 0.5
            x1 = torch.where(mirrored[:, None, None, None], self.twins[rows[share]], x1)
        inputs = (x1.float(), x0[share], t[share])
        if self.labels is None:
            return inputs
        return (*inputs, torch.where(dropped, self.model.num_classes, self.labels[rows])[share])

    def losses(self, model: nn.Module, x1: Tensor, x0: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        velocity = model(interpolate(x1, x0, t), t, labels)
        return velocity_loss(velocity.float(), velocity_target(x1, x0))

    def forward_of_one(self) -> None:
        config = self.model.config
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        latent = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
        DiT(**asdict(config))(latent, torch.zeros(1), labels)


def _groups(by: str | Path, table: pa.Table, latents: str | Path) -> Tensor:
    """[N] int64: the label or the cluster of each row of ``table``."""
    if str(by) == "label":
        values, where = table["label"], latents
    else:
        clusters = read_folder(by, ["key", "cluster"])
        places = pc.index_in(table["key"], value_set=clusters["key"].combine_chunks())
        values, where = clusters["cluster"].combine_chunks().take(places.combine_chunks()), by
    if values.null_count:
        key = table["key"].filter(pc.is_null(values))[0].as_py()
        what = "label" if str(by) == "label" else "cluster"
        raise InputError(f"{where}: key {key!r}: expected a {what} to balance by, found none")
    return torch.tensor(values.to_pylist(), dtype=torch.int64)


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
    """Of the keys in order and of the arrays' bytes; float16 ones as if they were float32."""
    digest = hashlib.sha256("\0".join(keys).encode())
    for array in arrays:
        dtype = np.dtype(np.float32) if array.dtype == np.float16 else array.dtype
        digest.update(str((array.shape, dtype.str)).encode())
        for start in range(0, len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096], dtype).data)
    return digest.hexdigest()
