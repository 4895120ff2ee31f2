"""The evaluate verb: every metric over two embedding folders, into one JSON file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffprune._version import __version__
from diffprune.arrays import ArrayFolder
from diffprune.device import pick_device
from diffprune.errors import InputError
from diffprune.evaluation.classes import class_balance
from diffprune.evaluation.frechet import frechet_distance
from diffprune.evaluation.manifold import precision_recall
from diffprune.evaluation.nearest_training import memorization
from diffprune.evaluation.vendi import vendi_score
from diffprune.files import write_json
from diffprune.progress import progress
from diffprune.tables import kept_keys

FEW_HELD_OUT = 100


def evaluate(
    samples: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    kept: str | Path | None = None,
    name: str | None = None,
    k: int = 3,
    class_k: int = 5,
    limit: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare generated images with real ones, both as embedding folders of one embedder, and write ``out`` (JSON).

    Args:
        samples: embeddings of generated images; their labels, if any, are the classes asked for.
        reference: embeddings of the whole data set, before pruning.
        kept: the selection the generator was trained on (kept.parquet): its keys are the training images, the rest of
            the reference is held out. None: it was trained on all of the reference.
        name: what to call this run in tables; by default the file name of ``out``.
        k: neighbours for precision, recall, density and coverage. ``class_k``: for the class vote.
        limit: precision, recall, density, coverage, classes and the held-out baseline use at most this many images of
            each folder, drawn by ``seed`` and key; Fréchet distance, Vendi score and nearest training images use all.
        dry_run: check the inputs, say how much would be done, write nothing.

    Returns what ``out`` holds: ``name``; ``metrics``: frechet_distance, precision, recall, f_score, density, coverage,
    vendi_score, memorization_ratio, memorized_share, class_kl_uniform, class_kl_reference, label_agreement (null where
    there is nothing to compute it from); ``memorization`` and ``classes``: the same in detail; ``context``: what it was
    computed from, with ``flags``: in words, what a reader must know before comparing the numbers.

    Raises InputError for embeddings of two embedders, NaN (naming the key), a selection of another data set, or too
    few images.
    """
    sample_folder, reference_folder = (ArrayFolder(folder, "embeddings") for folder in (samples, reference))
    embedder = _common_embedder(sample_folder, reference_folder)
    sample_rows, sample_array = sample_folder.load()
    reference_rows, reference_array = reference_folder.load()
    trained_on = _training_rows(reference_rows, reference, kept)
    plan = {
        "name": name or Path(out).stem,
        "out": str(out),
        "samples": len(sample_rows),
        "reference": len(reference_rows),
        "training": int(trained_on.sum()),
        "held_out": int((~trained_on).sum()),
        "dry_run": dry_run,
    }
    if dry_run:
        return plan

    chosen = pick_device(device)
    x, y = (torch.from_numpy(array).to(chosen) for array in (sample_array, reference_array))
    trained = torch.from_numpy(trained_on).to(chosen)
    sample_subset = _subset(sample_rows, limit, seed).to(chosen)
    subset = _subset(reference_rows, limit, seed).to(chosen)
    with progress("evaluate", total=5, unit="metrics") as bar:
        metrics: dict[str, Any] = {"frechet_distance": frechet_distance(x, y)}
        bar.advance(note="Fréchet distance")
        metrics |= precision_recall(x[sample_subset], y[subset], k=k)
        bar.advance(note="precision and recall")
        metrics["vendi_score"] = vendi_score(x)
        reference_vendi = vendi_score(y)
        bar.advance(note="Vendi score")
        held_out = subset[~trained[subset]]
        nearness = memorization(x, y[trained], y[held_out])
        bar.advance(note="memorization")
        classes = _classes(x, sample_rows, sample_subset, y, reference_rows, subset, class_k)
        bar.advance(note="classes")
    metrics |= {
        "memorization_ratio": nearness["median_ratio"],
        "memorized_share": nearness["share_below_p1"],
        "class_kl_uniform": classes and classes["kl_uniform"],
        "class_kl_reference": classes and classes["kl_reference"],
        "label_agreement": classes and classes["label_agreement"],
    }
    training_keys = reference_rows["key"].filter(pa.array(trained_on))
    nearness["closest_pairs"] = [
        {"sample": sample_rows["key"][i].as_py(), "training": training_keys[j].as_py(), "distance": distance}
        for i, j, distance in nearness["closest_pairs"]
    ]
    result = {
        "name": plan["name"],
        "metrics": metrics,
        "memorization": nearness,
        "classes": classes,
        "context": {
            "samples": {"path": str(samples), "count": len(x), "metadata": sample_folder.metadata},
            "reference": {"path": str(reference), "count": len(y), "vendi_score": reference_vendi},
            "kept": None if kept is None else str(kept),
            "training_images": plan["training"],
            "embedder": embedder | {"dimensions": x.shape[1]},
            "k": k,
            "class_k": class_k,
            "limit": limit,
            "seed": seed,
            "diffprune": __version__,
            "torch": torch.__version__,
            "device": str(chosen),
            "flags": _flags(x, y, subset, sample_subset, held_out, nearness, classes),
        },
    }
    write_json(out, result)
    return result | {"out": str(out)}


