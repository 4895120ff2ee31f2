"""The evaluate verb: every metric over two embedding folders, into one JSON file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune._version import __version__
from diffprune.device import pick_device
from diffprune.errors import InputError
from diffprune.evaluation.classes import class_balance
from diffprune.evaluation.context import common_embedder, flags, sampling_of
from diffprune.evaluation.folders import FeatureFolder
from diffprune.evaluation.frechet import frechet_distance, frechet_distance_infinity
from diffprune.evaluation.gaussians import Gaussian
from diffprune.evaluation.manifold import precision_recall
from diffprune.evaluation.mmd import kernel_distance
from diffprune.evaluation.nearest_training import memorization
from diffprune.evaluation.rows import draw_subset, labels_of, left_out_rows, same_seed_rows, training_rows
from diffprune.evaluation.same_seed import same_seed_similarity
from diffprune.evaluation.vendi import vendi_scores
from diffprune.files import write_json
from diffprune.outputs import Kind, check_output
from diffprune.progress import progress
from diffprune.storage import as_path
from diffprune.tables import selection_about

VENDI_ORDERS = (0.1, 0.5, 1.0, 2.0, math.inf)


def evaluate(
    samples: str | os.PathLike,
    reference: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    kept: str | os.PathLike | None = None,
    training: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    same_seed: str | os.PathLike | None = None,
    name: str | None = None,
    split: str | None = None,
    k: int = 3,
    class_k: int = 5,
    vendi_orders: Sequence[float] = VENDI_ORDERS,
    limit: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare generated images with real ones, both as embedding folders of one embedder, and write ``out`` (JSON).

    The reference is read shard by shard and may be larger than memory; the samples are held, as float32.

    Args:
        samples: embeddings of generated images; their labels, if any, are the classes asked for.
        reference: embeddings of the whole data set, before pruning: a folder, or several by the same model.
        kept: the selection the generator was trained on (kept.parquet): its keys are the training images, the rest of
            the reference is held out. None: it was trained on all of the reference.
        training: embeddings, in one or several folders, of the images that selections are made from, where the
            reference is none of them (a validation split). ``kept`` is then of these, and the reference is what was
            held out: the same baseline for every model.
        same_seed: embeddings of another model's images, drawn with the same seed and labels, to compare image by image.
        name: what to call this run in tables; by default the file name of ``out``.
        split: what the reference is ("train", "validation", ...); by default the name of its folder.
        k: neighbours for precision, recall, density and coverage. ``class_k``: for the class vote.
        vendi_orders: of the Vendi scores, 0 to infinity; order 1 is always among them.
        limit: precision, recall, density, coverage, classes and the memorization baseline use at most this many images
            of each folder, drawn by ``seed`` and key, and the kernel distance as many of the reference; Fréchet
            distance, Vendi score and nearest training images use all.
        dry_run: check the inputs, say how much would be done, write nothing.

    Returns what ``out`` holds: ``name``; ``metrics``: frechet_distance, frechet_distance_infinity, kernel_distance,
    precision, recall, f_score, density, coverage, vendi_score, memorization_ratio, memorized_share,
    class_kl_uniform, class_kl_reference, label_agreement, same_seed_cosine (null where there is nothing to compute it
    from); ``frechet_infinity``, ``kernel``, ``vendi``, ``memorization``, ``classes``, ``same_seed``: the same in
    detail; ``context``: what it was computed from, with ``sampling`` (steps, guidance, seed, checkpoints) and
    ``flags``: in words, what a reader must know before comparing the numbers.

    Raises InputError for embeddings of two embedders, NaN (naming the key), a selection of another data set, images of
    two seeds in ``same_seed``, or too few images.
    """
    for what, value, least in (("k", k, 1), ("class_k", class_k, 1), ("limit", limit, 2)):
        if value < least:
            raise InputError(f"{what}: expected at least {least}, got {value}")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed: expected 0 to 2**32 - 1, got {seed}")
    orders = sorted({1.0, *map(float, vendi_orders)})
    if not all(q >= 0 for q in orders):
        raise InputError(f"vendi_orders: expected numbers from 0 to infinity, got {list(vendi_orders)}")
    check_output(out, Kind("result of evaluate", b'"metrics"'), [kept])
    chosen = pick_device(device)
    made, real = FeatureFolder(samples, chosen), FeatureFolder(reference, chosen)
    embedder = common_embedder(made, real)
    seen = real if training is None else FeatureFolder(training, chosen)
    common_embedder(made, seen)
    twins = None if same_seed is None else same_seed_rows(made, FeatureFolder(same_seed, chosen))
    trained_on = training_rows(seen, kept)
    if training is not None:
        _check_apart(real, seen)
    for what, rows in (("samples", made), ("reference", real)):
        if min(len(rows), limit) <= k:
            raise InputError(f"{what}: expected at least {k + 1} rows for k = {k}, got {min(len(rows), limit)}")
    plan = {
        "name": name or Path(out).stem,
        "out": str(out),
        "samples": len(made),
        "reference": len(real),
        "training": int(trained_on.sum()),
        "held_out": len(real) if training is not None else int((~trained_on).sum()),
        "dry_run": dry_run,
    }
    if dry_run:
        return plan

    x = made.take(torch.arange(len(made)))
    sample_subset, subset = (draw_subset(folder.rows, limit, seed) for folder in (made, real))
    y = real.take(subset)
    held_out = torch.ones(len(y), dtype=torch.bool)
    if training is None:
        held_out = torch.from_numpy(~trained_on)[subset]
    held_out = held_out.to(chosen)
    with progress("evaluate", total=7 if twins is None else 8, unit="metrics") as bar:
        gaussian = Gaussian.of(real)
        metrics: dict[str, Any] = {"frechet_distance": frechet_distance(x, gaussian)}
        bar.advance(note="Fréchet distance")
        infinity = None
        if len(x) >= 2 * (made.dimensions + 1):
            infinity = frechet_distance_infinity(x, gaussian, seed=seed)
        bar.advance(note="Fréchet distance at infinity")
        kernel = kernel_distance(x, y, seed=seed)
        bar.advance(note="kernel distance")
        metrics |= precision_recall(x[sample_subset.to(chosen)], y, k=k)
        bar.advance(note="precision and recall")
        vendi = {"orders": [_order(q) for q in orders], "samples": vendi_scores(x, orders)}
        few = len(real) <= real.dimensions  # then their own kernel is the smaller one
        vendi["reference"] = vendi_scores(real.take(torch.arange(len(real))) if few else real, orders)
        bar.advance(note="Vendi score")
        left_out = None if held_out.any() else left_out_rows(real, trained_on, limit, seed)
        nearness = memorization(x, seen.part(trained_on), y[held_out], left_out=left_out)
        bar.advance(note="memorization")
        classes = _classes(x, made.rows, sample_subset, y, real.rows, subset, class_k)
        bar.advance(note="classes")
        alike = None
        if twins is not None:
            alike = _same_seed(made, *twins)
            bar.advance(note="same seed")
    metrics |= {
        "frechet_distance_infinity": infinity and infinity["distance"],
        "kernel_distance": kernel["mean"],
        "vendi_score": vendi["samples"][orders.index(1.0)],
        "memorization_ratio": nearness["median_ratio"],
        "memorized_share": nearness["share_below_p1"],
        "class_kl_uniform": classes and classes["kl_uniform"],
        "class_kl_reference": classes and classes["kl_reference"],
        "label_agreement": classes and classes["label_agreement"],
        "same_seed_cosine": alike and alike["cosine"],
    }
    training_keys = seen.rows["key"].filter(pa.array(trained_on))
    nearness["closest_pairs"] = [
        {"sample": made.rows["key"][i].as_py(), "training": training_keys[j].as_py(), "distance": distance}
        for i, j, distance in nearness["closest_pairs"]
    ]
    told = flags(
        made,
        real,
        used_samples=len(sample_subset),
        used_reference=len(subset),
        held_out=int(held_out.sum()),
        infinity=infinity,
        nearness=nearness,
        dedup=training is None and kept is not None and selection_about(kept).get("dedup") is not None,
        has_classes=classes is not None,
    )
    result = {
        "name": plan["name"],
        "metrics": metrics,
        "frechet_infinity": infinity,
        "kernel": kernel,
        "vendi": vendi,
        "memorization": nearness,
        "classes": classes,
        "same_seed": alike,
        "context": {
            "samples": {"path": made.folder, "count": len(x), "metadata": made.metadata},
            "sampling": sampling_of(made),
            "reference": {
                "path": real.folder,
                "split": split or real.name,
                "count": len(real),
                "vendi_score": vendi["reference"][orders.index(1.0)],
            },
            "kept": None if kept is None else str(as_path(kept)),
            "training": None if training is None else seen.folder,
            "training_images": plan["training"],
            "embedder": embedder,
            "k": k,
            "class_k": class_k,
            "limit": limit,
            "seed": seed,
            "diffprune": __version__,
            "torch": torch.__version__,
            "device": str(chosen),
            "flags": told,
        },
    }
    write_json(out, result)
    return result | {"out": str(out)}


