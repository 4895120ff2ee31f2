"""What a sweep compares, and how: a TOML file, every key of it checked.

[data]            DataConfig: images to pack, or shards; what is held out
[vqvae.model], [vqvae.loss], [vqvae.train]  as for `diffprune train vqvae`; or [vqvae] path = a checkpoint or run
[dit.model], [dit.train]              as for `diffprune train dit`: the model of every cell
[surrogate.model], [surrogate.train]  what differs from [dit]; or [surrogate] path = a run
[vqvae], [dit], [surrogate]           config = a TOML file beside this one; the tables then say what differs
[score]           ScoreConfig
[cluster]         ClusterConfig
[sample]          SampleConfig
[evaluate]        EvaluateConfig
[sweep]           GridConfig: methods × ratios × seeds
[methods.NAME]    a method of your own: order, by, within, per, shares of `diffprune select`
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffprune.config import DitRun, VqvaeRun, read_toml, run_from_tables, section_from_table, to_dict
from diffprune.errors import InputError
from diffprune.generation import check_guidance, label_sequence
from diffprune.storage import AnyPath, as_path
from diffprune.sweeping.methods import METHODS, Method, check_methods, own_methods


@dataclass(frozen=True)
class DataConfig:
    """The images: a source that is packed first, or shards."""

    source: str = ""
    """What `diffprune pack` takes: a folder of class folders, a parquet, or mnist5k."""
    resize: int = 0
    """As for `diffprune pack`; 0 keeps the images as they are."""
    shards: str | tuple[str, ...] = ""
    """Shards that are there already, instead of a source: a pattern, folder, tar or list file, or several of them."""
    held_out: float = 0.0
    """Share of each class that nothing is trained on. It is drawn first, by key."""
    held_out_shards: str | tuple[str, ...] = ""
    """Shards of such images, instead of a share."""
    skew: float = 1.0
    """Make a long tail: how many times as many images the most frequent class keeps as the rarest, in equal steps of a
    ratio from class to class in order of labels. 1 leaves all. Held-out images stay as they are."""
    seed: int = 0
    """Of what is held out, and of what a long tail leaves."""


@dataclass(frozen=True)
class ScoreConfig:
    """Arguments of `diffprune score`."""

    seed: int = 0
    draws: int = 1
    antithetic: bool = False
    normalise_t: bool = False
    moso_mode: Literal["paper", "loo1", "authors"] = "paper"
    weights: Literal["model", "ema"] = "model"
    precision: Literal["float32", "bf16"] = "float32"
    batch_size: int = 64


@dataclass(frozen=True)
class ClusterConfig:
    """What clusters are made of: `diffprune embed` and `diffprune cluster`."""

    model: str = "vqvae"
    """As for `diffprune embed`; "vqvae" is the sweep's own, "classifier" one that is trained on the labels."""
    k: int = 24
    seed: int = 0
    init: str = "k-means||"
    metric: str = "euclidean"


@dataclass(frozen=True)
class SampleConfig:
    """Arguments of `diffprune sample`. The seed is that of every cell: the same noise for all models."""

    count: int = 1000
    steps: int = 50
    method: Literal["euler", "midpoint", "heun"] = "euler"
    guidance: float = 1.0
    labels: str = "uniform"
    seed: int = 0
    batch_size: int = 256
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class EvaluateConfig:
    """What generated images are compared with, and in which features."""

    model: str = "vqvae"
    """As for `diffprune embed`; "vqvae" is the sweep's own, "classifier" one that is trained on the labels."""
    reference: Literal["train", "held-out"] = "train"
    """Which real images: those that selections are made from, or those that nothing is trained on."""
    k: int = 3
    limit: int = 50_000
    seed: int = 0


