"""Verbs that show what a selection did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.options import Device, DryRun, Json, Seed
from diffprune.cli.output import run, show, show_doctor, show_evaluation


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
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a step and say how many hours a cell takes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare pruning methods × ratios × seeds: select, train, sample, measure; one table and one page."""
    options: dict[str, Any] = {
        "cells": cell,
        "jobs": jobs,
        "device": device,
        "listing": listing,
        "shared_only": shared_only,
    }
    run(diffprune.sweep, config, out, **options, dry_run=dry_run, as_json=as_json, display=_show)


def evaluate(
    samples: Annotated[Path, typer.Argument(help="Embeddings of the generated images.")],
    reference: Annotated[
        list[Path], typer.Option(help="Embeddings of the real images, by the same model. Repeatable.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")],
    kept: Annotated[
        Path | None, typer.Option(help="The selection that the model was trained on, for memorization.")
    ] = None,
    training: Annotated[
        list[Path] | None,
        typer.Option(help="Embeddings of what --kept selects from, where --reference is another split. Repeatable."),
    ] = None,
    same_seed: Annotated[
        Path | None, typer.Option(help="Embeddings of another model's images of the same seed, to compare with.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call this model in tables.")] = None,
    split: Annotated[str | None, typer.Option(help="What the reference is: train, validation, …")] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours, for precision and recall.")] = 3,
    vendi_order: Annotated[
        list[float] | None, typer.Option(min=0, help="Order of a Vendi score, 0 to inf; 1 is always there. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Images of each side, at most, for the k-NN metrics.")] = 50_000,
    seed: Seed = 0,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fréchet and kernel distance, precision, recall, F-score, Vendi score, memorization, class balance."""
    options: dict[str, Any] = {
        "kept": kept,
        "training": training or None,
        "same_seed": same_seed,
        "name": name,
        "split": split,
        "k": k,
    }
    options |= {"limit": limit, "seed": seed, "device": device}
    options |= {"vendi_orders": vendi_order} if vendi_order else {}
    run(
        diffprune.evaluate,
        samples,
        reference,
        out,
        **options,
        writes=out,
        dry_run=dry_run,
        as_json=as_json,
        display=show_evaluation,
    )


def doctor(as_json: Json = False) -> None:
    """What this machine has, and which implementation of each op can run here, or why not."""
    run(diffprune.doctor, as_json=as_json, display=show_doctor)


def report(
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    shards: Annotated[list[str] | None, typer.Option(help="The shards, for pictures of extreme samples.")] = None,
    scores: Annotated[list[Path] | None, typer.Option(help="Folders of score tables. Repeatable.")] = None,
    clusters: Annotated[Path | None, typer.Option(help="The folder of `diffprune cluster`.")] = None,
    selection: Annotated[list[str] | None, typer.Option(help="NAME=kept.parquet. Repeatable.")] = None,
    samples: Annotated[
        list[str] | None, typer.Option(help="NAME=grid.png, or NAME=folder of sampled shards. Repeatable.")
    ] = None,
    metrics: Annotated[list[Path] | None, typer.Option(help="JSON files of `diffprune evaluate`. Repeatable.")] = None,
    log: Annotated[list[str] | None, typer.Option(help="NAME=log.jsonl of a training run. Repeatable.")] = None,
    title: Annotated[str, typer.Option(help="The page's headline.")] = "diffprune report",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of everything that is given."""
    options: dict[str, Any] = {"title": title, "shards": shards or None, "scores": scores or [], "clusters": clusters}
    options |= {
        "selections": _named(selection),
        "samples": _named(samples),
        "metrics": metrics or [],
        "logs": _named(log),
    }
    run(diffprune.report, out, **options, writes=out, dry_run=dry_run, as_json=as_json)


def _show(result: dict[str, Any]) -> None:
    if not isinstance(result["cells"], list):
        show(result)
        return
    for row in result["cells"]:
        print(f"{row['number']:5d}  {row['name']}{'  done' if row['done'] else ''}")


def _named(pairs: list[str] | None) -> dict[str, Path]:
    """NAME=PATH options as a dict, in order."""
    named = {}
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise typer.BadParameter(f"expected NAME=PATH, got {pair!r}")
        if name in named:
            raise typer.BadParameter(f"the name {name!r} is given twice: {named[name]} and {path}")
        named[name] = Path(path)
    return named
