"""Verbs that say which samples to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import diffprune
from diffprune.cli.options import (
    MAX_FAILURES,
    MAX_PIXELS,
    Device,
    DryRun,
    Json,
    Latents,
    Seed,
    latents_source,
    refuse_given,
)
from diffprune.cli.output import run


def score(
    latents: Latents,
    checkpoint: Annotated[
        list[Path],
        typer.Option(help="The surrogate: a run folder, with all its checkpoints, or one of them. Repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of score tables.")],
    method: Annotated[str, typer.Option(help="loss, el2n, grand, moso, monotonicity, random; several with commas.")] = (
        "loss,el2n,grand"
    ),
    draws: Annotated[
        int, typer.Option(min=1, help="Draws of (t, noise) per sample, t stratified.", rich_help_panel="Draws")
    ] = 1,
    antithetic: Annotated[
        bool, typer.Option("--antithetic", help="Draws in pairs of one t, noise ±x0.", rich_help_panel="Draws")
    ] = False,
    normalise_t: Annotated[
        bool,
        typer.Option(
            "--normalise-t", help="Each draw's loss, el2n, norm over its mean at that t.", rich_help_panel="Draws"
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of everything random.", rich_help_panel="Draws")] = 0,
    mode: Annotated[str, typer.Option(help="Its form: paper, loo1 or authors.", rich_help_panel="MoSo")] = "paper",
    trials: Annotated[
        int, typer.Option(min=1, help="Support sets, by key; a sample is scored in its own.", rich_help_panel="MoSo")
    ] = 1,
    support_fraction: Annotated[
        float, typer.Option(help="Share of the samples that the mean gradient is made from.", rich_help_panel="MoSo")
    ] = 1.0,
    one_pass: Annotated[
        bool,
        typer.Option("--one-pass", help="An ESTIMATE from groups of samples, cheaper.", rich_help_panel="MoSo"),
    ] = False,
    group_size: Annotated[
        int, typer.Option(min=2, help="Samples that --one-pass compares with each other.", rich_help_panel="MoSo")
    ] = 32,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="One per checkpoint as given, with commas, or one; else the checkpoints'.", rich_help_panel="MoSo"
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="The surrogate's weights: model or ema.", rich_help_panel="How it runs")
    ] = "model",
    precision: Annotated[
        str, typer.Option(help="float32, or bf16: autocast.", rich_help_panel="How it runs")
    ] = "float32",
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="torch.compile what has no per-sample gradients.", rich_help_panel="How it runs"
        ),
    ] = False,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Draws at a time, or auto. By default 64, on the CPU fewer if its memory is short; halved where it "
            "runs out. Does not change the result.",
            rich_help_panel="How it runs",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that it may hold on the CPU, if no --batch-size says how much.", rich_help_panel="How it runs"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="How it runs")] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that take the shards. Does not change the result.", rich_help_panel="How it runs"
        ),
    ] = 1,
    part: Annotated[
        str | None,
        typer.Option(help="Only the I-th of N parts of the shards, as 3/64.", rich_help_panel="How it runs"),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster's address, or none for this machine's: its actors take the shards.",
            rich_help_panel="How it runs",
        ),
    ] = None,
    max_failures: Annotated[
        int,
        typer.Option(min=0, help="Stop after so many failures in a row; 0: never.", rich_help_panel="How it runs"),
    ] = MAX_FAILURES,
    vqvae: Annotated[
        Path | None,
        typer.Option(help="Score shards: encode their images by this VQ-VAE on the fly.", rich_help_panel="Images"),
    ] = None,
    strict_decode: Annotated[
        bool, typer.Option(help="Refuse an image with any damage, flipped bits too.", rich_help_panel="Images")
    ] = True,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse an image whose header says more.", rich_help_panel="Images")
    ] = MAX_PIXELS,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score every sample with a surrogate's checkpoints."""
    methods = tuple(name.strip() for name in method.split(",") if name.strip())
    if batch_size not in (None, "auto") and not (batch_size.isdecimal() and int(batch_size)):
        raise typer.BadParameter(f"expected a positive number, or auto, got {batch_size!r}", param_hint="--batch-size")
    try:
        rates = [float(rate) for rate in learning_rates.split(",")] if learning_rates else None
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers with commas, got {learning_rates!r}", param_hint="--learning-rates"
        ) from None
    options: dict[str, Any] = {
        "methods": methods,
        "seed": seed,
        "draws": draws,
        "antithetic": antithetic,
        "normalise_t": normalise_t,
    }
    options |= {"moso_mode": mode, "trials": trials, "support_fraction": support_fraction, "one_pass": one_pass}
    options |= {"group_size": group_size, "learning_rates": rates, "weights": weights, "precision": precision}
    options |= {"compile": compile_, "batch_size": batch_size if batch_size in (None, "auto") else int(batch_size)}
    options |= {"memory": memory, "device": device}
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}

    def call(**options: Any) -> dict:
        decoding = {"device": device, "strict_decode": strict_decode, "max_pixels": max_pixels}
        return diffprune.score(latents_source(latents, vqvae, **decoding), checkpoint, out, **options)

    run(call, **options, dry_run=dry_run, as_json=as_json)


_FITTING = ("levels", "seed", "init", "n_init", "max_iter", "metric", "batch_size", "engine")
_ONE_CLUSTERING = ("levels", "init", "n_init", "batch_size", "engine", "memory")


