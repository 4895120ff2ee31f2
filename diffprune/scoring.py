"""``score``: latents and a surrogate's checkpoints -> score tables."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import list_checkpoints, load_dit, read_state
from diffprune.device import pick_device
from diffprune.draws import MASK, hash_keys
from diffprune.engines import run_stage
from diffprune.errors import InputError
from diffprune.progress import Progress
from diffprune.scores.batches import Draws, Samples
from diffprune.scores.grand import GRAND, grand_scores
from diffprune.scores.loss import EL2N, LOSS, loss_scores
from diffprune.scores.mean_gradients import GradientSum, MeanGradients
from diffprune.scores.monotonicity import MONOTONICITY, monotonicity
from diffprune.scores.moso import MODES, MOSO, gradient_products, gradient_sum, moso
from diffprune.scores.random import RANDOM, random_scores
from diffprune.tables import BASE_COLUMNS

METHODS = ("random", "loss", "el2n", "grand", "moso", "monotonicity")
OF_LAST_CHECKPOINT = {"loss", "el2n", "grand"}
OF_ALL_CHECKPOINTS = {"moso", "monotonicity"}


def score(
    latents: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    methods: str | Sequence[str] = ("loss", "el2n", "grand"),
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 64,
    moso_mode: str = "paper",
    weights: str = "model",
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Score every sample of a latents folder: one table per shard in ``out``, a float64 column per method.

    Args:
        latents: a folder that ``encode`` wrote.
        checkpoints: the surrogate: a run folder of ``train_dit`` (all its checkpoints), a checkpoint, or several of
            them. ``loss``, ``el2n`` and ``grand`` use the last one, ``moso`` and ``monotonicity`` all.
        out: the folder for the tables. Shards that are done are skipped; a folder with other work is refused.
        methods: any of ``METHODS``. What a column means stands in its metadata.
        seed, draws: every sample is seen at ``draws`` draws of (t, noise), which depend on the seed and its key alone.
        batch_size: about how many rows go through the surrogate at once. It changes scores by rounding at most.
        moso_mode: "paper", "loo1" or "authors", see ``diffprune.scores.moso``.
        weights: which of the surrogate's weights, "model" or "ema".
        dry_run: write nothing, and return how much there is to do.

    Returns: counts (samples, failed, failed_in_scoring, ...). A sample whose score is not finite becomes a failed row
    without scores; the others stand.

    Raises: InputError for latents that do not fit the surrogate (shape, VQ-VAE, labels), too few checkpoints or
    samples, or a bad argument; ResumeError for a folder with other work.
    """
    names = _checked_names(methods, seed, draws, batch_size, moso_mode)
    folder = ArrayFolder(latents, kind="latents")
    config: dict[str, Any] = {"methods": names, "seed": seed, "latents": folder.fingerprint}
    surrogate = None
    if names != ["random"]:
        surrogate = _Surrogate(checkpoints, weights, pick_device(device), not OF_ALL_CHECKPOINTS & set(names))
        surrogate.check(folder)
        if "monotonicity" in names:
            monotonicity(torch.zeros(len(surrogate.paths), 0))  # refuses too few
        config |= {"draws": draws, "weights": weights, "checkpoints": [state["sha256"] for state in surrogate.states]}
    if "moso" in names:
        config["moso_mode"] = moso_mode
    rows, failed_before = _checked_tables(folder, surrogate)
    if "moso" in names and rows - failed_before < 2:
        raise InputError(f"{latents}: moso needs at least 2 samples, found {rows - failed_before}")
    paths = [] if surrogate is None else [str(path) for path in surrogate.paths]
    plan = {"methods": names, "checkpoints": paths, "draws": draws, "sweeps": _sweeps(names, len(paths))}
    means = MeanGradients(Path(out) / "_partials", folder.stems)
    job = _Job(folder, surrogate, means, names, moso_mode, Draws(seed, draws), batch_size)
    metadata = {"checkpoint_paths": paths, "batch_size": batch_size}
    with _full_float32():
        counts = run_stage(
            "score", out, config, folder.stems, job.table, total=rows, metadata=metadata, dry_run=dry_run
        )
    if dry_run:
        return {**counts, **plan}
    means.remove()
    return {**counts, **plan, "failed_in_scoring": counts["failed"] - failed_before}


