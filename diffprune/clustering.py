"""``cluster``: k-means over embeddings -> the columns ``cluster`` and ``distance``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffprune.cluster_assigning import assign_like
from diffprune.cluster_files import (
    CENTROIDS_FILE,
    CLUSTER_FIELD,
    DISTANCE_FIELD,
    cluster_sizes,
    load_centroids,
    save_centroids,
)
from diffprune.embedding_rows import EmbeddingRows
from diffprune.engines import Engine, Made, no_failures, run_stage
from diffprune.errors import InputError
from diffprune.files import fingerprint
from diffprune.hierarchical_kmeans import HierarchicalKMeans
from diffprune.kmeans import KMeans
from diffprune.kmeans_faiss import faiss_centroids
from diffprune.progress import Progress
from diffprune.rank_talk import RankTalk
from diffprune.storage import as_path
from diffprune.storage.folders import partials_folder
from diffprune.tables import BASE_COLUMNS, STAGE_FILE

ENGINES = ("diffprune", "faiss")


def cluster(
    embeddings: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    k: int | None = None,
    like: str | os.PathLike | None = None,
    levels: Sequence[int] = (),
    seed: int = 0,
    init: str = "k-means||",
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 1e-4,
    metric: str = "euclidean",
    batch_size: int | None = None,
    engine: str = "diffprune",
    memory: int | str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """k-means over embeddings: tables with ``cluster`` (int32) and ``distance`` per sample, and centroids.

    Assignments are exact and deterministic for a seed. ``<out>/centroids.safetensors`` holds the centroids float32
    [k, D]. Failed samples have no cluster. Under torchrun each process reads its share of the shards, for a data set
    that no machine holds; the files are the same to the byte.

    Args:
        embeddings: a folder that ``embed`` wrote, or several by the same model.
        k: how many clusters.
        like: instead of k, a folder that this function wrote: its centroids, metric and cluster numbers stay, and
            embeddings are only assigned. More embeddings may then join ``out``.
        levels: falling numbers of clusters of the clusters, see ``HierarchicalKMeans``: columns ``cluster_2``, ....
        init, n_init, max_iter, tol, metric, batch_size: as ``KMeans``; "split" is the start for many clusters.
        engine: "diffprune", or "faiss": centroids by faiss's own Lloyd, float32 and in memory, to compare with; labels
            and distances are exact either way.
        memory: bytes, or "500MB", "2GiB", of embeddings in memory at a time; more are read from disk in every round,
            with the same result. By default 1 GiB.

    Returns counts, ``inertia``, ``iterations`` and the cluster sizes' range. Raises InputError if there are fewer
    distinct embeddings than ``k``, if one is not finite (naming its key), or if they are of different models.
    """
    if (k is None) == (like is None):
        raise InputError("cluster: expected k, or the folder of an earlier run for like")
    if engine not in ENGINES:
        raise InputError(f"cluster: expected engine to be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "faiss" and (levels or batch_size or n_init > 1):
        raise InputError("cluster: engine 'faiss' takes no levels, batch_size or n_init; use 'diffprune'")
    if levels and (batch_size or n_init > 1):
        raise InputError("cluster: levels take no batch_size or n_init")
    if like is not None:
        if levels or batch_size or n_init > 1 or engine != "diffprune":
            raise InputError("cluster: like only assigns: it takes no levels, batch_size, n_init or engine")
        return assign_like(like, embeddings, out, memory=memory, dry_run=dry_run)
    talk = RankTalk.of_torchrun()
    if talk.size > 1 and (engine == "faiss" or batch_size or init == "split"):
        raise InputError("cluster: under torchrun it takes no engine faiss, batch_size or init split")
    source = EmbeddingRows(embeddings, talk)
    if (rows := talk.count(source.rows)) < k:
        raise InputError(f"cluster: expected at least k={k} distinct embeddings, got {rows} in all; lower k")
    out = as_path(out)
    options: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "metric": metric, "seed": seed}
    config = {
        "method": "cluster",
        "k": k,
        **options,
        "init": init,
        "n_init": n_init,
        "embeddings": source.fingerprint,
        "model": source.metadata.get("model"),
        "model_sha256": source.metadata.get("model_sha256"),
    }
    unusual = {"levels": list(levels), "batch_size": batch_size, "engine": engine if engine != "diffprune" else None}
    config |= {name: value for name, value in unusual.items() if value}
    options["memory"] = source.memory(memory)
    fitted: dict[str, np.ndarray] = {}

    partials = partials_folder(out, fingerprint([config, source.identities]))
    saved, latest = out / CENTROIDS_FILE, partials / "rounds.safetensors"
    about: dict[str, Any] = {}

    def fit() -> None:
        # of a run that was stopped among its tables; all processes have to go the same way
        if not levels and metric == "euclidean" and talk.first([saved.is_file()])[0]:
            given: dict[str, Any] = {**options, "init": load_centroids(saved)[0], "max_iter": 0}
            kmeans = KMeans(k, **given).fit(source.parts, keys=source.keys, talk=talk)
            fitted.update(cluster=kmeans.assignment_, distance=kmeans.distance_)
            return
        if levels:
            tree = HierarchicalKMeans([k, *levels], init=init, **options).fit(source.parts, keys=source.keys, talk=talk)
            lowest = tree.levels_[0]
            fitted.update({f"cluster_{i}": a for i, a in enumerate(tree.assignments_[1:], start=2)})
            fitted.update(cluster=lowest.assignment, distance=lowest.distance)
            about.update(inertia=lowest.inertia)
            fitted["centroids"] = lowest.centroids
        else:
            start, rounds = (init, options), None
            if engine == "faiss":
                start = faiss_centroids(source.parts, k, keys=source.keys, **options), {**options, "max_iter": 0}
                rounds = max_iter
            given = {"n_init": n_init, "batch_size": batch_size, **start[1]}
            kmeans = KMeans(k, init=start[0], **given).fit(source.parts, keys=source.keys, talk=talk, rounds=latest)
            fitted.update(cluster=kmeans.assignment_, distance=kmeans.distance_)
            about.update(inertia=kmeans.inertia_, iterations=kmeans.n_iter_ if rounds is None else rounds)
            fitted["centroids"] = kmeans.centroids_

    def begin(_: list[str]) -> None:
        try:
            fit()
        except InputError:
            if not talk.rank and not saved.is_file() and not latest.is_file():  # there is nothing to go on with
                (out / STAGE_FILE).unlink(missing_ok=True)
            raise
        if talk.rank or "centroids" not in fitted:
            return
        save_centroids(saved, fitted["centroids"], about)

    def work(stem: str, bar: Progress) -> Made:
        base = source.table(stem).select(BASE_COLUMNS)
        bar.advance(base.num_rows)
        base = base.append_column(CLUSTER_FIELD, source.column(stem, fitted["cluster"], pa.int32()))
        for i in range(2, 2 + len(levels)):
            field = pa.field(f"cluster_{i}", pa.int32(), metadata={"meaning": f"cluster of the clusters, level {i}"})
            base = base.append_column(field, source.column(stem, fitted[f"cluster_{i}"], pa.int32()))
        return no_failures(base.append_column(DISTANCE_FIELD, source.column(stem, fitted["distance"], pa.float64())))

    summary = run_stage(
        "cluster",
        out,
        config,
        source.stems,
        work,
        total=sum(rows for _, _, rows in source.spans.values()) * talk.size,  # failed ones too
        inputs=source.identities,
        whole=True,
        at_once=True,
        begin=begin,
        dry_run=dry_run,
        engine=Engine(ranks=talk),
    )
    if dry_run:
        return {**summary, "k": k, "dimensions": source.dimensions}
    if not talk.rank:
        shutil.rmtree(partials, ignore_errors=True)
    return {**summary, "k": k, **cluster_sizes(out, k), **load_centroids(saved)[1]}
