"""The stages that all cells use, computed once: packing, VQ-VAE, latents, features, clusters, surrogate, scores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffprune.clustering import cluster
from diffprune.encoding import embed, encode
from diffprune.errors import BusyError, InputError
from diffprune.files import read_json, write_json
from diffprune.locks import folder_lock
from diffprune.models.classifier import train_classifier
from diffprune.packing import pack
from diffprune.pruning import prune
from diffprune.scoring import score
from diffprune.shards import ShardSpec
from diffprune.sweeping.settings import SweepConfig, with_device
from diffprune.sweeping.splits import split_samples
from diffprune.training import train_dit, train_vqvae

DONE_FILE = "shared.json"
WAIT_SECONDS = 5.0
# Score columns that one pass over the last checkpoint gives, and those that need every checkpoint.
_GROUPS = {"last": ("loss", "el2n", "grand"), "moso": ("moso",), "monotonicity": ("monotonicity",)}


@dataclass(frozen=True)
class Shared:
    """Where the shared stages of a sweep lie."""

    config: SweepConfig
    root: Path

    @property
    def packed(self) -> ShardSpec:
        return self.config.data.shards or self.root / "packed"

    @property
    def is_split(self) -> bool:
        return bool(self.config.data.held_out) or self.config.data.skew > 1

    @property
    def train_shards(self) -> ShardSpec:
        """The images that selections are made from."""
        return self.root / "train" if self.is_split else self.packed

    @property
    def held_out_shards(self) -> ShardSpec | None:
        """The images that nothing is trained on."""
        if self.config.data.held_out:
            return self.root / "held-out"
        return self.config.data.held_out_shards or None

    @property
    def vqvae(self) -> str | os.PathLike:
        return self.config.vqvae if isinstance(self.config.vqvae, str) else self.root / "vqvae"

    @property
    def surrogate(self) -> str | os.PathLike:
        return self.config.surrogate if isinstance(self.config.surrogate, str) else self.root / "surrogate"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def embeddings(self) -> Path:
        """What clusters are made of."""
        return self.root / "embeddings"

    @property
    def clusters(self) -> Path:
        return self.root / "clusters"

    def features(self, split: str) -> Path:
        """What generated images are compared with: of "train" or "held-out"."""
        return self.root / "features" / split

    def scores(self, group: str) -> Path:
        return self.root / "scores" / group

    def embedder(self, model: str) -> str:
        """What ``embed`` has to be given for a model of the config."""
        own = {"vqvae": f"vqvae:{self.vqvae}", "classifier": f"classifier:{self.root / 'classifier'}"}
        return own.get(model, model)

    def tables(self, columns: set[str]) -> list[Path]:
        """The folders of tables that hold these columns; the latents' own is the first."""
        folders = [self.latents]
        folders += [self.scores(group) for group, names in _GROUPS.items() if columns.intersection(names)]
        return folders + ([self.clusters] if columns.intersection(("cluster", "distance")) else [])


Step = tuple[str, Callable[[], Any]]


def prepare(shared: Shared, device: str) -> dict[str, Any]:
    """Compute what the sweep's methods need and is not there yet; one process at a time. Returns what was done."""
    steps = list(_steps(shared, device))
    names = [name for name, _ in steps]
    while not set(names) <= set(_done(shared)):
        try:
            with folder_lock(shared.root):
                for _, step in steps:  # each skips what was finished before
                    step()
                write_json(shared.root / DONE_FILE, {"stages": sorted({*names, *_done(shared)})})
        except BusyError:  # another process of this sweep is at it
            time.sleep(WAIT_SECONDS)
    return {"stages": names}


def _steps(shared: Shared, device: str) -> Iterator[Step]:
    config, root = shared.config, shared.root
    data = config.data
    methods = [config.method(name) for name in config.sweep.methods]
    columns = set().union(*(method.columns for method in methods))
    if data.source:
        yield "pack", lambda: pack(data.source, root / "packed", resize=data.resize or None)
    if shared.is_split:
        yield "split", lambda: _split(shared)
    if not isinstance(config.vqvae, str):
        yield "vqvae", lambda: train_vqvae(with_device(config.vqvae, device), shared.train_shards, root / "vqvae")
    runs = [run for run in (config.dit, config.surrogate) if not isinstance(run, str)]
    twins = any(run.train.flip for run in runs)
    yield (
        "latents",
        lambda: encode(shared.train_shards, shared.vqvae, shared.latents, flip_twins=twins, device=device),
    )
    clustered = bool(columns & {"cluster", "distance"})
    embedded = clustered or any(method.needs_embeddings for method in methods)
    if "classifier" in (config.evaluate.model, config.cluster.model if embedded else ""):
        size = data.resize or None
        yield (
            "classifier",
            lambda: train_classifier(shared.train_shards, root / "classifier", image_size=size, device=device),
        )
    if embedded:
        model = shared.embedder(config.cluster.model)
        yield "embeddings", lambda: embed(shared.train_shards, shared.embeddings, model=model, device=device)
    if clustered:
        c = config.cluster
        options: dict[str, Any] = {"k": c.k, "seed": c.seed, "init": c.init, "metric": c.metric}
        yield "clusters", lambda: cluster(shared.embeddings, shared.clusters, **options)
    for split, shards in (("train", shared.train_shards), ("held-out", shared.held_out_shards)):
        if split in ("train", config.evaluate.reference):
            yield f"features of {split}", _features(shared, split, shards, device)
    groups = [group for group, names in _GROUPS.items() if columns.intersection(names)]
    if groups and not isinstance(config.surrogate, str):
        run = with_device(config.surrogate, device, sample_every=0)
        yield "surrogate", lambda: train_dit(run, shared.latents, root / "surrogate")
    for group in groups:
        yield f"scores {group}", _scores(shared, group, device)


def _split(shared: Shared) -> None:
    data, root = shared.config.data, shared.root
    train, held_out = root / "train.parquet", root / "held-out.parquet"
    split_samples(shared.packed, train, held_out, share=data.held_out, skew=data.skew, seed=data.seed)
    prune(train, shared.packed, root / "train")
    if data.held_out:
        prune(held_out, shared.packed, root / "held-out")


def _features(shared: Shared, split: str, shards: ShardSpec | None, device: str) -> Callable[[], Any]:
    model = shared.embedder(shared.config.evaluate.model)
    return lambda: embed(shards, shared.features(split), model=model, device=device)


def _scores(shared: Shared, group: str, device: str) -> Callable[[], Any]:
    s = shared.config.score
    options: dict[str, Any] = {"seed": s.seed, "draws": s.draws, "antithetic": s.antithetic, "weights": s.weights}
    options |= {"normalise_t": s.normalise_t, "moso_mode": s.moso_mode, "precision": s.precision}
    options |= {"batch_size": s.batch_size, "device": device, "methods": _GROUPS[group]}
    return lambda: score(shared.latents, shared.surrogate, shared.scores(group), **options)


def _done(shared: Shared) -> list[str]:
    path = shared.root / DONE_FILE
    if not path.is_file():
        return []
    found = read_json(path)
    stages = found.get("stages") if isinstance(found, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        raise InputError(
            f"{path}: expected the names of finished stages, found something else; delete it and run again"
        )
    return stages