class _Job:
    """One run of ``score``: the table of a shard and, before the first one, MoSo's first pass over all shards."""

    def __init__(
        self,
        folder: ArrayFolder,
        surrogate: _Surrogate | None,
        means: MeanGradients,
        names: list[str],
        moso_mode: str,
        draws: Draws,
        batch_size: int,
    ) -> None:
        self.folder, self.surrogate, self.means, self.names = folder, surrogate, means, names
        self.moso_mode, self.draws, self.batch_size = moso_mode, draws, batch_size
        self.fields = {field.name: field for field in (RANDOM, LOSS, EL2N, GRAND, MOSO[moso_mode], MONOTONICITY)}

    def table(self, stem: str, bar: Progress) -> pa.Table:
        """Base columns and scores of one shard; null where a sample failed, before or now."""
        if "moso" in self.names:
            self._first_pass(bar)
        base, ok, samples = self._samples(stem)
        scores = {name: values.tolist() for name, values in self._scores(samples, bar).items()}
        status, error = base["status"].to_pylist(), base["error"].to_pylist()
        columns: dict[str, list[float | None]] = {name: [None] * base.num_rows for name in self.names}
        for i, row in enumerate(ok):
            values = {name: scores[name][i] for name in self.names}
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                status[row], error[row] = "failed", f"its {bad[0]} is not finite ({values[bad[0]]})"
            else:
                for name, value in values.items():
                    columns[name][row] = value
        for name, texts in (("status", status), ("error", error)):
            base = base.set_column(base.column_names.index(name), name, pa.array(texts, pa.string()))
        for name, values in columns.items():
            base = base.append_column(self.fields[name], pa.array(values, pa.float64()))
        bar.advance(base.num_rows - len(ok))
        return base

    def _scores(self, samples: Samples, bar: Progress) -> dict[str, Tensor]:
        """Score name -> [n] float64 on the CPU, for the names asked for and maybe others."""
        result = {"random": random_scores(samples.hashes, self.draws.seed)}
        if self.surrogate is None:
            bar.advance(len(samples))
            return result
        advance = _in_shares(bar, len(samples), _sweeps(self.names, len(self.surrogate.paths)))
        arguments = (samples, self.draws, self.batch_size, advance)
        losses, terms = [], []
        for number, state in enumerate(self.surrogate.states):
            if "monotonicity" in self.names:
                losses.append(loss_scores(self.surrogate.model(number), *arguments)["loss"])
            if "moso" in self.names:
                mean, count, mean_sqnorm = self.means.read(number)
                dot, sqnorm = gradient_products(self.surrogate.model(number), mean, *arguments)
                terms.append(moso(self.moso_mode, count, state["total_steps"], state["lr"], dot, mean_sqnorm, sqnorm))
        if OF_LAST_CHECKPOINT & set(self.names):
            of_last = grand_scores if "grand" in self.names else loss_scores
            result |= of_last(self.surrogate.model(-1), *arguments)
        if losses:
            result["monotonicity"] = monotonicity(torch.stack(losses))
        if terms:
            result["moso"] = torch.stack(terms).mean(dim=0)
        return {name: values.cpu() for name, values in result.items()}

    def _first_pass(self, bar: Progress) -> None:
        for number in range(len(self.surrogate.paths)):

            def shard_sum(stem: str, number: int = number) -> GradientSum:
                where = f"checkpoint {number + 1} of {len(self.surrogate.paths)}, {stem}"
                bar.advance(0, note=f"mean gradient: {where}")
                samples = self._samples(stem)[2]
                return gradient_sum(self.surrogate.model(number), samples, self.draws, self.batch_size)

            self.means.make(number, shard_sum)

    def _samples(self, stem: str) -> tuple[pa.Table, list[int], Samples]:
        """A shard's base columns, the rows that are ok, and what the surrogate sees of them."""
        base = self.folder.table(stem).select(BASE_COLUMNS)
        ok = [row for row, status in enumerate(base["status"].to_pylist()) if status == "ok"]
        keys, labels = ([base[name].to_pylist()[row] for row in ok] for name in ("key", "label"))
        if self.surrogate is None:
            return base, ok, Samples(hash_keys(keys), torch.empty(len(ok), 0), None)
        device = self.surrogate.device
        latents = torch.from_numpy(self.folder.array(stem)[ok].astype(np.float32)).to(device)
        given = torch.tensor(labels, dtype=torch.int64, device=device) if self.surrogate.num_classes else None
        return base, ok, Samples(hash_keys(keys, device), latents, given)


