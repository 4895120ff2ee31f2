"""``encode`` and ``embed``: images -> latents or embeddings, one fp16 array per shard, written once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from diffprune.arrays import TWIN_SUFFIX, write_array
from diffprune.checkpoints import load_vqvae
from diffprune.clip_retrieval import bind_embeddings
from diffprune.decode import MAX_PIXELS, Batch
from diffprune.device import full_float32, pick_device
from diffprune.draws import draw_noise
from diffprune.engines import Engine, Made, TableWriter, open_workers, run_stage
from diffprune.errors import InputError, short
from diffprune.failures import MAX_FAILURES, Tally
from diffprune.files import read_json
from diffprune.image_maps import ImageMap, Indexed, Network, Reading
from diffprune.latent_scales import missing_latent_scale
from diffprune.local_workers import Advance, Relay, Task
from diffprune.models.embedders import load_embedder
from diffprune.models.kl import KLAutoencoder
from diffprune.prefetch import Prefetch
from diffprune.progress import Progress
from diffprune.shards import ShardSpec
from diffprune.storage import AnyPath, as_path
from diffprune.unique_keys import told_twice


def encode(
    shards: ShardSpec,
    vqvae: str | os.PathLike,
    out: str | os.PathLike,
    *,
    flip_twins: bool = False,
    posterior_seed: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    part: str | None = None,
    ray: str | None = None,
    max_failures: int = MAX_FAILURES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the VQ-VAE latents of every image: ``<out>/<shard>.npy`` float16 [n, C, H, W] beside a table of keys.

    ``vqvae`` is a checkpoint or a run folder of ``train vqvae``, or an autoencoder of another program, see
    ``foreign_autoencoders.load_foreign_autoencoder``. Latents are the encoder's output before quantisation, times the
    checkpoint's ``latent_scale``; where a file has none, it is measured here, see ``latent_scales``. Of a KL
    autoencoder they are the posterior's means, or with ``posterior_seed`` a draw from it by (seed, sample key).
    An image that cannot be decoded is a failed row, NaN in the array.
    ``flip_twins``: also write the latents of the images mirrored left to right, ``<shard>.flip.npy``, which training
    with ``train.flip`` takes half of the time.
    ``strict_decode`` and ``max_pixels``: see ``diffprune.decode.Decoding``. The next shard is read while this
    one is encoded. Returns counts (samples, failed, ...); shards that are done are skipped.
    ``workers``: so many processes take the shards, each with the model in its memory. ``part``: "3/64", only the third
    of 64 parts of the shards; parts may run at once, on several machines. ``ray``: the address of a Ray cluster, or
    "auto": its actors take the shards, as many as ``workers`` if given. ``max_failures``: stop after so many images in
    a row that fail; 0: never. See docs/scale.md.
    """
    reading = Reading(strict_decode, max_pixels)
    scale = missing_latent_scale(vqvae, shards, pick_device(device), reading)
    images = _Images(
        "encode",
        partial(_latents_network, vqvae, flip_twins, device, scale, posterior_seed),
        as_path(out),
        batch_size,
        reading,
    )
    return _map_images(images, shards, dry_run, workers=workers, part=part, ray=ray, max_failures=max_failures)