def cluster(
    context: typer.Context,
    embeddings: Annotated[list[Path], typer.Argument(help="Folders of `diffprune embed`, all by the same model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of score tables, or of the page of --choose-k.")],
    k: Annotated[int | None, typer.Option("-k", "--clusters", min=1, help="How many clusters.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Instead: assign to the clusters of this earlier run, whose numbers stay."),
    ] = None,
    choose_k: Annotated[
        str | None,
        typer.Option(help="Instead: try these numbers, such as 8,16,...,4096, and write a page that helps to choose."),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Also cluster the clusters: falling numbers, as 100,10.")] = None,
    seed: Seed = 0,
    init: Annotated[str, typer.Option(help="k-means||, k-means++, random, or split for many clusters.")] = "k-means||",
    n_init: Annotated[int, typer.Option(min=1, help="Starts; the best is kept.")] = 1,
    max_iter: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 100,
    metric: Annotated[str, typer.Option(help="euclidean or cosine.")] = "euclidean",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Learn from random batches of so many.")] = None,
    engine: Annotated[str, typer.Option(help="diffprune, or faiss to compare with.")] = "diffprune",
    memory: Annotated[
        str | None, typer.Option(help="Embeddings in memory at a time, such as 2GiB; more stream from disk.")
    ] = None,
    sample: Annotated[int, typer.Option(min=10, help="Embeddings that --choose-k looks at, at most.")] = 100_000,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """k-means over embeddings: the columns cluster and distance; or, which number of clusters to take."""
    if (k, choose_k, like).count(None) != 2:
        raise typer.BadParameter("expected one of -k, --choose-k and --like")
    if choose_k is not None:
        refuse_given(context, _ONE_CLUSTERING, "--choose-k tries numbers of clusters, and takes none")
        options: dict[str, Any] = {"seed": seed, "max_iter": max_iter, "metric": metric, "sample": sample}
        run(diffprune.choose_k, embeddings, out, ks=choose_k, **options, dry_run=dry_run, as_json=as_json)
        return
    refuse_given(context, ["sample"], "it is what --choose-k looks at; -k clusters and --like assigns all")
    if like is not None:
        refuse_given(context, _FITTING, "--like only assigns to clusters that are there")
    options = {"k": k, "like": like, "seed": seed, "init": init, "n_init": n_init, "max_iter": max_iter}
    options |= {"metric": metric, "batch_size": batch_size, "engine": engine, "memory": memory}
    options |= {"levels": _numbers("levels", levels)}
    run(diffprune.cluster, embeddings, out, **options, dry_run=dry_run, as_json=as_json)


def select(
    scores: Annotated[
        list[Path],
        typer.Argument(help="Folders of score tables, and parquet files with a column key; joined by that."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The selection to write, kept.parquet.")],
    order: Annotated[
        str,
        typer.Option(
            help="highest, lowest, middle, random; cluster-nearest, cluster-farthest, cluster-middle, cluster-random, "
            "cluster-herding; balanced, equal, drop-clusters; k-center, herding."
        ),
    ] = "highest",
    by: Annotated[
        str | None,
        typer.Option(
            help="What highest, lowest and middle rank: a score column; 'grand + 2*el2n', the sum of ranks; "
            "'grand & label', inside each group; -COLUMN turns one round."
        ),
    ] = None,
    prune: Annotated[float | None, typer.Option(help="The fraction to leave out, such as 0.9.")] = None,
    keep: Annotated[float | None, typer.Option(help="The fraction to keep, such as 0.1.")] = None,
    count: Annotated[int | None, typer.Option(help="The number to keep.")] = None,
    within: Annotated[
        str,
        typer.Option(
            help="Inside a cluster, for balanced and equal: nearest, farthest, middle, random, herding, k-center, "
            "highest:COLUMN, lowest:COLUMN."
        ),
    ] = "nearest",
    per: Annotated[str | None, typer.Option(help="Apply the order to each group of this column: label, …")] = None,
    shares: Annotated[
        str, typer.Option(help="How many each group of --per gives: proportional, balanced or equal.")
    ] = "proportional",
    quota: Annotated[
        str | None, typer.Option(help="Instead, how many of each group: 0=100,1=50,*=20, or a JSON file of the same.")
    ] = None,
    dedup: Annotated[
        float | None,
        typer.Option(help="First leave out near-duplicates: cosine distance below this inside a cluster (SemDeDup)."),
    ] = None,
    dedup_keep: Annotated[
        str, typer.Option(help="Which of them to keep: farthest from the centroid, nearest or random.")
    ] = "farthest",
    embeddings: Annotated[
        list[Path] | None, typer.Option(help="The embeddings, for k-center, herding and --dedup. Repeatable.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose which samples to keep, to the exact count; ties go by key."""
    options: dict[str, Any] = {"order": order, "by": by, "prune": prune, "keep": keep, "count": count, "within": within}
    options |= {"per": per, "shares": shares, "dedup": dedup, "dedup_keep": dedup_keep}
    options |= {"embeddings": embeddings, "device": device, "seed": seed}
    run(diffprune.select, scores, out, quota=quota, **options, dry_run=dry_run, as_json=as_json)


def _numbers(name: str, text: str | None) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas for --{name}, got {text!r}") from None
