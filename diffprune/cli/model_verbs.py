"""Verbs that train and use models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.options import (
    MAX_PIXELS,
    BatchSize,
    Config,
    Device,
    DryRun,
    Json,
    Kept,
    Latents,
    MaxPixels,
    Part,
    Ray,
    Resume,
    Seed,
    Set,
    Shards,
    StrictDecode,
    Workers,
    latents_source,
)
from diffprune.cli.output import run


def train_vqvae(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder: checkpoints and log.jsonl.")],
    config: Config = None,
    overrides: Set = None,
    kept: Kept = None,
    frechet_encoder: Annotated[
        str | None,
        typer.Option(help="Whose features reconstructions are told by in the end, as embed's --model; else pixels."),
    ] = None,
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a VQ-VAE, or a KL autoencoder, on the images of shards."""

    def call(**options: Any) -> dict:
        from diffprune.config import load_config

        return diffprune.train_vqvae(load_config(config, "vqvae", overrides or []), shards, out, **options)

    options: dict[str, Any] = {"kept": kept, "frechet_encoder": frechet_encoder}
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels}
    run(call, **options, resume=resume, dry_run=dry_run, as_json=as_json)


def train_dit(
    latents: Latents,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder: checkpoints, log.jsonl and loss.png.")],
    config: Config = None,
    overrides: Set = None,
    kept: Kept = None,
    vqvae: Annotated[
        Path | None, typer.Option(help="Train on shards: encode their images by this VQ-VAE first, in memory.")
    ] = None,
    oversample_balanced: Annotated[
        str | None,
        typer.Option(help="See each group equally often: label, or a folder of `diffprune cluster`."),
    ] = None,
    group_weights: Annotated[
        str | None, typer.Option(help="Instead in these proportions: 0=3,1=1,*=2, or a JSON file of the same.")
    ] = None,
    decode_with: Annotated[
        Path | None, typer.Option(help="The VQ-VAE of the latents, for the grids of train.sample_every.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Initial weights: a checkpoint or run folder, a published DiT's or SiT's .pt, or diffusers' folder."
        ),
    ] = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a DiT by flow matching: on latents or shards, all of them or those of a kept.parquet."""

    def call(**options: Any) -> dict:
        from diffprune.config import load_config

        settings = load_config(config, "dit", overrides or [])
        decoding = {}
        if vqvae is not None:
            from diffprune.ranks import local_device

            decoding["device"] = local_device(settings.train.device)
        source = latents_source(latents, vqvae, **decoding)
        return diffprune.train_dit(settings, source, out, **options)

    options: dict[str, Any] = {"oversample_balanced": oversample_balanced, "group_weights": group_weights}
    options |= {"start_from": start_from, "decode_with": decode_with}
    run(call, kept=kept, **options, resume=resume, dry_run=dry_run, as_json=as_json)


def convert(
    weights: Annotated[
        str, typer.Argument(help="A DiT's or SiT's state dict (.pt, .safetensors), or diffusers' folder of a DiT.")
    ],
    latents: Annotated[
        Path, typer.Argument(help="Latents of `diffprune encode`, by the autoencoder that it was trained with.")
    ],
    predicts: Annotated[str, typer.Option(help="What it was trained to predict: velocity (SiT) or noise (DiT).")],
    config: Annotated[
        Path,
        typer.Option("--config", "-c", help="The model, as TOML: not all of it shows in tensors."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder for the checkpoint.")],
    overrides: Set = None,
    steps: Annotated[int, typer.Option(help="Steps it was trained for; MoSo is in proportion.")] = 7_000_000,
    learning_rate: Annotated[float, typer.Option(help="At that learning rate; MoSo is in proportion.")] = 1e-4,
    as_json: Json = False,
) -> None:
    """Make a checkpoint of a published DiT or SiT: scores without training a surrogate."""

    def call(**options: Any) -> dict:
        from diffprune.config import load_config

        return diffprune.convert(weights, latents, out, config=load_config(config, "dit", overrides or []), **options)

    run(call, predicts=predicts, steps=steps, learning_rate=learning_rate, as_json=as_json)


def reconstruct(
    shards: Shards,
    vqvae: Annotated[
        Path, typer.Option(help="A checkpoint, a run folder, diffusers' folder, or a state dict; see `encode`.")
    ],
    encoder: Annotated[
        str | None,
        typer.Option(help="Whose features the Fréchet distance is of, as embed's --model; pixels without it."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images at most, spread evenly over the shards.")] = 10_000,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A JSON file for the result.")] = None,
    grid: Annotated[Path | None, typer.Option(help="A PNG of images above their reconstructions.")] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """What an autoencoder loses: reconstruction error, Fréchet distance, codebook use; and its latents' scale."""
    options: dict[str, Any] = {"encoder": encoder, "limit": limit, "out": out, "grid": grid, "batch_size": batch_size}
    options |= {"device": device, "strict_decode": strict_decode, "max_pixels": max_pixels}
    run(diffprune.reconstruct, shards, vqvae, **options, writes=[out, grid], dry_run=dry_run, as_json=as_json)


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A DiT checkpoint or run folder.")],
    vqvae: Annotated[Path, typer.Option(help="The VQ-VAE that its latents came from.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder for shards of generated images.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the ODE solver, 50 by default.")] = None,
    method: Annotated[str, typer.Option(help="euler, midpoint, heun, or dopri5, which chooses its steps.")] = "euler",
    rtol: Annotated[float | None, typer.Option(help="dopri5's relative tolerance, 1e-3 by default.")] = None,
    atol: Annotated[float | None, typer.Option(help="dopri5's absolute tolerance, 1e-6 by default.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 1.0,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Guide only the first so many channels; all by default.")
    ] = None,
    coarse: Annotated[Path | None, typer.Option(help="A smaller DiT that begins, up to --coarse-until.")] = None,
    coarse_until: Annotated[
        float | None, typer.Option(help="The time, of 0 (noise) to 1 (data), at which CHECKPOINT takes over.")
    ] = None,
    labels: Annotated[str, typer.Option(help="uniform, null, or class numbers with commas.")] = "uniform",
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    precision: Annotated[str, typer.Option(help="float32, or bf16: the models run under autocast.")] = "float32",
    grid: Annotated[Path | None, typer.Option(help="Also write the first images as one PNG.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    workers: Workers = 1,
    part: Part = None,
    ray: Ray = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Generate images into shards of 1,000, and a grid PNG."""
    options: dict[str, Any] = {
        "count": count,
        "steps": steps,
        "method": method,
        "rtol": rtol,
        "atol": atol,
        "labels": labels,
    }
    options |= {"guidance": guidance, "guidance_channels": guidance_channels}
    options |= {"coarse": coarse, "coarse_until": coarse_until}
    options |= {"weights": weights, "precision": precision, "grid": grid}
    options |= {"seed": seed, "batch_size": batch_size, "device": device}
    options |= {"workers": workers, "part": part, "ray": ray}
    run(diffprune.sample, checkpoint, vqvae, out, **options, writes=grid, dry_run=dry_run, as_json=as_json)