def _common_embedder(samples: ArrayFolder, reference: ArrayFolder) -> dict[str, Any]:
    """The model and model_sha256 that both folders were made with; InputError if they differ."""
    for field in ("model", "model_sha256", "output", "preprocessing"):
        found = [folder.metadata.get(field) for folder in (samples, reference)]
        if found[0] != found[1]:
            raise InputError(
                f"{samples.folder} and {reference.folder}: embeddings of two models cannot be compared: {field} is "
                f"{found[0]!r} and {found[1]!r}; embed both with the same one"
            )
    return {field: samples.metadata.get(field) for field in ("model", "model_sha256")}


def _training_rows(rows: pa.Table, reference: str | Path, kept: str | Path | None) -> np.ndarray:
    """Which reference rows [M] bool the generator was trained on."""
    if kept is None:
        return np.ones(len(rows), dtype=bool)
    keys = kept_keys(kept)
    if not keys:
        raise InputError(f"{kept}: an empty selection; there is nothing the generator could be trained on")
    trained_on = pc.is_in(rows["key"], value_set=pa.array(sorted(keys), pa.string())).to_numpy()
    if trained_on.sum() != len(keys):
        lost = min(keys.difference(rows["key"].to_pylist()))
        raise InputError(
            f"{kept}: key {lost!r} is not in {reference}, or failed there; expected a selection of that data set"
        )
    return trained_on


def _subset(rows: pa.Table, limit: int, seed: int) -> torch.Tensor:
    """At most ``limit`` row numbers, ascending: those whose keys come first in a seeded hash order."""
    if len(rows) <= limit:
        return torch.arange(len(rows))
    hashes = [hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest() for key in rows["key"].to_pylist()]
    return torch.tensor(sorted(sorted(range(len(rows)), key=hashes.__getitem__)[:limit]))


def _classes(
    x: torch.Tensor,
    sample_rows: pa.Table,
    sample_subset: torch.Tensor,
    y: torch.Tensor,
    reference_rows: pa.Table,
    subset: torch.Tensor,
    k: int,
) -> dict[str, Any] | None:
    """Class balance by the labelled part of the reference, or None if fewer than two images have a label."""
    labels, labelled = _labels(reference_rows, x.device)
    subset = subset[labelled[subset]]
    if len(subset) < 2:
        return None
    asked, has_label = _labels(sample_rows, x.device)
    return class_balance(
        x[sample_subset],
        y[subset],
        labels[subset],
        sample_labels=asked[sample_subset] if bool(has_label.all()) else None,
        k=k,
    )


def _labels(rows: pa.Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [N] int64 (-1 where there is none) and where there is one [N] bool."""
    labels = torch.from_numpy(pc.fill_null(rows["label"], -1).to_numpy().astype(np.int64)).to(device)
    return labels, labels >= 0


def _flags(
    x: torch.Tensor,
    y: torch.Tensor,
    subset: torch.Tensor,
    sample_subset: torch.Tensor,
    held_out: torch.Tensor,
    nearness: dict[str, Any],
    classes: dict[str, Any] | None,
) -> list[str]:
    dimensions = x.shape[1]
    flags = [
        f"fewer {what} ({count:,}) than embedding dimensions ({dimensions:,}): the Fréchet distance is inflated"
        for what, count in (("reference images", len(y)), ("samples", len(x)))
        if count < dimensions
    ]
    flags += [
        f"precision, recall and classes from {len(part):,} of {len(whole):,} {what}, drawn at random"
        for what, part, whole in (("reference images", subset, y), ("samples", sample_subset, x))
        if len(part) < len(whole)
    ]
    if nearness["baseline"] == "leave-one-out":
        flags.append("no held-out images: memorization is judged against the training images' own neighbours")
    elif len(held_out) < FEW_HELD_OUT:
        flags.append(f"the memorization baseline rests on only {len(held_out)} held-out images")
    if classes is None:
        flags.append("the reference has no labels: no class balance")
    return flags
