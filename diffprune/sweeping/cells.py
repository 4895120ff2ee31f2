"""One cell: a method, a ratio and a seed -> selection, training, sampling, features, metrics, one JSON file."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffprune._version import __version__
from diffprune.checkpoints import find_checkpoints, keep_weights
from diffprune.encoding import embed
from diffprune.errors import InputError, ResumeError
from diffprune.evaluation import evaluate
from diffprune.files import check_fields, fingerprint, read_json, write_json
from diffprune.reporting.tables import METRICS, real_value
from diffprune.sampling import sample
from diffprune.selection import select
from diffprune.sweeping.methods import FULL
from diffprune.sweeping.settings import SweepConfig, with_device
from diffprune.sweeping.shared import Shared
from diffprune.tables import kept_keys, read_folder
from diffprune.training import train_dit

RESULT_FILE = "result.json"
LEFT_OUT = "what the selection left out"
_RESULT_TYPES = {"cell": dict, "training_images": int, "training_classes": dict, "metrics": dict, "flags": list}
_RESULT_TYPES |= {"setting": dict, "seconds": dict}


@dataclass(frozen=True)
class Cell:
    """One point of the grid. ``prune`` is the fraction left out, 0 for full data."""

    method: str
    prune: float
    seed: int

    @property
    def name(self) -> str:
        """Such as ``grand-high-90-s0``, or ``full-s0``."""
        ratio = "" if self.method == FULL else f"-{100 * self.prune:.10g}"
        return f"{self.method}{ratio}-s{self.seed}"


def list_cells(config: SweepConfig) -> list[Cell]:
    """All cells, seed by seed: what is done first is a whole comparison, and the next seeds make it surer."""
    grid = config.sweep
    cells = []
    for seed in grid.seeds:
        cells += [Cell(FULL, 0.0, seed)] if grid.full else []
        cells += [Cell(method, ratio, seed) for ratio in grid.prune for method in grid.methods]
    return cells


def cell_fingerprint(config: SweepConfig, cell: Cell) -> str:
    """Of everything that a cell's result depends on."""
    how = None if cell.method == FULL else asdict(config.method(cell.method))
    return fingerprint({"config": config.identity(), "how": how, "prune": cell.prune, "seed": cell.seed})


def read_result(config: SweepConfig, cell: Cell, out: Path) -> dict[str, Any] | None:
    """What a cell's file says, None if it is not done; ResumeError if it was made with another config."""
    path = out / "cells" / cell.name / RESULT_FILE
    if not path.is_file():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or result.get("fingerprint") != cell_fingerprint(config, cell):
        raise ResumeError(f"{path}: of a cell with another config; give another --out, or delete its folder")
    check_fields(path, result, _RESULT_TYPES, "; delete its folder and run again")
    return result


