"""What a training run is: dataclasses, and the TOML files that mirror them field by field.

    [model]              # VqvaeConfig or DitConfig
    hidden_size = 128
    [loss]               # LossConfig, of a VQ-VAE
    lpips_weight = 1.0
    [train]              # TrainConfig
    steps = 1000

Defaults are those of the MNIST demo (``DiT``'s own are the published ones). Every value is checked on construction.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, overload

from diffprune.config_autoencoder import LossConfig, VqvaeConfig
from diffprune.config_checks import as_known, expect
from diffprune.errors import InputError, short
from diffprune.storage import as_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DitConfig:
    """A DiT's architecture: the arguments of ``models.dit.DiT``, with the published names."""

    input_size: int = 8
    """Height and width of a latent, a multiple of patch_size."""
    patch_size: int = 2
    """Height and width of the patch that makes one token."""
    in_channels: int = 2
    """Channels of a latent."""
    hidden_size: int = 64
    """Length of a token, a multiple of num_heads and of 4."""
    depth: int = 5
    """Number of blocks."""
    num_heads: int = 2
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Inner size of a block's MLP, over hidden_size."""
    class_dropout_prob: float = 0.1
    """How often training replaces a label by the null label; 0 makes a model without one (no guidance)."""
    num_classes: int = 10
    """Number of labels; 0 makes an unconditional model."""
    learn_sigma: bool = False
    """Have C output channels more, as published checkpoints do; nothing uses them."""
    time_scale: float = 1000.0
    """What t in [0, 1] is multiplied by before its embedding: 1 in published SiTs. A small model learns faster with
    1000, where the embedding's frequencies (up to 1) tell times apart."""
    label_init_std: float = 0.2
    """Standard deviation of the label table's initial values: 0.02 as published. A narrow model learns faster with
    more."""
    qk_norm: bool = False
    """LayerNorm on each head's queries and keys (arXiv 2302.05442). Published DiTs and SiTs have none."""
    rope: bool = False
    """Also turn queries and keys by the token's row and column (arXiv 2104.09864, in two axes); a head's size is then
    a multiple of 4. Published DiTs and SiTs have the position embedding alone."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the latents that the model takes."""
        return self.in_channels, self.input_size, self.input_size

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None if the model has none."""
        return self.num_classes if self.num_classes and self.class_dropout_prob > 0 else None

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            expect(getattr(self, name) >= 1, self, name, "at least 1")
        patch, heads = self.patch_size, self.num_heads
        expect(self.input_size % patch == 0, self, "input_size", f"a multiple of patch_size {patch}")
        expect(self.hidden_size % heads == 0, self, "hidden_size", f"a multiple of num_heads {heads}")
        expect(self.hidden_size % 4 == 0, self, "hidden_size", "a multiple of 4")
        if self.rope:
            expect(self.hidden_size // heads % 4 == 0, self, "hidden_size", f"a multiple of {4 * heads} with rope")
        expect(1 <= self.hidden_size * self.mlp_ratio < math.inf, self, "mlp_ratio", "a positive number")
        expect(0 <= self.class_dropout_prob < 1, self, "class_dropout_prob", "at least 0 and below 1")
        expect(self.num_classes >= 0, self, "num_classes", "at least 0")
        expect(0 < self.time_scale < math.inf, self, "time_scale", "a positive number")
        expect(0 <= self.label_init_std < math.inf, self, "label_init_std", "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Optimizer steps in all. A run can be resumed with more."""
    batch_size: int = 64
    """Samples per step."""
    lr: float = 1e-3
    """AdamW's learning rate η, constant after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to lr."""
    weight_decay: float = 0.0
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest L2 norm of a step's gradient; 0 does not clip."""
    ema_decay: float = 0.9999
    """Of the moving average of the weights, min(ema_decay, (1 + step) / (10 + step)); 0 keeps none."""
    seed: int = 0
    """Of the initial weights, the order of samples, times, noise and label dropout."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    log_every: int = 10
    """Steps between lines of log.jsonl, each with the mean of their losses."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto is bfloat16 on a GPU that has it, else float32. Weights are float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    accumulate: int = 1
    """Parts in which a process computes its share of a batch, one after the other: less memory, the same step but for
    rounding."""
    activation_checkpointing: bool = False
    """Keep only what enters each block of a DiT and compute the block again for its gradient: less memory, a third
    more operations, the same step."""
    compile: bool = False
    """torch.compile each block of a DiT: the same step but for rounding, after a minute or so of compiling."""
    timesteps: Literal["uniform", "lognormal"] = "uniform"
    """How a DiT's times are drawn: uniform in [0, 1), or lognormal: 1 / (1 + exp(-z)) with z normal (logit-normal,
    arXiv 2403.03206), more in the middle."""
    flip: bool = False
    """Mirror half of the samples, drawn anew each time: images, or latents that `encode --flip-twins` wrote."""
    explosion_factor: float = 20.0
    """Stop when the loss is this many times the median of the last 100 steps; 0 never does."""
    noise: Literal["generator", "counter"] = "generator"
    """Where a DiT's noise comes from: drawn for the whole batch ahead of the step, or made on the device, in each pass
    over it, from a counter (``kernels.philox``), which is never stored and which `flow_matching_loss` needs."""
    ops: Literal["auto", "torch", "diffprune", "reference", "triton"] = "auto"
    """Form of a DiT's attention, adaLN and loss, see ``models.ops``: PyTorch's, this package's ops, or one
    implementation of those by name; auto is what measured faster. The same step but for rounding."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each has all weights, or its part of them (FSDP2, block by block): less memory, more
    traffic, the same step but for rounding."""
    sample_every: int = 0
    """Steps between grids of images that a DiT draws, samples/step_*.png; the last step then has one too. Needs the
    VQ-VAE of its latents. 0 draws none."""
    tensorboard: bool = False
    """Also write the log for TensorBoard, into the folder tensorboard/."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "accumulate"):
            expect(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "sample_every"):
            expect(0 <= getattr(self, name) < math.inf, self, name, "at least 0")
        expect(self.accumulate <= self.batch_size, self, "accumulate", f"at most batch_size {self.batch_size}")
        factor = self.explosion_factor
        expect(factor == 0 or 1 < factor < math.inf, self, "explosion_factor", "0, or a number above 1")
        expect(0 < self.lr < math.inf, self, "lr", "a positive number")
        expect(0 <= self.ema_decay < 1, self, "ema_decay", "at least 0 and below 1")
        expect(0 <= self.seed < 2**32, self, "seed", "at least 0 and below 2**32")
        precisions = ("auto", "float32", "bfloat16")
        object.__setattr__(self, "precision", as_known(self.precision, precisions))
        expect(self.precision in precisions, self, "precision", f"one of {', '.join(precisions)}")


@dataclass(frozen=True)
class VqvaeRun:
    """All that ``train_vqvae`` needs to know beside the data."""

    model: VqvaeConfig = field(default_factory=VqvaeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(ema_decay=0.0))

    def __post_init__(self) -> None:
        if self.train.ema_decay:
            raise InputError(
                f"train.ema_decay: expected 0 for a VQ-VAE, whose codebook follows its own weights, "
                f"got {self.train.ema_decay}"
            )
        for name in ("activation_checkpointing", "compile"):
            if getattr(self.train, name):
                raise InputError(f"train.{name}: expected false for a VQ-VAE: it is done by a DiT's blocks")
        if self.train.timesteps != "uniform":
            raise InputError(f"train.timesteps: a VQ-VAE draws no times, got {self.train.timesteps!r}")
        plain = {"noise": ("generator",), "ops": ("auto", "torch"), "sharding": ("ddp",), "sample_every": (0,)}
        for name, values in plain.items():
            if getattr(self.train, name) not in values:
                raise InputError(f"train.{name}: is a DiT's, got {getattr(self.train, name)!r} for a VQ-VAE")
        if self.loss.adversarial_weight and self.train.accumulate > 1:
            raise InputError(
                f"train.accumulate: expected 1 with loss.adversarial_weight, got {self.train.accumulate}: the adaptive "
                "weight is one of the whole batch"
            )
        # Below: 2 more convolutions of kernel 4, stride 1, padding 1, each of which takes a row and a column away.
        patches = (self.model.image_size >> self.loss.discriminator_layers) - 2
        if self.loss.adversarial_weight and patches < 1:
            raise InputError(
                f"loss.discriminator_layers: {self.loss.discriminator_layers} halvings leave no patch of images of "
                f"{self.model.image_size} pixels; use fewer"
            )


@dataclass(frozen=True)
class DitRun:
    """All that ``train_dit`` needs to know beside the data."""

    model: DitConfig = field(default_factory=DitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


Run = VqvaeRun | DitRun
Section = typing.TypeVar("Section")
Changes = dict[tuple[str, str], Any]
_RUNS = {"vqvae": VqvaeRun, "dit": DitRun}
# Fields that came after the first checkpoints, and what those were made with.
_TRAIN_BEFORE = {"accumulate": 1, "activation_checkpointing": False, "compile": False, "timesteps": "uniform"}
_TRAIN_BEFORE |= {"flip": False, "explosion_factor": 0.0, "noise": "generator", "ops": "torch", "sharding": "ddp"}
_TRAIN_BEFORE |= {"sample_every": 0, "tensorboard": False}
_VQVAE_BEFORE = {"normalize_codes": False, "kind": "vq", "backbone": "compact", "attention_levels": ()}
_VQVAE_BEFORE |= {"mid_attention": True, "norm_groups": 32, "z_channels": 0, "latent_shift": 0.0}
_MODEL_BEFORE = {"vqvae": _VQVAE_BEFORE, "dit": {"qk_norm": False, "rope": False}}
_LOSS_BEFORE = {"pixel": "l2", "kl_weight": 1e-6, "lpips_weight": 0.0, "adversarial_weight": 0.0}
_LOSS_BEFORE |= {"lpips_linear": "vgg.pth", "lpips_vgg16": "vgg16-397923af.pth", "adversarial_start": 0}
_LOSS_BEFORE |= {"discriminator_channels": 64, "discriminator_layers": 3}


@overload
def load_config(path: str | os.PathLike | None, kind: Literal["vqvae"], overrides: Iterable[str] = ()) -> VqvaeRun: ...


@overload
def load_config(path: str | os.PathLike | None, kind: Literal["dit"], overrides: Iterable[str] = ()) -> DitRun: ...


def load_config(path: str | os.PathLike | None, kind: Literal["vqvae", "dit"], overrides: Iterable[str] = ()) -> Run:
    """Read a TOML file and apply overrides; what neither names keeps its default.

    Args:
        path: the TOML file, or None for the defaults.
        kind: what is trained.
        overrides: ``section.field=value`` with a TOML value, such as ``train.steps=100`` or
            ``model.channel_multipliers=[1, 2]``; a bare word is a string. Later ones win.

    Raises:
        InputError: no such file, malformed TOML, an unknown section or field, a value of another type or out of
            range; it names the file or override and what was expected.
    """
    run, path = _run_type(kind)(), None if path is None else as_path(path)
    changes: list[Changes] = []
    if path is not None:
        changes.append(_changes(run, read_toml(path), str(path)))
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"override {short(override)}: expected section.field=value, such as train.steps=100")
        changes.append(_changes(run, {section: {key: _toml_value(text.strip())}}, f"override {short(override)}"))
    return _apply(run, changes, "config" if path is None else str(path))


def run_from_tables(kind: Literal["vqvae", "dit"], sections: Any, where: str) -> Run:
    """A run from TOML tables ``model`` and ``train``; what they do not name keeps its default. Raises as
    ``load_config``; ``where`` is what it names."""
    run = _run_type(kind)()
    return _apply(run, [_changes(run, sections, where)], where)


def section_from_table(section: type[Section], values: Any, where: str) -> Section:
    """A dataclass from a TOML table whose keys are its fields; what it does not name keeps its default."""
    types = typing.get_type_hints(section)
    items = _named(values, section, where, "key")
    return section(**{key: _convert(value, types[key], f"{where}: {key}") for key, value in items})


def to_dict(run: Run) -> dict[str, dict[str, Any]]:
    """A run as JSON-able ``{"model": {...}, "train": {...}, ...}``; ``from_dict`` turns it back."""
    sections = dataclasses.asdict(run)
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in sections.items()
    }


def from_dict(kind: Literal["vqvae", "dit"], sections: Any, where: str) -> Run:
    """A run from what ``to_dict`` gave, every field of it: a default of today must not stand in for what was used.

    Fields that did not exist when it was given stand for what was done then. ``where`` (a file) is named in the
    InputError if it does not fit.
    """
    run = _run_type(kind)()
    before = {("model", key): value for key, value in _MODEL_BEFORE[kind].items()}
    before |= {("train", key): value for key, value in _TRAIN_BEFORE.items()}
    if kind == "vqvae":
        before |= {("loss", key): value for key, value in _LOSS_BEFORE.items()}
    changes = before | _changes(run, sections, where)
    for section, values in to_dict(run).items():
        for key in values:
            if (section, key) not in changes:
                raise InputError(f"{where}: {section}.{key} is missing")
    return _apply(run, [changes], where)


def _run_type(kind: str) -> type[Run]:
    if kind not in _RUNS:
        raise InputError(f"kind: expected {' or '.join(_RUNS)}, got {kind!r}")
    return _RUNS[kind]


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """A TOML document; InputError that names the file if there is none, or it is malformed."""
    path = as_path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path}: not a readable TOML file ({error})") from error


def _toml_value(text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also of a number of thousands of digits
        return text
    return document["value"] if len(document) == 1 else text  # of several lines, further keys


def _changes(run: Run, sections: Any, where: str) -> Changes:
    """The (section, key) -> value of a TOML document, each checked against the field's declared type."""
    changes = {}
    for section, values in _named(sections, run, where, "section"):
        config = getattr(run, section)
        types = typing.get_type_hints(type(config))
        for key, value in _named(values, config, f"{where}: [{section}]", "key"):
            changes[section, key] = _convert(value, types[key], f"{where}: {section}.{key}")
    return changes


