"""``encode`` and ``embed``: images -> latents or embeddings, one fp16 array per shard, written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from diffprune.arrays import TWIN_SUFFIX, write_array
from diffprune.checkpoints import load_vqvae
from diffprune.clip_retrieval import bind_embeddings
from diffprune.decode import MAX_PIXELS
from diffprune.device import full_float32, pick_device
from diffprune.engines import run_stage
from diffprune.files import read_json
from diffprune.image_maps import ImageMap, Network, Reading
from diffprune.models.embedders import load_embedder
from diffprune.prefetch import Prefetch
from diffprune.progress import Progress
from diffprune.shards import ShardIndex, ShardSpec


def encode(
    shards: ShardSpec,
    vqvae: str | Path,
    out: str | Path,
    *,
    flip_twins: bool = False,
    batch_size: int = 256,
    device: str = "auto",
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the VQ-VAE latents of every image: ``<out>/<shard>.npy`` float16 [n, C, H, W] beside a table of keys.

    ``vqvae`` is a checkpoint or a run folder of ``train vqvae``. Latents are the encoder's output before quantisation,
    times the checkpoint's ``latent_scale``. An image that cannot be decoded is a failed row, NaN in the array.
    ``flip_twins``: also write the latents of the images mirrored left to right, ``<shard>.flip.npy``, which training
    with ``train.flip`` takes half of the time.
    ``strict_decode`` and ``max_pixels``: see ``diffprune.decode.Decoding``. The next shard is read while this
    one is encoded. Returns counts (samples, failed, ...); shards that are done are skipped.
    """
    network = vqvae_network(vqvae, pick_device(device))
    reading = Reading(strict_decode, max_pixels)
    if flip_twins:
        network = with_twins(network)
    return _map_images("encode", network, shards, Path(out), batch_size, reading, dry_run)


def embed(
    shards: ShardSpec,
    out: str | Path,
    *,
    model: str,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an embedding of every image: ``<out>/<shard>.npy`` float16 [n, D] beside a table of keys.

    Embeddings are L2-normalised, except those of FID's Inception, see ``models.inception.inception_features``.
    ``model``: a folder or hub id of CLIP, OpenCLIP, SigLIP, DINOv2 or DINOv3, ``efficientnet-lite0``, ``vqvae:PATH``,
    ``inception@SIZE:PATH``, or ``package.module:function``; see docs/embedding.md. Images are prepared as the model was
    published with. ``clip-retrieval:PATH`` computes nothing: it takes the embeddings that clip-retrieval wrote, by key.
    ``precision``: "float32", "bf16", or "auto": bf16 on a GPU. Failed images as in ``encode``; an embedding that is not
    finite, or all zero, is a failed row too.
    """
    if model.startswith("clip-retrieval:"):
        return bind_embeddings(model.removeprefix("clip-retrieval:"), shards, out, dry_run)
    chosen = pick_device(device)
    embedder = load_embedder(model, chosen, precision)
    head = {"kind": "embeddings", **embedder.head}
    network = Network(embedder.embed, embedder.resize, embedder.channels, head, embedder.path, chosen)
    return _map_images("embed", network, shards, Path(out), batch_size, Reading(strict_decode, max_pixels), dry_run)


def vqvae_network(vqvae: str | Path, device: torch.device) -> Network:
    """Images -> latents, by a VQ-VAE checkpoint or run folder."""
    model, state = load_vqvae(vqvae, device)
    head = {
        "kind": "latents",
        "model": "vqvae",
        "model_sha256": state["sha256"],
        "latent_scale": float(model.latent_scale),
    }

    def latents(images: torch.Tensor) -> torch.Tensor:
        with full_float32():
            return model.encode(images.float() / 127.5 - 1)

    return Network(latents, model.image_size, model.in_channels, head, str(vqvae), device)


def with_twins(network: Network) -> Network:
    """The same for each image and for its mirror image: [B, 2, ...]."""
    latents = network.function

    def both(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([latents(images), latents(images.flip(-1))], dim=1)

    return replace(network, function=both, head={**network.head, "flip_twins": True})


def _map_images(
    stage: str, network: Network, shards: ShardSpec, out: Path, batch_size: int, reading: Reading, dry_run: bool
) -> dict[str, Any]:
    images = ImageMap(network, shards, batch_size, reading)
    stems = list(images.indexes)
    twins = network.head.get("flip_twins", False)  # each row is an image's and its mirror image's
    if twins:
        images.config["shape"] = list(images.row_shape[1:])

    def is_done(stem: str) -> bool:
        return (out / f"{stem}.parquet").is_file()

    with Prefetch(images.batches, stems, skip=is_done) as batches:

        def work(stem: str, bar: Progress) -> pa.Table:
            table, array = images.run(stem, batches.parts(stem), bar)
            if twins:
                write_array(out / f"{stem}{TWIN_SUFFIX}", array[:, 1])
                array = array[:, 0]
            write_array(out / f"{stem}.npy", array)  # before the table, whose presence means that the shard is done
            return table

        metadata = {"model_path": network.path, "sampled": _how_sampled(images.indexes)}
        total = sum(len(index.samples) for index in images.indexes.values())
        return run_stage(stage, out, images.config, stems, work, total=total, metadata=metadata, dry_run=dry_run)


def _how_sampled(indexes: dict[str, ShardIndex]) -> dict[str, Any] | None:
    """What ``sample`` wrote about images that it generated: steps, guidance, seed and checkpoint."""
    manifests = {index.path.parent / "sample.json" for index in indexes.values()}
    manifest = manifests.pop()
    return read_json(manifest).get("plan") if not manifests and manifest.is_file() else None