def _check_apart(real: FeatureFolder, seen: FeatureFolder) -> None:
    """InputError if an image is both in the reference and in what could be trained on."""
    both = pc.is_in(real.rows["key"], value_set=seen.rows["key"].combine_chunks())
    if pc.any(both).as_py():
        key = real.rows["key"].filter(both)[0].as_py()
        raise InputError(
            f"{real.folder}: key {key!r} is in {seen.folder} too; expected a reference that nothing was trained on, or "
            "leave out `training`"
        )


def _classes(
    x: Tensor,
    sample_rows: pa.Table,
    sample_subset: Tensor,
    y: Tensor,  # of the rows ``subset``
    reference_rows: pa.Table,
    subset: Tensor,
    k: int,
) -> dict[str, Any] | None:
    """Class balance by the labelled part of the reference, or None if fewer than two images have a label."""
    labels = labels_of(reference_rows)[subset].to(x.device)
    labelled = labels >= 0
    if labelled.sum() < 2:
        return None
    asked = labels_of(sample_rows).to(x.device)
    sample_subset = sample_subset.to(x.device)
    return class_balance(
        x[sample_subset],
        y[labelled],
        labels[labelled],
        sample_labels=asked[sample_subset] if bool((asked >= 0).all()) else None,
        k=k,
    )


def _same_seed(made: FeatureFolder, other: FeatureFolder, rows: Tensor, places: Tensor) -> dict[str, Any]:
    labels = labels_of(made.rows)[rows]
    order = places.argsort()  # `take` reads in the folder's order
    others = torch.empty(len(places), other.dimensions, device=other.device)
    others[order.to(other.device)] = other.take(places[order])
    found = same_seed_similarity(made.take(rows), others, labels.to(made.device) if bool((labels >= 0).all()) else None)
    return {**found, "path": other.folder, "sampling": sampling_of(other)}


def _order(q: float) -> float | str:
    """An order as JSON can hold it."""
    return "inf" if q == math.inf else q
