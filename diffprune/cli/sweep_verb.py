"""``diffprune sweep``: the comparison in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.output import run, show


def sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file that says what to compare; see configs/.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells at a time.")] = 1,
    cell: Annotated[
        list[str] | None, typer.Option(help="Only this cell, by name or number: for a cluster's job. Repeatable.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Say which cells there are, and which are done.")] = False,
    shared_only: Annotated[
        bool, typer.Option("--shared-only", help="Compute what all cells use, and no cell.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a step and say how many hours a cell takes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Compare pruning methods × ratios × seeds: select, train, sample, measure; one table and one page."""
    options = {"cells": cell, "jobs": jobs, "device": device, "listing": listing, "shared_only": shared_only}
    run(diffprune.sweep, config, out, **options, dry_run=dry_run, as_json=as_json, display=_show)


def _show(result: dict[str, Any]) -> None:
    if not isinstance(result["cells"], list):
        show(result)
        return
    for row in result["cells"]:
        print(f"{row['number']:5d}  {row['name']}{'  done' if row['done'] else ''}")