def embed(
    shards: ShardSpec,
    out: str | os.PathLike,
    *,
    model: str,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    part: str | None = None,
    ray: str | None = None,
    max_failures: int = MAX_FAILURES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an embedding of every image: ``<out>/<shard>.npy`` float16 [n, D] beside a table of keys.

    Embeddings are L2-normalised, except those of FID's Inception, see ``models.inception.inception_features``, and of
    a classifier. ``model``: a folder or hub id of CLIP, OpenCLIP, SigLIP, DINOv2 or DINOv3, ``efficientnet-lite0``,
    ``vqvae:PATH``, ``classifier:PATH``, ``inception@SIZE:PATH``, or ``package.module:function``; see
    docs/embedding.md. Images are prepared as the model was published with. ``clip-retrieval:PATH`` computes nothing:
    it takes the embeddings that clip-retrieval wrote, by key; see ``bind_embeddings``.
    ``precision``: "float32", "bf16", or "auto": bf16 on a GPU. Failed images as in ``encode``; an embedding that is not
    finite, or all zero, is a failed row too. ``workers``, ``part``, ``ray`` and ``max_failures`` as in
    ``encode``.
    """
    if model.startswith("clip-retrieval:"):
        if workers > 1 or part or ray:
            raise InputError("clip-retrieval: its embeddings are only copied; give no workers, part or ray")
        if precision != "auto" or not strict_decode or max_pixels != MAX_PIXELS:
            raise InputError(
                "clip-retrieval: no image is read and nothing computed; give no precision, strict_decode or max_pixels"
            )
        source = model.removeprefix("clip-retrieval:")
        return bind_embeddings(source, shards, out, max_failures=max_failures, dry_run=dry_run)
    images = _Images(
        "embed",
        partial(_embedding_network, model, device, precision),
        as_path(out),
        batch_size,
        Reading(strict_decode, max_pixels),
    )
    return _map_images(images, shards, dry_run, workers=workers, part=part, ray=ray, max_failures=max_failures)


def vqvae_network(
    vqvae: str | os.PathLike, device: torch.device, scale: float | None = None, posterior_seed: int | None = None
) -> Network:
    """Images -> latents, by an autoencoder as ``encode`` takes it; ``scale``: of its latents if its file has none."""
    model, state = load_vqvae(vqvae, device)
    is_kl = isinstance(model, KLAutoencoder)
    if posterior_seed is not None and not is_kl:
        raise InputError(f"posterior_seed: {as_path(vqvae)} is a VQ-VAE, which draws nothing")
    if posterior_seed is not None and not 0 <= posterior_seed < 2**32:
        raise InputError(f"posterior_seed: expected a number from 0 to 2**32 - 1, got {posterior_seed}")
    if scale is not None:
        model.latent_scale.fill_(scale)
    head = {
        "kind": "latents",
        "model": "kl-autoencoder" if is_kl else "vqvae",
        "model_sha256": state["sha256"],
        "latent_scale": float(model.latent_scale),
    }
    if posterior_seed is not None:
        head["posterior_seed"] = posterior_seed

    def latents(images: torch.Tensor, keys: Sequence[str] = (), draw: int = 0) -> torch.Tensor:
        images = images.float() / 127.5 - 1
        with full_float32():
            if posterior_seed is None:
                return model.encode(images)
            noise = draw_noise(posterior_seed, keys, draw, model.latent_shape, device)
            return model.scaled(model.drawn(images, noise))

    name, keyed = str(as_path(vqvae)), posterior_seed is not None
    return Network(latents, model.image_size, model.in_channels, head, name, device, keyed=keyed)


def with_twins(network: Network) -> Network:
    """The same for each image and for its mirror image: [B, 2, ...]. Where latents are drawn, by draws 0 and 1."""
    latents = network.function

    def both(images: torch.Tensor, *keys: Sequence[str]) -> torch.Tensor:
        mirrored = latents(images.flip(-1), *keys, draw=1)
        return torch.stack([latents(images, *keys), mirrored], dim=1)

    return replace(network, function=both, head={**network.head, "flip_twins": True})


def _latents_network(
    vqvae: str | os.PathLike, flip_twins: bool, device: str, scale: float | None, posterior_seed: int | None
) -> Network:
    network = vqvae_network(vqvae, pick_device(device), scale, posterior_seed)
    return with_twins(network) if flip_twins else network


def _embedding_network(model: str, device: str, precision: str) -> Network:
    chosen = pick_device(device)
    embedder = load_embedder(model, chosen, precision)
    head = {"kind": "embeddings", **embedder.head}
    return Network(embedder.embed, embedder.resize, embedder.channels, head, embedder.path, chosen)


@dataclass(frozen=True)
class _Images:
    """What a process needs to know to do a shard; called, it makes a `_Worker`."""

    stage: str
    network: Callable[[], Network]
    out: AnyPath
    batch_size: int
    reading: Reading

    def __call__(self, shards: ShardSpec | None = None, engine: Engine | None = None) -> _Worker:
        own = engine and engine.mine
        return _Worker(ImageMap(self.network(), shards, self.batch_size, self.reading, own), self.out)


class _Worker:
    """A network in memory, and what it makes of shards."""

    def __init__(self, images: ImageMap, out: AnyPath) -> None:
        self.images, self.out = images, out
        self.twins = images.network.head.get("flip_twins", False)  # each row is an image's and its mirror image's

    def table(self, shard: Indexed, writer: TableWriter, advance: Advance) -> Tally:
        """Do one shard that another process has indexed."""
        self.images.take([shard])
        stem = shard[0].path.stem

        def work() -> Made:
            with Prefetch(self.images.batches, [stem]) as batches:
                return self.done(stem, batches.parts(stem), Relay(advance))

        return writer.run(stem, work)

    def done(self, stem: str, batches: Iterable[Batch], bar: Progress) -> Made:
        """The table of one shard, its array being written."""
        table, array = self.images.run(stem, batches, bar)
        if self.twins:
            write_array(self.out / f"{stem}{TWIN_SUFFIX}", array[:, 1])
            array = array[:, 0]
        digest = write_array(self.out / f"{stem}.npy", array)  # before the table, which means that the shard is done
        return Made(table, about={"array": digest})


def _map_images(recipe: _Images, shards: ShardSpec, dry_run: bool, **how: Any) -> dict[str, Any]:
    """``how``: as ``open_workers``."""
    with open_workers(recipe, **how) as engine:
        worker = engine.ranks.together(lambda: recipe(shards, engine))
        images, out, stems = worker.images, recipe.out, worker.images.stems
        _refuse_twice(images, engine)
        rows = sum(len(index.samples) for index in images.indexes.values())
        if worker.twins:
            images.config["shape"] = list(images.row_shape[1:])
        asked_for: set[str] = set()
        with Prefetch(images.batches, stems, skip=lambda stem: stem not in asked_for) as batches:
            return run_stage(
                recipe.stage,
                out,
                images.config,
                stems,
                lambda stem, bar: worker.done(stem, batches.parts(stem), bar),
                total=engine.ranks.count(rows),
                inputs=images.inputs,
                beside=[".npy", *([TWIN_SUFFIX] if worker.twins else [])],
                begin=asked_for.update,
                metadata={"model_path": images.network.path, "sampled": _how_sampled(images.paths)},
                dry_run=dry_run,
                engine=engine,
                task=lambda stem, writer: Task(stem, "table", (images.indexed(stem), writer)),
            )


def _refuse_twice(images: ImageMap, engine: Engine) -> None:
    """A key in shards of two processes; those of one were compared when they were indexed."""
    if engine.ranks.size > 1:
        keys = pa.chunked_array([index.samples.key_column for index in images.indexes.values()], pa.large_string())
        if twice := told_twice(keys, engine.ranks):
            raise InputError(f"{images.paths[0]} and others: {twice}; keys must be unique over all shards")


def _how_sampled(shards: Sequence[AnyPath]) -> dict[str, Any] | None:
    """What ``sample`` wrote about images that it generated: steps, guidance, seed and checkpoint."""
    manifests = {path.parent / "sample.json" for path in shards}
    manifest = manifests.pop()
    if manifests or not manifest.is_file():
        return None
    about = read_json(manifest)
    if not isinstance(about, dict) or not isinstance(about.get("plan"), (dict, type(None))):
        raise InputError(f"{manifest}: expected what `diffprune sample` wrote about its images, found {short(about)}")
    return about.get("plan")
