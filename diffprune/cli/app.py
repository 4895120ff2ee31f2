"""The verbs. Modules that import torch are imported by the verb that needs them, so that ``--help`` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import diffprune
from diffprune.cli.output import run, show_doctor, show_evaluation
from diffprune.cli.reconstruct_verb import reconstruct
from diffprune.cli.sweep_verb import sweep

app = typer.Typer(
    name="diffprune",
    help="Score every image of a diffusion model's training set, say which to keep, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train the VQ-VAE or the DiT, from a TOML config and overrides.", no_args_is_help=True)
app.add_typer(train, name="train", rich_help_panel="Models")
app.command(rich_help_panel="Models")(reconstruct)
app.command(rich_help_panel="Proof")(sweep)

# diffprune.pixels.MAX_PIXELS and diffprune.failures.MAX_FAILURES: those modules import what --help need not wait for
MAX_PIXELS = 100_000_000
MAX_FAILURES = 100

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much it would do, and do nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="The seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time. Does not change the result.")]
StrictDecode = Annotated[
    bool,
    typer.Option(help="Refuse a JPEG with any damage, flipped bits too; without it, take what Pillow makes of it."),
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse an image whose header says that it has more.")]
Shards = Annotated[
    list[str], typer.Argument(help="Brace pattern, glob, folder, .tar or list file; several may be given.")
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
    str | None, typer.Option(help="A Ray cluster's address, or auto: its actors take the shards, --workers of them.")
]
MaxFailures = Annotated[int, typer.Option(min=0, help="Stop after so many failures in a row; 0: never.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")]


def main() -> None:
    """Entry point of the ``diffprune`` command."""
    app()


def _version(value: bool) -> None:
    if value:
        print(f"diffprune {diffprune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Data")
def pack(
    source: Annotated[str, typer.Argument(help="A folder of class folders, a Hugging Face image parquet, or mnist5k.")],
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
    options = {"prefix": prefix, "shard_size": shard_size, "resize": resize, "shuffle_seed": seed if shuffle else None}
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels, "workers": workers}
    run(diffprune.pack, source, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Data")
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


@app.command(rich_help_panel="Data")
def prune(
    kept: Annotated[Path, typer.Argument(help="The selection: a kept.parquet.")],
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pruned shards.")],
    shard_size: Annotated[int | None, typer.Option(min=1, help="Samples per shard; as the input's by default.")] = None,
    prefix: Annotated[str | None, typer.Option(help="The shards' prefix; the input's by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Shards written at a time; by default one a core.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the kept samples into new shards, byte for byte."""
    options = {"shard_size": shard_size, "prefix": prefix, "workers": workers}
    run(diffprune.prune, kept, shards, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Data")
def export(
    kept: Annotated[Path, typer.Argument(help="The selection: a kept.parquet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
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
    options = {"format": format, "shards": shards or None, "split": split}
    run(diffprune.export, kept, out, **options, dry_run=dry_run, as_json=as_json)


@train.command("vqvae")
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

    def call(**options: object) -> dict:
        from diffprune.config import load_config

        return diffprune.train_vqvae(load_config(config, "vqvae", overrides or []), shards, out, **options)

    options = {"kept": kept, "frechet_encoder": frechet_encoder}
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels}
    run(call, **options, resume=resume, dry_run=dry_run, as_json=as_json)


@train.command("dit")
def train_dit(
    latents: Annotated[
        Path, typer.Argument(help="The latents: a folder of `diffprune encode`; or shards, with --vqvae.")
    ],
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
        typer.Option(help="Initial weights: a checkpoint or run folder, or a published DiT's or SiT's .pt."),
    ] = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a DiT by flow matching: on latents or shards, all of them or those of a kept.parquet."""

    def call(**options: object) -> dict:
        from diffprune.config import load_config

        settings = load_config(config, "dit", overrides or [])
        source: object = latents
        if vqvae is not None:
            from diffprune.ranks import local_device

            source = diffprune.LiveLatents(str(latents), vqvae, device=local_device(settings.train.device))
        return diffprune.train_dit(settings, source, out, **options)

    options = {"oversample_balanced": oversample_balanced, "group_weights": group_weights}
    options |= {"start_from": start_from, "decode_with": decode_with}
    run(call, kept=kept, **options, resume=resume, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Features")
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
    options = {"batch_size": batch_size, "device": device, "strict_decode": strict_decode, "max_pixels": max_pixels}
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}
    options |= {"flip_twins": flip_twins, "posterior_seed": posterior_seed}
    run(diffprune.encode, shards, vqvae, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Features")
def embed(
    shards: Shards,
    model: Annotated[
        str,
        typer.Option(
            help="A folder or hub id of CLIP, OpenCLIP, SigLIP, DINOv2 or DINOv3; efficientnet-lite0; vqvae:PATH; "
            "inception@SIZE:PATH, FID's; package.module:function; or clip-retrieval:FOLDER."
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
    options = {"model": model, "batch_size": batch_size, "device": device, "precision": precision}
    options |= {"strict_decode": strict_decode, "max_pixels": max_pixels}
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}
    run(diffprune.embed, shards, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Selection")
def score(
    latents: Annotated[
        Path, typer.Argument(help="The latents: a folder of `diffprune encode`; or shards, with --vqvae.")
    ],
    checkpoint: Annotated[
        list[Path], typer.Option(help="The surrogate: checkpoints, or a run folder with all of its.")
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
        str,
        typer.Option(
            help="Draws at a time, or auto. Halved where memory runs out. Does not change the result.",
            rich_help_panel="How it runs",
        ),
    ] = "64",
    memory: Annotated[
        float | None,
        typer.Option(help="For auto on the CPU: GiB that it may hold.", rich_help_panel="How it runs"),
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
            help="A Ray cluster's address, or auto: its actors take the shards.", rich_help_panel="How it runs"
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
        bool, typer.Option(help="Refuse a JPEG with any damage, flipped bits too.", rich_help_panel="Images")
    ] = True,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse an image whose header says more.", rich_help_panel="Images")
    ] = MAX_PIXELS,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score every sample with a surrogate's checkpoints."""
    methods = tuple(name.strip() for name in method.split(",") if name.strip())
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise typer.BadParameter(f"expected a positive number, or auto, got {batch_size!r}", param_hint="--batch-size")
    try:
        rates = [float(rate) for rate in learning_rates.split(",")] if learning_rates else None
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers with commas, got {learning_rates!r}", param_hint="--learning-rates"
        ) from None
    options = {"methods": methods, "seed": seed, "draws": draws, "antithetic": antithetic, "normalise_t": normalise_t}
    options |= {"moso_mode": mode, "trials": trials, "support_fraction": support_fraction, "one_pass": one_pass}
    options |= {"group_size": group_size, "learning_rates": rates, "weights": weights, "precision": precision}
    options |= {"compile": compile_, "batch_size": batch_size if batch_size == "auto" else int(batch_size)}
    options |= {"memory": memory, "device": device}
    options |= {"workers": workers, "part": part, "ray": ray, "max_failures": max_failures}

    def call(**options: object) -> dict:
        decoding = {"device": device, "strict_decode": strict_decode, "max_pixels": max_pixels}
        source = latents if vqvae is None else diffprune.LiveLatents(str(latents), vqvae, **decoding)
        return diffprune.score(source, checkpoint, out, **options)

    run(call, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Selection")
def cluster(
    embeddings: Annotated[list[Path], typer.Argument(help="Folders of `diffprune embed`, all by the same model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of score tables, or of the page of --choose-k.")],
    k: Annotated[int | None, typer.Option("-k", "--clusters", min=1, help="How many clusters.")] = None,
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
    if (k is None) == (choose_k is None):
        raise typer.BadParameter("expected either -k or --choose-k")
    if choose_k is not None:
        options = {"seed": seed, "max_iter": max_iter, "metric": metric, "sample": sample}
        run(diffprune.choose_k, embeddings, out, ks=choose_k, **options, dry_run=dry_run, as_json=as_json)
        return
    options = {"k": k, "seed": seed, "init": init, "n_init": n_init, "max_iter": max_iter, "metric": metric}
    options |= {"batch_size": batch_size, "engine": engine, "memory": memory, "levels": _numbers("levels", levels)}
    run(diffprune.cluster, embeddings, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Selection")
def select(
    scores: Annotated[list[Path], typer.Argument(help="Folders of score tables; several are joined by key.")],
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
        Path | None, typer.Option(help="The embeddings folder, for k-center, herding and --dedup.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose which samples to keep, to the exact count; ties go by key."""
    options = {"order": order, "by": by, "prune": prune, "keep": keep, "count": count, "within": within}
    options |= {"per": per, "shares": shares, "dedup": dedup, "dedup_keep": dedup_keep}
    options |= {"embeddings": embeddings, "device": device, "seed": seed}
    run(diffprune.select, scores, out, quota=quota, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Models")
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
    grid: Annotated[Path | None, typer.Option(help="Also write the first images as one PNG.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Generate images into shards, and a grid PNG."""
    options = {"count": count, "steps": steps, "method": method, "rtol": rtol, "atol": atol, "labels": labels}
    options |= {"guidance": guidance, "guidance_channels": guidance_channels}
    options |= {"coarse": coarse, "coarse_until": coarse_until}
    options |= {"weights": weights, "grid": grid, "seed": seed, "batch_size": batch_size, "device": device}
    run(diffprune.sample, checkpoint, vqvae, out, **options, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel="Proof")
def evaluate(
    samples: Annotated[Path, typer.Argument(help="Embeddings of the generated images.")],
    reference: Annotated[Path, typer.Option(help="Embeddings of the real images, by the same model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")],
    kept: Annotated[
        Path | None, typer.Option(help="The selection that the model was trained on, for memorization.")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(help="Embeddings of what --kept selects from, where --reference is another split."),
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
    options = {"kept": kept, "training": training, "same_seed": same_seed, "name": name, "split": split, "k": k}
    options |= {"limit": limit, "seed": seed, "device": device}
    options |= {"vendi_orders": vendi_order} if vendi_order else {}
    run(
        diffprune.evaluate,
        samples,
        reference,
        out,
        **options,
        dry_run=dry_run,
        as_json=as_json,
        display=show_evaluation,
    )


@app.command(rich_help_panel="Proof")
def doctor(as_json: Json = False) -> None:
    """What this machine has, and which implementation of each op can run here, or why not."""
    run(diffprune.doctor, as_json=as_json, display=show_doctor)


@app.command(rich_help_panel="Proof")
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
    options = {"title": title, "shards": shards or None, "scores": scores or [], "clusters": clusters}
    options |= {
        "selections": _named(selection),
        "samples": _named(samples),
        "metrics": metrics or [],
        "logs": _named(log),
    }
    run(diffprune.report, out, **options, dry_run=dry_run, as_json=as_json)


def _named(pairs: list[str] | None) -> dict[str, Path]:
    """NAME=PATH options as a dict, in order."""
    named = {}
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise typer.BadParameter(f"expected NAME=PATH, got {pair!r}")
        named[name] = Path(path)
    return named


def _numbers(name: str, text: str | None) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas for --{name}, got {text!r}") from None
