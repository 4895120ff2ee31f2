"""``train_vqvae`` and ``train_dit``: what is learned from what. How a run goes is in ``training_loop``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune.arrays import ArrayFolder, what_made
from diffprune.autoencoder_objective import AutoencoderObjective
from diffprune.checkpoints import load_start
from diffprune.config import DitRun, VqvaeRun
from diffprune.decode import MAX_PIXELS
from diffprune.dit_objective import DitObjective
from diffprune.errors import InputError
from diffprune.live_latents import LiveLatents
from diffprune.models.embedders import load_embedder
from diffprune.ranks import training_ranks
from diffprune.requests import read_quota
from diffprune.run_pictures import SampleGrids
from diffprune.shards import ShardSpec
from diffprune.tables import read_folder
from diffprune.training_images import training_images
from diffprune.training_latents import training_latents
from diffprune.training_loop import run_training


def train_vqvae(
    config: VqvaeRun,
    shards: ShardSpec,
    out: str | os.PathLike,
    *,
    kept: str | os.PathLike | None = None,
    frechet_encoder: str | None = None,
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a VQ-VAE, or a KL autoencoder, on the images of shards, or on those of a ``kept.parquet``.

    ``config``: what ``config.load_config`` makes of a TOML file and overrides.

    The loss of an image is the mean squared (or absolute) error of its reconstruction; plus, for a VQ-VAE,
    ``commitment_weight`` times the mean squared error of its latents to their codes, for a KL autoencoder ``kl_weight``
    times their divergence over the number of the image's elements; plus ``lpips_weight`` times LPIPS; plus, from step
    ``adversarial_start``, a discriminator's verdict, which has no part in the loss that is told (see ``Adversary``).

    Images are decoded once and kept in memory as bytes (uint8) if they fit into half of what is free; else they are
    decoded anew each time, for the same run. One that cannot be decoded is left out and counted. ``latent_scale`` is
    measured at every checkpoint, on at most 10,000 images. ``strict_decode`` and ``max_pixels``: see
    ``diffprune.decode.Decoding``. ``frechet_encoder``: see below, as ``encoder`` of ``reconstruct``.

    ``out`` gets ``step_*`` folders (see ``checkpoints``), ``log.jsonl`` and ``loss.png``. A run that was stopped goes
    on from its last checkpoint and ends in the same bytes (on a CPU, with as many processes and parts of a batch) as
    one that was not; ``resume=False`` refuses a folder that holds checkpoints.

    Under torchrun every process computes its share of each batch; draws are those of the whole batch, so the training
    curve is the same but for rounding, for any number of processes. A run may be resumed with another number.

    Returns: kind, out, images, failed, parameters, device, processes, precision, operations_per_image (of a training
    step, without LPIPS and the discriminator), steps, first_step, images_seen, epochs; and after training checkpoint,
    loss (as in the last log line: the mean over its steps) and that line's metrics, latent_scale, images_per_second and
    mfu (operations per second over what a large matrix product reached just before, on as many devices).
    Reconstruction_error, psnr, frechet_distance and frechet_features, codebook_use and code_perplexity or divergence
    are then those of ``measured_images`` training images, see ``ReconstructionMeasure.result``. With ``dry_run``
    nothing is written.

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
    options: dict[str, Any] = {"kept": kept, "strict": strict_decode, "max_pixels": max_pixels, "ranks": ranks}
    images = training_images(shards, size=size, channels=channels, **options)
    objective = AutoencoderObjective(config, ranks, device, images, embedder)
    report = run_training(objective, config, out, resume=resume, dry_run=dry_run)
    return {**report, "failed": images.failed}


def train_dit(
    config: DitRun,
    latents: str | os.PathLike | LiveLatents,
    out: str | os.PathLike,
    *,
    kept: str | os.PathLike | None = None,
    oversample_balanced: str | os.PathLike | None = None,
    group_weights: str | os.PathLike | Mapping[str, int] | None = None,
    start_from: str | os.PathLike | None = None,
    decode_with: str | os.PathLike | None = None,
    resume: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a DiT by flow matching on a latents folder of ``encode``, or on the samples of a ``kept.parquet`` in it.

    Each step draws for each sample of its batch a time t, uniform in [0, 1) or as ``train.timesteps`` says, and noise
    x0, and takes the mean of ``‖v(xt, t, label) − (x1 − x0)‖²`` per element (arXiv 2401.08740, equations 2 and 5). A
    label is replaced by the null label with probability ``class_dropout_prob``. Latents are kept in memory, in float16
    as they are on disk, if those of all processes of this machine fit into an eighth of what is free (of a URL, half);
    else their files are read by rows, for the same run. A data set smaller than a batch is gone through more than once
    per step.

    ``latents`` may be ``LiveLatents``: shards (pruned ones too) whose images are encoded once, before the first step,
    each process of the run doing its share and getting the others'; with ``kept`` its samples alone. The training is
    that on the folder, to the bit where the same images were encoded together, else but for rounding.
    ``oversample_balanced``: "label", or a folder of `diffprune cluster`: each label or cluster is seen equally often
    (``BalancedOrder``), or in proportion to ``group_weights``, whole numbers by group as in ``select``'s ``quota``
    ("0=3,*=1", a mapping, or a JSON file). ``start_from``: initial weights: a checkpoint or run folder (its moving
    average), a published DiT's or SiT's state dict, ``.pt`` or ``.safetensors``, or diffusers' folder of a DiT; see
    ``checkpoints.load_start``.
    ``decode_with``: the VQ-VAE of the latents, for the grids of ``train.sample_every``; ``LiveLatents`` know theirs.

    What ``out`` holds, how a run is resumed, what is returned and raised: as ``train_vqvae``, and in the report ops
    ("torch", or the ``impl`` of this package's), latents ("in memory" or "in files") and latents_bytes. InputError too
    where latents, labels, clusters, ``start_from`` or ``decode_with`` do not fit the model, or a file of latents that
    is read by rows changes or goes away meanwhile.
    """
    folder = latents if isinstance(latents, LiveLatents) else ArrayFolder(latents, kind="latents")
    where, expected = folder.folder, config.model.latent_shape
    source = what_made(folder, expected)  # before images are encoded
    decoder = folder.vqvae if isinstance(folder, LiveLatents) and decode_with is None else decode_with
    if config.train.sample_every and decoder is None:
        raise InputError("train.sample_every: needs decode_with, the VQ-VAE of the latents: they are no images yet")
    if group_weights is not None and oversample_balanced is None:
        raise InputError("group_weights: of which groups? give oversample_balanced too: label, or a folder of clusters")
    start = None if start_from is None else load_start(start_from, config.model, source)
    ranks, device = training_ranks(config.train.device, config.train.batch_size)
    grids = None
    if config.train.sample_every:
        grids = SampleGrids(config.model, source, decoder, device, config.train.seed)
    table, values, twins = training_latents(folder, kept, twins=config.train.flip, shape=expected, ranks=ranks)
    keys = table["key"].to_pylist()
    if not keys:
        raise InputError(f"{kept or where}: expected samples to train on, found none")
    labels = _checked_labels(keys, table["label"].to_pylist(), config.model.num_classes, where)
    objective = DitObjective(config, ranks, device, keys, values, twins, labels, source)
    if oversample_balanced is not None:
        groups = _groups(oversample_balanced, table, where)
        weights = None if group_weights is None else _group_weights(read_quota(group_weights), groups)
        objective.balance(groups, str(oversample_balanced), weights)
    if start is not None:
        objective.start(*start)
    report = run_training(objective, config, out, resume=resume, dry_run=dry_run, grids=grids)
    # With a selection a sample that fails is an error.
    return {**report, "failed": folder.samples - len(keys)} if isinstance(folder, LiveLatents) and not kept else report


def _group_weights(given: Mapping[str, int], groups: Tensor) -> dict[int, int]:
    """The weight of each group; "*" stands for those not named, else they have 0."""
    known = [str(value) for value in groups.unique().tolist()]
    unknown = sorted(given.keys() - {"*", *known})
    if unknown:
        raise InputError(
            f"group_weights: no group {unknown[0]!r} among the samples; there are {len(known)}: "
            f"{', '.join(known[:10])}{', …' if len(known) > 10 else ''}"
        )
    weights = {int(name): given.get(name, given.get("*", 0)) for name in known}
    if not any(weights.values()):
        raise InputError("group_weights: all are 0, expected one above it")
    return weights


def _groups(by: str | os.PathLike, table: pa.Table, latents: str | os.PathLike) -> Tensor:
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


def _checked_labels(
    keys: list[str], labels: list[int | None], num_classes: int, where: str | os.PathLike
) -> Tensor | None:
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