@dataclass(frozen=True)
class GridConfig:
    """Methods × ratios × seeds. All of it may be extended later in the same folder."""

    methods: tuple[str, ...] = ()
    prune: tuple[float, ...] = ()
    """Fractions that are left out, above 0 and below 1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of a cell's training, and of what is random in its selection."""
    full: bool = True
    """Also train on all images, once a seed."""
    threads: int = 1
    """CPU threads of a cell. More of them sum in another order, so they are part of what a result depends on."""
    title: str = ""


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep. ``vqvae`` and ``surrogate`` are what to train, or the path of what was."""

    data: DataConfig
    vqvae: VqvaeRun | str
    dit: DitRun
    surrogate: DitRun | str
    score: ScoreConfig = field(default_factory=ScoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sweep: GridConfig = field(default_factory=GridConfig)
    own_methods: Mapping[str, Method] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """The method of that name."""
        return self.own_methods.get(name) or METHODS[name]

    def identity(self) -> dict[str, Any]:
        """Everything that a cell's result depends on beside its method, ratio and seed; JSON-able."""
        told = {name: asdict(getattr(self, name)) for name in ("data", "score", "cluster", "sample", "evaluate")}
        told["data"] = {key: list(value) if isinstance(value, tuple) else value for key, value in told["data"].items()}
        if self.sample.precision == "float32":  # as before there was a choice
            del told["sample"]["precision"]
        for name in ("vqvae", "dit", "surrogate"):
            run = getattr(self, name)
            told[name] = run if isinstance(run, str) else to_dict(run)
        return {**told, "threads": self.sweep.threads}


_SECTIONS = {
    "data": DataConfig,
    "score": ScoreConfig,
    "cluster": ClusterConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "sweep": GridConfig,
}


def load_sweep(path: str | os.PathLike) -> SweepConfig:
    """Read a sweep's TOML file.

    Raises InputError, naming the file and the key, for anything unknown, missing, of another type or out of range; for
    an unknown method it lists the known ones.
    """
    path = as_path(path)
    document, where = read_toml(path), str(path)
    known = [*_SECTIONS, "vqvae", "dit", "surrogate", "methods"]
    for name in document:
        if name not in known:
            raise InputError(f"{where}: unknown section {name!r}; known: {', '.join(known)}")
    parts = {
        name: section_from_table(section, document.get(name, {}), f"{where}: [{name}]")
        for name, section in _SECTIONS.items()
    }
    beside = path.parent
    dit_tables = _run_tables(document.get("dit", {}), {}, beside, f"{where}: [dit]")
    config = SweepConfig(
        **parts,
        vqvae=_run_or_path("vqvae", document.get("vqvae", {}), {}, beside, f"{where}: [vqvae]"),
        dit=run_from_tables("dit", dit_tables, f"{where}: [dit]"),
        surrogate=_run_or_path("dit", document.get("surrogate", {}), dit_tables, beside, f"{where}: [surrogate]"),
        own_methods=own_methods(document.get("methods", {}), where),
    )
    _check(config, where)
    return config


