"""Verbs of images and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.options import MAX_PIXELS, DryRun, Json, MaxPixels, Seed, Shards, StrictDecode, Workers
from diffprune.cli.output import run


def pack(
    source: Annotated[
        str, typer.Argument(help="A folder of class folders, a parquet of images (or its URL), or mnist5k.")
    ],
    out: Annotated[Path | None, typer.Argument(help="The folder to write shards into.")] = None,
    named_source: Annotated[
        str | None, typer.Option("--source", help="SOURCE as an option: --source mnist5k OUT.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Shards are named PREFIX-000000.tar, ….")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 1000,
    resize: Annotated[int | None, typer.Option(min=1, help="Crop to a square and resize to this side, as PNG.")] = None,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the samples over the shards.")] = True,
    seed: Seed = 0,
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    workers: Workers = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Pack images into WebDataset shards: image bytes as they are, cls, and json with a uid."""
    if named_source is not None and out is None:
        source, out = named_source, Path(source)
    elif named_source is not None or out is None:
        raise typer.BadParameter("expected SOURCE OUT, or --source SOURCE OUT")
    options: dict[str, Any] = {
        "prefix": prefix,
        "shard_size": shard_size,
        "resize": resize,
        "shuffle_seed": seed if shuffle else None,
    }
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels, "workers": workers}
    run(diffprune.pack, source, out, **options, dry_run=dry_run, as_json=as_json)


def verify(
    shards: Shards,
    decode: Annotated[bool, typer.Option(help="Also decode every image.")] = False,
    strict_decode: StrictDecode = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    workers: Workers = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Count samples and keys, account for every byte, list all damage. Exits 1 if there is any."""
    result = run(
        diffprune.verify,
        shards,
        decode=decode,
        strict_decode=strict_decode,
        max_pixels=max_pixels,
        workers=workers,
        dry_run=dry_run,
        as_json=as_json,
    )
    if result.get("damaged"):
        raise typer.Exit(1)


def prune(
    kept: Annotated[Path, typer.Argument(help="The selection: a kept.parquet.")],
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pruned shards.")],
    shard_size: Annotated[int | None, typer.Option(min=1, help="Samples per shard; as the input's by default.")] = None,
    prefix: Annotated[str | None, typer.Option(help="The shards' prefix; the input's by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Shards written at a time; 4 by default.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte of the new shards with the input in the end.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the kept samples into new shards, byte for byte."""
    options: dict[str, Any] = {"shard_size": shard_size, "prefix": prefix, "workers": workers, "verify": verify}
    run(diffprune.prune, kept, shards, out, **options, dry_run=dry_run, as_json=as_json)


def export(
    kept: Annotated[Path, typer.Argument(help="The selection: a kept.parquet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; - is standard output.")],
    format: Annotated[str, typer.Option("--format", "-f", help="keys, datacomp, energon, wids or timm.")],
    shards: Annotated[
        list[str] | None,
        typer.Option(help="energon: the shards selected from; wids, timm: the pruned shards. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split's name, for energon and timm.")] = "train",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a selection in another tool's format."""
    options: dict[str, Any] = {"format": format, "shards": shards or None, "split": split}
    run(diffprune.export, kept, out, **options, writes=out, dry_run=dry_run, as_json=as_json)
