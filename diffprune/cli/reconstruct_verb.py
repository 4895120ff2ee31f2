"""``diffprune reconstruct``: what an autoencoder loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import diffprune
from diffprune.cli.output import run


def reconstruct(
    shards: Annotated[
        list[str], typer.Argument(help="Brace pattern, glob, folder, .tar or list file; several may be given.")
    ],
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    strict_decode: Annotated[
        bool,
        typer.Option(help="Refuse a JPEG with any damage, flipped bits too; without it, take what Pillow makes of it."),
    ] = True,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse an image whose header says that it has more.")
    ] = 100_000_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much it would do, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """What an autoencoder loses: reconstruction error, Fréchet distance, codebook use; and its latents' scale."""
    options = {"encoder": encoder, "limit": limit, "out": out, "grid": grid, "batch_size": batch_size}
    options |= {"device": device, "strict_decode": strict_decode, "max_pixels": max_pixels}
    run(diffprune.reconstruct, shards, vqvae, **options, dry_run=dry_run, as_json=as_json)