def _tables(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected a table, found {value!r}")
    return dict(value)


def _run_or_path(kind: str, value: Any, defaults: Mapping[str, Any], beside: AnyPath, where: str) -> Any:
    """A run whose missing keys are those of ``defaults``, or the text of ``path``."""
    tables = _tables(value, where)
    if "path" in tables:
        if len(tables) > 1 or not isinstance(tables["path"], str) or not tables["path"]:
            raise InputError(f"{where}: path: expected the path of a run and nothing beside it, found {tables!r}")
        return tables["path"]
    return run_from_tables(kind, _run_tables(tables, defaults, beside, where), where)


def _run_tables(value: Any, defaults: Mapping[str, Any], beside: AnyPath, where: str) -> dict[str, Any]:
    """The tables of a run: those of ``defaults``, over them the file's that ``config`` names, over them its own."""
    own = _tables(value, where)
    name = own.pop("config", None)
    if name is not None and not isinstance(name, str):
        raise InputError(f"{where}: config: expected the name of a TOML file, found {name!r}")
    merged: dict[str, Any] = {}
    for layer in (defaults, {} if name is None else read_toml(beside / name), own):
        for section, values in layer.items():
            merged[section] = {**merged.get(section, {}), **_tables(values, f"{where}: {section}")}
    return merged


def _check(config: SweepConfig, where: str) -> None:
    data, grid, sample = config.data, config.sweep, config.sample

    def expect(good: Any, key: str, expected: str, value: Any) -> None:
        if not good:
            raise InputError(f"{where}: {key}: expected {expected}, found {value!r}")

    expect(bool(data.source) != bool(data.shards), "data", "source or shards, one of the two", asdict(data))
    expect(data.resize >= 0, "data.resize", "0 or more", data.resize)
    expect(not (data.resize and data.shards), "data.resize", "0 with shards, which are taken as they are", data.resize)
    expect(0 <= data.held_out < 1, "data.held_out", "a share from 0 to below 1", data.held_out)
    expect(not (data.held_out and data.held_out_shards), "data.held_out", "0 with held_out_shards", data.held_out)
    expect(1 <= data.skew < float("inf"), "data.skew", "a ratio of 1 or more", data.skew)
    for section in ("data", "score", "cluster", "sample", "evaluate"):
        seed = getattr(config, section).seed
        expect(0 <= seed < 2**32, f"{section}.seed", "0 to 2**32 - 1", seed)
    for key, value, least in (
        ("score.draws", config.score.draws, 1),
        ("score.batch_size", config.score.batch_size, 1),
        ("cluster.k", config.cluster.k, 1),
        ("sample.count", sample.count, config.evaluate.k + 1),
        ("sample.steps", sample.steps, 1),
        ("sample.batch_size", sample.batch_size, 1),
        ("evaluate.k", config.evaluate.k, 1),
        ("evaluate.limit", config.evaluate.limit, config.evaluate.k + 1),
        ("sweep.threads", grid.threads, 1),
    ):
        expect(value >= least, key, f"{least} or more", value)
    has_held_out = bool(data.held_out or data.held_out_shards)
    expect(
        config.evaluate.reference == "train" or has_held_out,
        "evaluate.reference",
        "'train' where data has neither held_out nor held_out_shards",
        config.evaluate.reference,
    )
    check_methods(grid.methods, {**METHODS, **config.own_methods}, f"{where}: sweep.methods")
    expect(grid.full or grid.methods, "sweep.methods", "at least one, or full = true", list(grid.methods))
    expect(grid.prune or not grid.methods, "sweep.prune", "ratios, such as [0.5, 0.9]", list(grid.prune))
    expect(all(0 < ratio < 1 for ratio in grid.prune), "sweep.prune", "ratios above 0 and below 1", list(grid.prune))
    expect(grid.seeds, "sweep.seeds", "at least one", list(grid.seeds))
    expect(all(0 <= seed < 2**32 for seed in grid.seeds), "sweep.seeds", "0 to 2**32 - 1", list(grid.seeds))
    for key in ("prune", "seeds"):
        values = getattr(grid, key)
        expect(len(set(values)) == len(values), f"sweep.{key}", "each value once", list(values))
    expect(config.dit.train.seed == 0, "dit.train.seed", "none: sweep.seeds are a cell's seeds", config.dit.train.seed)
    _check_stages(config, where, expect)


def _check_stages(config: SweepConfig, where: str, expect: Callable[..., None]) -> None:
    """What a stage would refuse only after those before it have trained for days, and no other config could go on."""
    try:
        check_guidance(config.sample.guidance, config.sample.labels, config.dit.model)
        label_sequence(config.sample.labels, config.dit.model)
    except InputError as error:
        raise InputError(f"{where}: sample.{error}") from None
    vqvae, surrogate = config.vqvae, config.surrogate
    for name, run in (("dit", config.dit), ("surrogate", surrogate)):
        if not isinstance(run, str) and not isinstance(vqvae, str):
            side = vqvae.model.image_size // vqvae.model.downsampling
            made, taken = (vqvae.model.latent_channels, side, side), run.model.latent_shape
            told = f"in_channels, input_size and input_size as in the latents {list(made)} of [vqvae.model]"
            expect(taken == made, f"{name}.model", told, list(taken))
    if isinstance(surrogate, str):
        return
    averages = config.score.weights == "model" or surrogate.train.ema_decay
    expect(averages, "score.weights", "'model' with surrogate.train.ema_decay = 0", config.score.weights)
    if any("monotonicity" in config.method(name).columns for name in config.sweep.methods):
        every, steps = surrogate.train.checkpoint_every, surrogate.train.steps
        expect(every < steps, "surrogate.train.checkpoint_every", f"below {steps}: monotonicity needs 2 of them", every)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ, with both values."""
    lines = []
    for key in sorted({*found, *expected}):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key} was {there!r}, is now {here!r}")
    return lines


def with_device(run: DitRun | VqvaeRun, device: str, **train: Any) -> Any:
    """A run on this device, with other values of ``train``."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, device=device, **train))
