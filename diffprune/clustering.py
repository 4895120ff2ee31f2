"""``cluster``: k-means over embeddings -> the columns ``cluster`` and ``distance``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import safe_open
from safetensors.numpy import save_file

from diffprune.arrays import ArrayFolder
from diffprune.engines import run_stage
from diffprune.files import atomic_path
from diffprune.kmeans import KMeans
from diffprune.progress import Progress
from diffprune.tables import BASE_COLUMNS, read_folder

CENTROIDS_FILE = "centroids.safetensors"

CLUSTER_FIELD = pa.field("cluster", pa.int32(), metadata={"meaning": "k-means label over the embeddings"})
DISTANCE_FIELD = pa.field(
    "distance",
    pa.float64(),
    metadata={"keep": "lowest", "meaning": "Euclidean distance of the embedding to its cluster's centroid"},
)


def cluster(
    embeddings: str | Path,
    out: str | Path,
    *,
    k: int,
    seed: int = 0,
    max_iter: int = 100,
    metric: str = "euclidean",
    dry_run: bool = False,
) -> dict[str, Any]:
    """k-means over an embeddings folder: tables with ``cluster`` (int32) and ``distance`` per sample, and centroids.

    Assignments are exact and deterministic for a seed. ``<out>/centroids.safetensors`` holds the centroids float32
    [k, D]. Returns counts, ``inertia``, ``iterations`` and the cluster sizes' range. Raises InputError if there are
    fewer distinct embeddings than ``k``.
    """
    folder = ArrayFolder(embeddings, kind="embeddings")
    out = Path(out)
    table, points = folder.load()
    config = {
        "method": "cluster",
        "k": k,
        "seed": seed,
        "max_iter": max_iter,
        "metric": metric,
        "embeddings": folder.fingerprint,
        "model": folder.metadata.get("model"),
        "model_sha256": folder.metadata.get("model_sha256"),
    }
    fitted: dict[str, Any] = {}

    def fit() -> None:
        kmeans = KMeans(k, max_iter=max_iter, metric=metric, seed=seed).fit(points)
        keys = table["key"].to_pylist()
        fitted["rows"] = dict(zip(keys, range(len(keys)), strict=True))
        fitted["cluster"], fitted["distance"] = (np.asarray(a) for a in (kmeans.assignment_, kmeans.distance_))
        # one entry: safetensors writes several in no fixed order
        about = {"fit": json.dumps({"inertia": float(kmeans.inertia_), "iterations": int(kmeans.n_iter_)})}
        with atomic_path(out / CENTROIDS_FILE) as temporary:
            save_file({"centroids": np.ascontiguousarray(kmeans.centroids_, np.float32)}, temporary, metadata=about)

    def work(stem: str, bar: Progress) -> pa.Table:
        base = folder.table(stem).select(BASE_COLUMNS)
        rows = [fitted["rows"].get(key) for key in base["key"].to_pylist()]
        clusters = [None if row is None else int(fitted["cluster"][row]) for row in rows]
        distances = [None if row is None else float(fitted["distance"][row]) for row in rows]
        bar.advance(base.num_rows)
        base = base.append_column(CLUSTER_FIELD, pa.array(clusters, pa.int32()))
        return base.append_column(DISTANCE_FIELD, pa.array(distances, pa.float64()))

    summary = run_stage("cluster", out, config, folder.stems, work, total=table.num_rows, prepare=fit, dry_run=dry_run)
    if dry_run:
        return {**summary, "k": k, "dimensions": points.shape[1]}
    return {**summary, "k": k, **_sizes(out), **_fit_summary(out / CENTROIDS_FILE)}


def _fit_summary(centroids: Path) -> dict[str, float]:
    with safe_open(centroids, framework="numpy") as file:
        return json.loads(file.metadata()["fit"])


def _sizes(out: Path) -> dict[str, int]:
    counts = pc.value_counts(pc.drop_null(read_folder(out, ["cluster"])["cluster"])).field("counts").to_numpy(False)
    return {"smallest_cluster": int(counts.min()), "largest_cluster": int(counts.max())}
