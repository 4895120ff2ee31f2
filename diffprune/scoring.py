"""``score``: latents and a surrogate's checkpoints -> score tables."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune.arrays import ArrayFolder
from diffprune.config_checks import as_known
from diffprune.device import full_float32, pick_device
from diffprune.draws import MASK
from diffprune.engines import Engine, Made, TableWriter, open_workers, run_stage
from diffprune.errors import InputError
from diffprune.failures import MAX_FAILURES, Tally
from diffprune.files import fingerprint
from diffprune.local_workers import Advance, Relay, Task
from diffprune.passes import BY_DRAW, Latents, Passes, Plan, identity_of, unread_table
from diffprune.progress import Progress
from diffprune.scores.batches import Draws
from diffprune.scores.grand import GRAND
from diffprune.scores.loss import EL2N, EL2N_OF_NOISE, LOSS, LOSS_OF_NOISE
from diffprune.scores.monotonicity import MONOTONICITY, monotonicity
from diffprune.scores.moso import MODES, moso_field
from diffprune.scores.random import RANDOM
from diffprune.scores.support import Support
from diffprune.storage import as_path
from diffprune.storage.folders import partials_folder
from diffprune.surrogates import PRECISIONS, Surrogate

METHODS = ("random", "loss", "el2n", "grand", "moso", "monotonicity")


def score(
    latents: str | os.PathLike | Latents,
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    methods: str | Sequence[str] = ("loss", "el2n", "grand"),
    seed: int = 0,
    draws: int = 1,
    antithetic: bool = False,
    normalise_t: bool = False,
    moso_mode: str = "paper",
    trials: int = 1,
    support_fraction: float = 1.0,
    one_pass: bool = False,
    group_size: int = 32,
    learning_rates: Sequence[float] | None = None,
    weights: str = "model",
    precision: str = "float32",
    compile: bool = False,
    batch_size: int | str | None = None,
    memory: float | None = None,
    device: str = "auto",
    workers: int = 1,
    part: str | None = None,
    ray: str | None = None,
    max_failures: int = MAX_FAILURES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Score every sample of a latents folder: one table per shard in ``out``, a float64 column per method.

    Args:
        latents: a folder that ``encode`` wrote, or any source of latents with ``ArrayFolder``'s attributes.
        checkpoints: the surrogate: a run folder of ``train_dit`` (all its checkpoints), a checkpoint, or several of
            them. ``loss``, ``el2n`` and ``grand`` use the last one, ``moso`` and ``monotonicity`` all.
        out: the folder for the tables. Shards that are done are skipped; a folder with other work is refused.
        methods: any of ``METHODS``. What a column means stands in its metadata.
        seed, draws: every sample is seen at ``draws`` draws of (t, noise), which depend on the seed and its key alone.
        antithetic: draws in pairs of one t, with noise x0 and -x0.
        normalise_t: divide each draw's loss, el2n or gradient norm by its mean over all samples at about that t.
        moso_mode: "paper", "loo1" or "authors", see ``diffprune.scores.moso``.
        trials: split the samples into so many support sets by their keys; MoSo scores each within its own.
        support_fraction: make MoSo's mean gradient from this share of the samples, chosen by their keys.
        one_pass, group_size: estimate MoSo from the mean of ``group_size`` samples that are together in a shard.
        learning_rates: η at each checkpoint as given, or one for all; by default what the checkpoints say.
        weights: which of the surrogate's weights, "model" or "ema".
        precision: "float32", or "bf16": the surrogate runs under autocast.
        compile: run ``torch.compile``d what takes no per-sample gradients: losses, and MoSo's first pass.
        batch_size: about how many draws go through the surrogate at once, or "auto": as many as are faster. By
            default 64; on the CPU fewer where its memory will not hold them. Where memory runs out it is halved. It
            changes scores by rounding at most.
        memory: unless batch_size is given, on the CPU: GiB that a process may hold; half of what is free by default,
            shared by the workers.
        workers: processes that take the shards, each with one checkpoint and MoSo's mean gradient in memory. Under
            torchrun its processes do, and talk where they must.
        part: "3/64": only the third of 64 parts of the shards. Parts may run at once; not for what needs all samples:
            moso, but for one_pass, and normalise_t.
        ray: the address of a Ray cluster, or "auto": its actors take the shards, as many as ``workers`` if given.
        max_failures: stop after so many samples in a row whose scores are not finite; 0: never.
        dry_run: write nothing, and return how much there is to do.

    Returns: counts (samples, failed, failed_in_scoring, ...; the latter of this run's shards). A sample whose score is
    not finite becomes a failed row without scores; the others stand.

    Raises: InputError for latents that do not fit the surrogate (shape, VQ-VAE, labels), too few checkpoints or
    samples, or a bad argument; ResumeError for a folder with other work; DiskFullError.
    """
    names = _checked_names(methods)
    _check("moso_mode", moso_mode, moso_mode in MODES, f"one of {', '.join(MODES)}")
    precision = as_known(precision, PRECISIONS)
    _check("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    for name, value in (("draws", draws), ("trials", trials)):
        _check(name, value, value >= 1, "1 or more")
        _check(name, value, value <= MASK, f"at most {MASK}")
    _check("seed", seed, 0 <= seed <= MASK, f"0 to {MASK}")
    _check("batch_size", batch_size, batch_size in (None, "auto") or _at_least_1(batch_size), "1 or more, or auto")
    _check("memory", memory, memory is None or 0 < memory * 2**30 < math.inf, "a positive number of GiB")
    _check("support_fraction", support_fraction, 0 < support_fraction <= 1, "above 0, at most 1")
    _check("group_size", group_size, group_size >= 2, "2 or more")
    if part and (normalise_t or batch_size == "auto" or ("moso" in names and not one_pass)):
        raise InputError(
            "part: a part sees its own samples only, which is not enough for moso (but for one_pass), normalise_t or "
            "batch_size auto; run it whole: with workers, or on several machines with torchrun"
        )
    if one_pass and (trials > 1 or support_fraction < 1):
        raise InputError("one_pass: expected no trials and no support_fraction, as it has groups for support sets")
    support = Support(seed, trials, support_fraction)
    group = group_size if one_pass and "moso" in names else None
    plan = Plan(names, Draws(seed, draws, antithetic), moso_mode, support, group, normalise_t)

    source = latents if hasattr(latents, "stems") else ArrayFolder(latents, kind="latents")
    where = str(getattr(source, "folder", latents))  # for messages
    config: dict[str, Any] = {"methods": names, "seed": seed, "latents": source.fingerprint}
    surrogate, load_surrogate = None, None
    if names != ["random"]:
        load_surrogate = partial(
            _surrogate,
            checkpoints,
            weights,
            device,
            only_last=not plan.of_all_checkpoints,
            learning_rates=learning_rates,
            compile=compile,
            precision=precision,
        )
        surrogate = load_surrogate()
        shape = source.metadata.get("shape")
        if not isinstance(shape, (list, tuple)) or not all(isinstance(side, int) for side in shape):
            raise InputError(f"{where}: expected the shape of a latent in its stage.json, found {shape!r}")
        surrogate.check(shape, source.metadata.get("model_sha256"), where)
        if "monotonicity" in names:
            monotonicity(torch.zeros(len(surrogate.paths), 0))  # refuses too few
        config |= {"draws": draws, "weights": weights, **surrogate.describe()}
        config |= {key: True for key, on in (("antithetic", antithetic), ("normalise_t", normalise_t)) if on}
    if "moso" in names:
        config |= {"moso_mode": moso_mode}
        config |= {"trials": trials} if trials > 1 else {}
        config |= {"support_fraction": support_fraction} if support_fraction < 1 else {}
        config |= {"one_pass_group_size": group} if group else {}
        config |= {"learning_rates": surrogate.rates} if learning_rates else {}
        config |= {"training": training} if (training := surrogate.training()) else {}
    if hasattr(source, "check_finished"):
        source.check_finished()
    shard_rows, failed_before = _checked_tables(source, surrogate, plan, where)
    inputs = source.identities() if hasattr(source, "identities") else {}  # known by now from the tables
    rows = sum(shard_rows.values())
    paths = [] if surrogate is None else [str(path) for path in surrogate.paths]
    recipe = _Passes(
        source,
        load_surrogate,
        plan,
        partials_folder(as_path(out), fingerprint([config, inputs] if plan.of_all_samples else config)),
        batch_size,
        None if memory is None else int(memory * 2**30),
        rows - failed_before,
    )
    fields, failed = _fields(plan, surrogate), Counter()
    with (
        full_float32(),
        open_workers(recipe, workers, part=part, ray=ray, max_failures=max_failures) as engine,
        recipe.open(surrogate, engine) as passes,
    ):
        counts = run_stage(
            "score",
            out,
            config,
            source.stems,
            lambda stem, bar: _table(passes, fields, stem, bar),
            total=sum(shard_rows[stem] for stem in engine.whole(source.stems)),
            inputs=inputs,
            whole=plan.of_all_samples,
            metadata={"checkpoint_paths": paths},
            begin=passes.begin,
            dry_run=dry_run,
            engine=engine,
            task=lambda stem, writer: Task(stem, "table", (stem, fields, passes.sums, writer)),
            told=lambda stem, tally: failed.update({stem: tally.failed}),
        )
    summary = {"methods": names, "checkpoints": paths, "draws": draws, "sweeps": plan.sweeps(len(paths))}
    if dry_run:
        return {**counts, **summary}
    passes.remove()
    failed_here = engine.ranks.count(failed.total())
    return {**counts, **summary, "failed_in_scoring": failed_here, "batch_size": passes.size.rows}


@dataclass(frozen=True)
class _Passes:
    """What a process needs to know to score shards; called, it makes a `_Worker`."""

    source: Latents
    surrogate: Callable[[], Surrogate] | None
    plan: Plan
    folder: Path
    batch_size: int | str | None
    memory: int | None
    rows: int

    def open(self, surrogate: Surrogate | None, engine: Engine | None = None) -> Passes:
        about = (self.plan, self.folder, self.batch_size, self.memory, self.rows, engine)
        return Passes(self.source, surrogate, *about)

    def __call__(self) -> _Worker:
        return _Worker(self.open(self.surrogate() if self.surrogate else None))


class _Worker:
    """Scores shards in a process that knows of no others."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        passes.reading_no_further()

    def find(self, number: int, stem: str, advance: Advance) -> None:
        with full_float32():
            self.passes.find(number, stem, advance)

    def put_shard_sum(self, number: int, trial: int, stem: str, advance: Advance) -> None:
        with full_float32():
            self.passes.put_shard_sum(number, trial, stem, advance)

    def table(
        self, stem: str, fields: dict[str, pa.Field], sums: dict[str, Tensor], writer: TableWriter, advance: Advance
    ) -> Tally:
        self.passes.sums = sums
        with full_float32():
            return writer.run(stem, lambda: _table(self.passes, fields, stem, Relay(advance)))


def _surrogate(checkpoints: Any, weights: str, device: str, **options: Any) -> Surrogate:
    return Surrogate(checkpoints, weights, pick_device(device), **options)


def _table(passes: Passes, fields: dict[str, pa.Field], stem: str, bar: Progress) -> Made:
    """Base columns and scores of one shard; null where a sample failed, before or now. And which failed not before."""
    base, ok, samples = passes.read(stem)
    scores = passes.scores(stem, samples, bar.advance)
    status, error = base["status"].to_pylist(), base["error"].to_pylist()
    columns: dict[str, list[float | None]] = {name: [None] * base.num_rows for name in fields}
    for i, row in enumerate(ok):
        values = {name: float(scores[name][i]) for name in fields}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            status[row], error[row] = "failed", f"its {bad[0]} is not finite ({values[bad[0]]})"
        else:
            for name, value in values.items():
                columns[name][row] = value
    for name, texts in (("status", status), ("error", error)):
        base = base.set_column(base.column_names.index(name), name, pa.array(texts, pa.string()))
    for name, values in columns.items():
        base = base.append_column(fields[name], pa.array(values, pa.float64()))
    bar.advance(base.num_rows - len(ok))
    was_ok = np.zeros(base.num_rows, dtype=bool)
    was_ok[ok] = True
    # now that the latents were read: what is encoded on the fly has an identity only then
    return Made(base, was_ok.tolist(), {"input": identity_of(passes.source, stem)})


def _fields(plan: Plan, surrogate: Surrogate | None) -> dict[str, pa.Field]:
    """The columns to write, in the order asked for, with what they mean."""
    mean = ""
    if plan.support.trials > 1:
        mean = f"N and ḡ of the sample's own support set, one of {plan.support.trials} by key"
    if plan.support.fraction < 1:
        mean = f"{mean}{mean and '; '}ḡ from {plan.support.fraction:g} of the samples, chosen by key"
    if plan.group:
        mean = f"an ESTIMATE: ḡ from groups of {plan.group} samples of a shard, not from all"
    of_noise = surrogate is not None and surrogate.predicts == "noise"
    errors = (LOSS_OF_NOISE, EL2N_OF_NOISE) if of_noise else (LOSS, EL2N)
    known = (RANDOM, *errors, GRAND, moso_field(plan.moso_mode, mean), MONOTONICITY)
    fields = {field.name: field for field in known}
    if plan.group:
        fields["moso"] = fields["moso"].with_metadata({**fields["moso"].metadata, b"estimate": b"true"})
    for name in BY_DRAW if plan.normalise_t else ():
        metadata = dict(fields[name].metadata)
        metadata[b"meaning"] += b"; each draw's value over the mean of all samples' in its stratum of t"
        fields[name] = fields[name].with_metadata(metadata)
    return {name: fields[name] for name in plan.methods}


def _checked_names(methods: str | Sequence[str]) -> list[str]:
    names = list(dict.fromkeys([methods] if isinstance(methods, str) else methods))
    if not names or not set(names) <= set(METHODS):
        bad = [name for name in names if name not in METHODS]
        raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(map(repr, bad)) or 'none'}")
    return names


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{name}: expected {expected}, got {value!r}")


def _at_least_1(value: int | str) -> bool:
    return not isinstance(value, str) and value >= 1


def _checked_tables(
    source: Latents, surrogate: Surrogate | None, plan: Plan, latents: str
) -> tuple[dict[str, int], int]:
    """Rows of each shard and how many of all failed already; InputError for a label that the surrogate lacks, or for
    too few samples."""
    rows: dict[str, int] = {}
    failed = 0
    classes = surrogate.num_classes if surrogate else 0
    columns = ["key", "label", "status"]
    if hasattr(source, "tables"):
        tables = source.tables(columns)
    else:
        # A group of the one-pass estimate counts on how many samples there are, so their images have to be seen.
        read = source.table if plan.group else partial(unread_table, source)
        tables = (read(stem).select(columns) for stem in source.stems)
    for stem, table in zip(source.stems, tables, strict=True):
        good = table.filter(pc.equal(table["status"], "ok"))
        rows[stem] = table.num_rows
        failed += table.num_rows - good.num_rows
        least = 2 if plan.moso_mode == "paper" else 3
        if plan.group and 0 < good.num_rows < least:
            raise InputError(
                f"{latents}: shard {stem} has {good.num_rows} usable samples; one pass needs {least} or more in a "
                f"shard for mode {plan.moso_mode}"
            )
        label = good["label"]
        fits = pc.fill_null(pc.and_(pc.greater_equal(label, 0), pc.less(label, classes)), False)
        if classes and not pc.all(fits, min_count=0).as_py():
            bad = good.filter(pc.invert(fits))
            raise InputError(
                f"{latents}/{stem}.parquet: key {bad['key'][0].as_py()!r}: expected a label from 0 to {classes - 1}, "
                f"as the surrogate is conditional on {classes} classes, found {bad['label'][0].as_py()}"
            )
    usable = sum(rows.values()) - failed
    if "moso" in plan.methods and usable < 2:
        raise InputError(f"{latents}: moso needs at least 2 samples, found {usable}")
    return rows, failed
