"""Options that several verbs have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

# diffprune.pixels.MAX_PIXELS and diffprune.failures.MAX_FAILURES: those modules import what --help need not wait for
MAX_PIXELS = 100_000_000
MAX_FAILURES = 100

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much it would do, and do nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="The seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time. Changes a result by rounding at most.")]
StrictDecode = Annotated[
    bool,
    typer.Option(help="Refuse an image with any damage, flipped bits too; without it, take what Pillow makes of it."),
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse an image whose header says that it has more.")]
Shards = Annotated[
    list[str], typer.Argument(help="Brace pattern, glob, folder, .tar or list file; several may be given.")
]
Latents = Annotated[
    list[str],
    typer.Argument(help="The latents: a folder of `diffprune encode`; or, with --vqvae, shards, as encode takes them."),
]
Kept = Annotated[Path | None, typer.Option(help="A kept.parquet: use only the samples that it keeps.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A TOML config; see configs/.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a config key: train.steps=1000. Repeatable.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that take the shards. Does not change the result.")]
Part = Annotated[
    str | None,
    typer.Option(help="Only the I-th of N parts of the shards, as 3/64, for a job array."),
]
Ray = Annotated[
    str | None, typer.Option(help="A Ray cluster's address, or none for this machine's: its actors take the shards.")
]
MaxFailures = Annotated[int, typer.Option(min=0, help="Stop after so many failures in a row; 0: never.")]
Resume = Annotated[
    bool, typer.Option(help="Go on from the last checkpoint in --out; without it, refuse a folder that has any.")
]


def latents_source(given: list[str], vqvae: Path | None, **decoding: Any) -> Any:
    """What ``Latents`` means: a folder, or shards whose images are encoded on the fly."""
    if vqvae is not None:
        import diffprune

        return diffprune.LiveLatents(given, vqvae, **decoding)
    if len(given) > 1:
        raise typer.BadParameter(f"expected one folder of latents, or shards with --vqvae, got {', '.join(given)}")
    return given[0]


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """End with an error if an option was given, its default too, that would have no effect."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")
