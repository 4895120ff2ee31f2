"""Verbs that write an array for every image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.options import (
    MAX_FAILURES,
    MAX_PIXELS,
    BatchSize,
    Device,
    DryRun,
    Json,
    MaxFailures,
    MaxPixels,
    Part,
    Ray,
    Shards,
    StrictDecode,
    Workers,
)
from diffprune.cli.output import run


def encode(
    shards: Shards,
    vqvae: Annotated[
        Path,
        typer.Option(
            help="A checkpoint or run folder; a folder of diffusers' AutoencoderKL or VQModel; or a state dict of "
            "taming-transformers, latent diffusion or LlamaGen. PATH@512 for images of 512 pixels."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The latents folder.")],
    flip_twins: Annotated[
        bool, typer.Option("--flip-twins", help="Also of the images mirrored left to right, for train.flip.")
    ] = False,
    posterior_seed: Annotated[
        int | None, typer.Option(min=0, help="Of a KL autoencoder: draw by this seed and the key, not the mean.")
    ] = None,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    workers: Workers = 1,
    part: Part = None,
    ray: Ray = None,
    max_failures: MaxFailures = MAX_FAILURES,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the latents of every image, one fp16 .npy per shard."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "strict_decode": strict_decode,
        "max_pixels": max_pixels,
    }
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}
    options |= {"flip_twins": flip_twins, "posterior_seed": posterior_seed}
    run(diffprune.encode, shards, vqvae, out, **options, dry_run=dry_run, as_json=as_json)


def embed(
    shards: Shards,
    model: Annotated[
        str,
        typer.Option(
            help="A folder or hub id of CLIP, OpenCLIP, SigLIP, DINOv2 or DINOv3; efficientnet-lite0; vqvae:PATH; "
            "classifier:PATH; inception@SIZE:PATH, FID's; package.module:function; or clip-retrieval:FOLDER."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The embeddings folder.")],
    batch_size: BatchSize = 256,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16, or auto: bf16 on a GPU.")] = "auto",
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    workers: Workers = 1,
    part: Part = None,
    ray: Ray = None,
    max_failures: MaxFailures = MAX_FAILURES,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write an L2-normalised embedding of every image, one fp16 .npy per shard."""
    options: dict[str, Any] = {"model": model, "batch_size": batch_size, "device": device, "precision": precision}
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels}
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}
    run(diffprune.embed, shards, out, **options, dry_run=dry_run, as_json=as_json)