def run_cell(config: SweepConfig, cell: Cell, out: Path, device: str) -> dict[str, Any]:
    """Do what of a cell is not done yet, and write its JSON. The shared stages must be there."""
    found = read_result(config, cell, out)
    if found is not None:
        return found
    shared, folder = Shared(config, out / "shared"), out / "cells" / cell.name
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[..., dict[str, Any]], /, *args: Any, **options: Any) -> dict[str, Any]:
        begin = time.monotonic()
        result = function(*args, **options)
        seconds[stage] = round(time.monotonic() - begin, 2)
        return result

    kept, selected = None, {}
    if cell.method != FULL:
        kept = folder / "kept.parquet"
        method = config.method(cell.method)
        options = {**method.arguments(), "prune": cell.prune, "seed": cell.seed, "device": device}
        options |= {"embeddings": shared.embeddings} if method.needs_embeddings else {}
        selected = timed("select", select, shared.tables(method.columns), kept, **options)
    run = with_device(config.dit, device, seed=cell.seed)
    decode_with = shared.vqvae if run.train.sample_every else None
    trained = timed("train", train_dit, run, shared.latents, folder / "model", kept=kept, decode_with=decode_with)
    for earlier in find_checkpoints(folder / "model")[:-1]:
        shutil.rmtree(earlier)  # nothing goes on from it any more, and a DiT-XL/2's has 11 GB
    s = config.sample
    drawn = {"count": s.count, "steps": s.steps, "method": s.method, "guidance": s.guidance, "labels": s.labels}
    drawn |= {"seed": s.seed, "batch_size": s.batch_size, "precision": s.precision, "device": device}
    drawn["weights"] = "ema" if run.train.ema_decay else "model"  # as the grids of `train dit`
    timed("sample", sample, folder / "model", shared.vqvae, folder / "samples", **drawn)
    e = config.evaluate
    features, model = folder / "features", shared.embedder(e.model)
    timed("embed", embed, folder / "samples", features, model=model, device=device)
    held_out = e.reference == "held-out"
    measured = timed(
        "evaluate",
        evaluate,
        features,
        shared.features(e.reference),
        folder / "metrics.json",
        kept=kept,
        training=shared.features("train") if held_out else None,
        name=cell.name,
        split=e.reference,
        k=e.k,
        limit=e.limit,
        seed=e.seed,
        device=device,
    )
    result = {
        "fingerprint": cell_fingerprint(config, cell),
        "version": __version__,
        "cell": {**asdict(cell), "name": cell.name},
        "how": {name: selected.get(name) for name in ("order", "by", "within", "per", "shares")},
        "training_images": trained["images"],
        "training_classes": _classes(shared, kept),
        "metrics": measured["metrics"],
        "classes": measured["classes"],
        "real": {m.key: value for m in METRICS if (value := real_value(m.key, measured)) is not None},
        "flags": measured["context"]["flags"],
        "setting": _setting(config, cell, trained, measured["context"]),
        "seconds": seconds,
    }
    write_json(folder / RESULT_FILE, result)
    # A config with more steps is another sweep's.
    keep_weights(find_checkpoints(folder / "model")[-1], drawn["weights"])
    return result


def find_cell(cells: list[Cell], asked: str) -> Cell:
    """A cell by its name, or by its number in the list; InputError otherwise."""
    names = {cell.name: cell for cell in cells}
    if asked in names:
        return names[asked]
    if asked.isdecimal() and int(asked) < len(cells):
        return cells[int(asked)]
    example = cells[0].name
    raise InputError(f"cell {asked!r}: expected a number from 0 to {len(cells) - 1}, or a name such as {example!r}")


def _setting(config: SweepConfig, cell: Cell, trained: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know beside the numbers."""
    train, sampling, reference = config.dit.train, context["sampling"], context["reference"]
    seeds = {name: getattr(config, name).seed for name in ("data", "score", "cluster", "sample", "evaluate")}
    if not isinstance(config.surrogate, str):
        seeds["surrogate"] = config.surrogate.train.seed
    return {
        "reference": {"split": reference["split"], "count": reference["count"]},
        "samples": context["samples"]["count"],
        "sampling": {name: sampling.get(name) for name in ("method", "steps", "guidance")},
        "encoder": context["embedder"],
        "vqvae_sha256": sampling.get("vqvae_sha256"),
        "model_sha256": sampling.get("model_sha256"),
        "parameters": trained["parameters"],
        "training": {name: getattr(train, name) for name in ("steps", "batch_size", "lr", "ema_decay")},
        "epochs": trained["epochs"],
        "memorization_baseline": _baseline(context),
        "seeds": {"train": cell.seed, "select": cell.seed, **seeds},
    }


def _baseline(context: dict[str, Any]) -> str:
    """What the distance of generated images to training images is compared with."""
    if context["training"]:
        return "the reference, which is held out"
    return "training images, each left out" if context["kept"] is None else LEFT_OUT


def _classes(shared: Shared, kept: Path | None) -> dict[str, int]:
    """How many images of each class were trained on."""
    table = read_folder(shared.latents, ["key", "label", "status"])
    table = table.filter(pc.equal(table["status"], "ok"))
    if kept is not None:
        table = table.filter(pc.is_in(table["key"], value_set=pa.array(sorted(kept_keys(kept)), pa.string())))
    counts = Counter(label for label in table["label"].to_pylist() if label is not None)
    return {str(label): counts[label] for label in sorted(counts)}