class _Surrogate:
    """Checkpoints in order of training. One model at a time is in memory."""

    def __init__(
        self, checkpoints: str | Path | Sequence[str | Path], weights: str, device: torch.device, only_last: bool
    ) -> None:
        given = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else checkpoints
        paths = [path for one in given for path in list_checkpoints(one)]
        if not paths:
            raise InputError("checkpoints: expected a run folder or checkpoints of `diffprune train dit`, got none")
        steps = {path: read_state(path)["step"] for path in paths}
        if len(set(steps.values())) < len(paths):
            raise InputError(f"checkpoints: expected different steps of one run, got {', '.join(map(str, paths))}")
        self.paths = sorted(paths, key=lambda path: steps[path])[-1 if only_last else 0 :]
        self.device = device
        self._load = lru_cache(maxsize=1)(lambda path: load_dit(path, weights=weights, device=device))
        self.states = [self._load(path)[1] for path in self.paths]
        self.num_classes = self.model(-1).num_classes

    def model(self, number: int) -> nn.Module:
        """The model of one checkpoint, in eval mode."""
        return self._load(self.paths[number])[0].eval()

    def check(self, folder: ArrayFolder) -> None:
        """Raise InputError unless the latents have the surrogate's shape and come from its VQ-VAE."""
        found = tuple(folder.metadata["shape"])
        made_by = folder.metadata.get("model_sha256")
        for number, (path, state) in enumerate(zip(self.paths, self.states, strict=True)):
            model = self.model(number)
            expected = (model.in_channels, model.input_size, model.input_size)
            if found != expected:
                raise InputError(f"{folder.folder}: {path} expects latents of shape {expected}, found {found}")
            if model.num_classes != self.num_classes:
                raise InputError(
                    f"{path}: expected {self.num_classes} classes as in {self.paths[-1]}, found {model.num_classes}"
                )
            trained_on = (state.get("latents") or {}).get("model_sha256")
            if trained_on and made_by and trained_on != made_by:
                raise InputError(
                    f"{folder.folder}: made by the VQ-VAE {made_by[:12]}…, but {path} was trained on latents of "
                    f"{trained_on[:12]}…; encode the images with that VQ-VAE, or train a surrogate on these latents"
                )


def _checked_names(methods: str | Sequence[str], seed: int, draws: int, batch_size: int, moso_mode: str) -> list[str]:
    names = list(dict.fromkeys([methods] if isinstance(methods, str) else methods))
    if not names or not set(names) <= set(METHODS):
        bad = [name for name in names if name not in METHODS]
        raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(map(repr, bad)) or 'none'}")
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    if not 0 <= seed <= MASK:
        raise InputError(f"seed: expected 0 to {MASK}, got {seed}")
    if moso_mode not in MODES:
        raise InputError(f"moso_mode: expected one of {', '.join(MODES)}, got {moso_mode!r}")
    return names


def _checked_tables(folder: ArrayFolder, surrogate: _Surrogate | None) -> tuple[int, int]:
    """Rows of all shards and how many of them failed already; InputError for a label that the surrogate lacks."""
    rows = failed = 0
    classes = surrogate.num_classes if surrogate else 0
    for stem in folder.stems:
        table = folder.table(stem).select(["key", "label", "status"])
        rows += table.num_rows
        for row in table.to_pylist():
            if row["status"] != "ok":
                failed += 1
            elif classes and (row["label"] is None or not 0 <= row["label"] < classes):
                raise InputError(
                    f"{folder.folder}/{stem}.parquet: key {row['key']!r}: expected a label from 0 to {classes - 1}, as "
                    f"the surrogate is conditional on {classes} classes, found {row['label']}"
                )
    return rows, failed


def _sweeps(names: Sequence[str], checkpoints: int) -> int:
    """How many times the samples go through a surrogate, MoSo's first pass apart."""
    return checkpoints * len(OF_ALL_CHECKPOINTS & set(names)) + bool(OF_LAST_CHECKPOINT & set(names))


def _in_shares(bar: Progress, samples: int, sweeps: int) -> Any:
    """A function that is told samples of `sweeps` sweeps and advances the bar by `samples` in all."""
    seen = 0

    def advance(amount: int) -> None:
        nonlocal seen
        before, seen = seen // sweeps, seen + amount
        bar.advance(seen // sweeps - before)

    return advance


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in matrix products and convolutions: it would leave 3 digits of a score."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
