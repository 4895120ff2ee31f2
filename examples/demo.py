"""The whole road on 5,000 real MNIST digits: pack, train, score, cluster, select, prune, train again, compare, report.

    python examples/demo.py --out runs/demo

Every step is a public function of diffprune and a verb of its command line. Steps that are done are skipped, so the
demo can be interrupted and run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffprune
from diffprune.config import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CLUSTERS = 24  # the paper's k for CelebA-HQ
SAMPLES = 1000
SAMPLER = {"method": "heun", "steps": 12, "guidance": 1.5}
SELECTIONS = {  # name -> how `diffprune select` is called
    "random 10%": {"order": "random"},
    "cluster-nearest 10%": {"order": "cluster-nearest"},
    "cluster-balanced 10%": {"order": "balanced"},
    "GraNd 10%": {"order": "highest", "by": "grand"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--source", default="mnist5k", help="what to pack; another source wants other configs")
    arguments = parser.parse_args()
    try:
        results = run_demo(arguments.source, arguments.out)
    except diffprune.DiffpruneError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; run the same command again to finish the rest")
    print_table(results)
    print(f"\nreport: {arguments.out / 'report.html'}")


def run_demo(source: str, out: Path) -> list[dict]:
    """Run every step into ``out`` and return what ``evaluate`` found for each training set, full data first."""
    shards, latents, embeddings = out / "shards", out / "latents", out / "embeddings"
    scores, clusters = out / "scores", out / "clusters"
    vqvae, full_run = out / "vqvae", out / "models" / "full"
    dit_config = load_config(CONFIGS / "mnist-dit.toml", "dit")
    with step("pack 5,000 digits into shards"):
        diffprune.pack(source, shards, resize=32)
        diffprune.verify(shards, decode=True)
    with step("train the VQ-VAE"):
        diffprune.train_vqvae(load_config(CONFIGS / "mnist-vqvae.toml", "vqvae"), shards, vqvae)
    with step("encode latents, embed images"):
        diffprune.encode(shards, vqvae, latents)
        diffprune.embed(shards, embeddings, model=f"vqvae:{vqvae}")
    with step("train the DiT on all images: the baseline, and the surrogate that scores"):
        diffprune.train_dit(dit_config, latents, full_run)
    with step("score every image: loss, EL2N, GraNd, MoSo, monotonicity, random"):
        methods = ("loss", "el2n", "grand", "moso", "monotonicity", "random")
        diffprune.score(latents, full_run, scores, methods=methods)
    with step(f"cluster the embeddings, k={CLUSTERS}"):
        diffprune.cluster(embeddings, clusters, k=CLUSTERS)

    training_sets: dict[str, Path | None] = {"full data": None}
    with step("select 10% in four ways, write the pruned shards"):
        for name, how in SELECTIONS.items():
            kept = out / "selections" / slug(name) / "kept.parquet"
            diffprune.select([scores, clusters], kept, prune=0.9, **how)
            diffprune.prune(kept, shards, out / "pruned" / slug(name))
            training_sets[name] = kept

    runs = {name: full_run if kept is None else out / "models" / slug(name) for name, kept in training_sets.items()}
    for name, kept in training_sets.items():
        if kept is not None:
            with step(f"train on {name}, as many steps as on full data"):
                diffprune.train_dit(dit_config, latents, runs[name], kept=kept)

    sampled, results = {}, []
    for name, kept in training_sets.items():
        folder = out / "samples" / slug(name)
        sampled[name] = folder / "shards"
        with step(f"sample and evaluate: {name}"):
            diffprune.sample(runs[name], vqvae, sampled[name], count=SAMPLES, **SAMPLER, grid=folder / "grid.png")
            diffprune.embed(sampled[name], folder / "embeddings", model=f"vqvae:{vqvae}")
            metrics = folder / "metrics.json"
            results.append(diffprune.evaluate(folder / "embeddings", embeddings, metrics, kept=kept, name=name))
    with step("write the report"):
        diffprune.report(
            out / "report.html",
            title="Pruning 5,000 MNIST digits to 500",
            shards=shards,
            scores=[scores],
            clusters=clusters,
            selections={name: kept for name, kept in training_sets.items() if kept is not None},
            samples=sampled,
            metrics=[out / "samples" / slug(name) / "metrics.json" for name in training_sets],
            logs={name: run / "log.jsonl" for name, run in runs.items()},
        )
    return results


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "frechet_distance": ("FD ↓", "{:.4f}".format),
    "precision": ("prec. ↑", "{:.3f}".format),
    "recall": ("recall ↑", "{:.3f}".format),
    "f_score": ("F ↑", "{:.3f}".format),
    "vendi_score": ("Vendi", "{:.1f}".format),
    "memorization_ratio": ("novelty", "{:.2f}".format),
    "label_agreement": ("label ↑", "{:.1%}".format),
    "class_kl_uniform": ("KL ↓", "{:.4f}".format),
}
LEGEND = """FD: Fréchet distance to all 5,000 real digits. F: of precision and recall. Vendi: effective number of
different images. novelty: distance to the nearest training image, over that of images the model was not trained
on (well under 1: copies). label: share recognised as the digit asked for. KL: class imbalance. One training run
each: small differences decide nothing. The report says more."""


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="After equal training steps, 1,000 generated digits each")
    table.add_column("trained on", no_wrap=True)
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        metrics = result["metrics"]
        cells = ["–" if metrics[c] is None else show(metrics[c]) for c, (_, show) in COLUMNS.items()]
        table.add_row(result["name"], *cells)
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(LEGEND.replace("\n", " "), style="dim", highlight=False)


def slug(name: str) -> str:
    """``cluster-nearest 10%`` -> ``cluster-nearest-10``."""
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower()).strip("-")


@contextmanager
def step(title: str) -> Iterator[None]:
    start = time.monotonic()
    print(f"→ {title}", flush=True)
    yield
    print(f"  {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
