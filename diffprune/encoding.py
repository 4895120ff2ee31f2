"""``encode`` and ``embed``: images -> latents or embeddings, one fp16 array per shard, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diffprune.arrays import write_array
from diffprune.checkpoints import load_vqvae
from diffprune.clip_retrieval import bind_embeddings
from diffprune.decode import Resizer, read_batches
from diffprune.device import pick_device
from diffprune.engines import run_stage
from diffprune.errors import InputError
from diffprune.files import read_json
from diffprune.models.embedders import load_embedder
from diffprune.progress import Progress
from diffprune.shards import ShardIndex, ShardSpec, index_shards
from diffprune.tables import base_table


def encode(
    shards: ShardSpec,
    vqvae: str | Path,
    out: str | Path,
    *,
    batch_size: int = 256,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the VQ-VAE latents of every image: ``<out>/<shard>.npy`` float16 [n, C, H, W] beside a table of keys.

    ``vqvae`` is a checkpoint or a run folder of ``train vqvae``. Latents are the encoder's output before quantisation,
    times the checkpoint's ``latent_scale``. An image that cannot be decoded is a failed row, NaN in the array. Returns
    counts (samples, failed, ...); shards that are done are skipped.
    """
    model, state = load_vqvae(vqvae, pick_device(device))
    head = {
        "kind": "latents",
        "model": "vqvae",
        "model_sha256": state["sha256"],
        "latent_scale": float(model.latent_scale),
    }

    def latents(images: torch.Tensor) -> torch.Tensor:
        return model.encode(images.float() / 127.5 - 1)

    network = _Network(latents, model.image_size, model.in_channels, head, str(vqvae))
    return _map_images("encode", network, shards, Path(out), batch_size, pick_device(device), dry_run)


def embed(
    shards: ShardSpec,
    out: str | Path,
    *,
    model: str,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an L2-normalised embedding of every image: ``<out>/<shard>.npy`` float16 [n, D] beside a table of keys.

    ``model``: a folder or hub id of CLIP, OpenCLIP, SigLIP, DINOv2 or DINOv3, ``efficientnet-lite0``, ``vqvae:PATH``,
    or ``package.module:function``; see docs/embedding.md. Images are prepared as the model was published with.
    ``clip-retrieval:PATH`` computes nothing: it takes the embeddings that clip-retrieval wrote, by key.
    ``precision``: "float32", "bf16", or "auto": bf16 on a GPU. Failed images as in ``encode``; an embedding that is not
    finite, or all zero, is a failed row too.
    """
    if model.startswith("clip-retrieval:"):
        return bind_embeddings(model.removeprefix("clip-retrieval:"), shards, out, dry_run)
    chosen = pick_device(device)
    embedder = load_embedder(model, chosen, precision)
    head = {"kind": "embeddings", **embedder.head}
    network = _Network(embedder.embed, embedder.resize, embedder.channels, head, embedder.path)
    return _map_images("embed", network, shards, Path(out), batch_size, chosen, dry_run)


@dataclass(frozen=True)
class _Network:
    """A function of uint8 images [B, C, H, W] made by ``resize``, with what identifies it."""

    function: Callable[[torch.Tensor], torch.Tensor]
    resize: int | Resizer
    channels: int
    head: dict[str, Any]
    path: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize.size


def _map_images(
    stage: str, network: _Network, shards: ShardSpec, out: Path, batch_size: int, device: torch.device, dry_run: bool
) -> dict[str, Any]:
    if batch_size < 1:
        raise InputError(f"batch_size: expected 1 or more, got {batch_size}")
    indexes = {index.path.stem: index for index in index_shards(shards)}
    with torch.inference_mode():
        blank = torch.zeros(1, network.channels, *network.size, dtype=torch.uint8, device=device)
        row_shape = tuple(network.function(blank).shape[1:])

    def work(stem: str, bar: Progress) -> pa.Table:
        table, array = _run(indexes[stem], network, row_shape, batch_size, device, bar)
        write_array(out / f"{stem}.npy", array)  # before the table, whose presence means that the shard is done
        return table

    config = {
        **network.head,
        "shape": list(row_shape),
        "image_size": network.size[0] if network.size[0] == network.size[1] else list(network.size),
        "inputs": describe(list(indexes.values())),
    }
    return run_stage(
        stage,
        out,
        config,
        list(indexes),
        work,
        total=sum(len(index.samples) for index in indexes.values()),
        metadata={"model_path": network.path, "sampled": _how_sampled(indexes)},
        dry_run=dry_run,
    )


def _how_sampled(indexes: dict[str, ShardIndex]) -> dict[str, Any] | None:
    """What ``sample`` wrote about images that it generated: steps, guidance, seed and checkpoint."""
    manifests = {index.path.parent / "sample.json" for index in indexes.values()}
    manifest = manifests.pop()
    return read_json(manifest).get("plan") if not manifests and manifest.is_file() else None


def describe(indexes: list[ShardIndex]) -> dict[str, list[int]]:
    """What identifies a set of shards in a fingerprint: name -> [bytes, samples]."""
    return {index.path.name: [index.size, len(index.samples)] for index in indexes}


def _run(
    index: ShardIndex,
    network: _Network,
    row_shape: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    bar: Progress,
) -> tuple[pa.Table, np.ndarray]:
    array = np.full((len(index.samples), *row_shape), np.nan, dtype=np.float16)
    labels: list[int | None] = []
    uids: list[str | None] = []
    errors: list[str | None] = []
    for batch in read_batches(index, size=network.resize, channels=network.channels, batch_size=batch_size):
        start = len(errors)
        with torch.inference_mode():
            images = torch.from_numpy(batch.images).to(device)
            values = network.function(images).float().cpu().numpy().astype(np.float16)
        for row, error in enumerate(batch.errors):
            if error is None and not np.isfinite(values[row]).all():
                error = f"the {network.head['model']} gave NaN, only zeros, or a value too large for float16"
            if error is None:
                array[start + row] = values[row]
            errors.append(error)
        labels += batch.labels
        uids += batch.uids
        bar.advance(len(batch.samples))
    return base_table(index.path.name, index.samples, labels, uids, errors), array