def _apply(run: Run, changes: Iterable[Changes], where: str) -> Run:
    """All at once, because one field's range may depend on another's value."""
    merged = {name: value for part in changes for name, value in part.items()}
    try:
        for section in dict.fromkeys(section for section, _ in merged):
            values = {key: value for (owner, key), value in merged.items() if owner == section}
            run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **values)})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return run


def _named(values: Any, owner: Any, where: str, what: str) -> Iterable[tuple[str, Any]]:
    """The items of a table, whose keys must be fields of ``owner``."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a table, found {values!r}")
    known = [f.name for f in dataclasses.fields(owner)]
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown {what} {key!r}; known: {', '.join(known)}")
    return values.items()


def _convert(value: Any, expected: Any, where: str) -> Any:
    fits = type(value) is not int or -(2**63) <= value < 2**63  # as tensors and files hold
    if expected is float and type(value) in (int, float) and fits:
        return float(value)
    if expected in (int, bool, str) and type(value) is expected and fits:
        return value
    if typing.get_origin(expected) is Literal and isinstance(value, str):
        value = as_known(value, typing.get_args(expected))
    if typing.get_origin(expected) is Literal and value in typing.get_args(expected):
        return value
    if typing.get_origin(expected) is tuple and isinstance(value, list):
        return tuple(_convert(item, typing.get_args(expected)[0], where) for item in value)
    for one in typing.get_args(expected) if typing.get_origin(expected) is UnionType else ():
        with suppress(InputError):
            return _convert(value, one, where)
    found = short(value) if fits else "a number beyond 64 bits"
    raise InputError(f"{where}: expected {_described(expected)}, found {found}")


def _described(expected: Any) -> str:
    if typing.get_origin(expected) is UnionType:
        return " or ".join(map(_described, typing.get_args(expected)))
    if typing.get_origin(expected) is Literal:
        return " or ".join(map(repr, typing.get_args(expected)))
    if typing.get_origin(expected) is tuple:
        return f"a list of {typing.get_args(expected)[0].__name__}"
    return f"a{'n' if expected is int else ''} {expected.__name__}"
