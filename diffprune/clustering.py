"""``cluster``: k-means over embeddings -> the columns ``cluster`` and ``distance``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffprune.arrays import ArrayFolder
from diffprune.engines import Engine, run_stage
from diffprune.errors import InputError
from diffprune.files import atomic_path, fingerprint
from diffprune.hierarchical_kmeans import HierarchicalKMeans
from diffprune.kmeans import KMeans
from diffprune.kmeans_faiss import faiss_centroids
from diffprune.kmeans_points import Part
from diffprune.progress import Progress
from diffprune.quantities import parse_bytes
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.storage import AnyPath, as_path
from diffprune.storage.folders import partials_folder
from diffprune.storage.spool import local_file
from diffprune.tables import BASE_COLUMNS, STAGE_FILE, read_folder
from diffprune.unique_keys import told_twice

CENTROIDS_FILE = "centroids.safetensors"
ENGINES = ("diffprune", "faiss")

CLUSTER_FIELD = pa.field("cluster", pa.int32(), metadata={"meaning": "k-means label over the embeddings"})
DISTANCE_FIELD = pa.field(
    "distance",
    pa.float64(),
    metadata={"keep": "lowest", "meaning": "Euclidean distance of the embedding to its cluster's centroid"},
)


def cluster(
    embeddings: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    k: int,
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
        levels: falling numbers of clusters of the clusters, see ``HierarchicalKMeans``: columns ``cluster_2``, ....
        init, n_init, max_iter, tol, metric, batch_size: as ``KMeans``; "split" is the start for many clusters.
        engine: "diffprune", or "faiss": centroids by faiss's own Lloyd, float32 and in memory, to compare with; labels
            and distances are exact either way.
        memory: bytes, or "500MB", "2GiB", of embeddings in memory at a time; more are read from disk in every round,
            with the same result. By default 1 GiB.

    Returns counts, ``inertia``, ``iterations`` and the cluster sizes' range. Raises InputError if there are fewer
    distinct embeddings than ``k``, if one is not finite (naming its key), or if they are of different models.
    """
    if engine not in ENGINES:
        raise InputError(f"cluster: expected engine to be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "faiss" and (levels or batch_size or n_init > 1):
        raise InputError("cluster: engine 'faiss' takes no levels, batch_size or n_init; use 'diffprune'")
    if levels and (batch_size or n_init > 1):
        raise InputError("cluster: levels take no batch_size or n_init")
    talk = RankTalk.of_torchrun()
    if talk.size > 1 and (engine == "faiss" or batch_size or init == "split"):
        raise InputError("cluster: under torchrun it takes no engine faiss, batch_size or init split")
    source = EmbeddingRows(embeddings, talk)
    out = as_path(out)
    options = {"max_iter": max_iter, "tol": tol, "metric": metric, "seed": seed}
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
    options["memory"] = parse_bytes(memory)
    fitted: dict[str, np.ndarray] = {}

    partials = partials_folder(out, fingerprint([config, source.identities]))
    saved, latest = out / CENTROIDS_FILE, partials / "rounds.safetensors"
    about: dict[str, Any] = {}

    def fit() -> None:
        # of a run that was stopped among its tables; all processes have to go the same way
        if not levels and metric == "euclidean" and talk.first([saved.is_file()])[0]:
            given = {**options, "init": load_centroids(saved), "max_iter": 0}
            kmeans = KMeans(k, **given).fit(source.parts, keys=source.keys, talk=talk)
            fitted.update(cluster=kmeans.assignment_, distance=kmeans.distance_)
            return
        if levels:
            tree = HierarchicalKMeans([k, *levels], init=init, **options).fit(source.parts, keys=source.keys, talk=talk)
            kmeans = tree.levels_[0]
            fitted.update({f"cluster_{i}": a for i, a in enumerate(tree.assignments_[1:], start=2)})
            fitted.update(cluster=kmeans.assignment, distance=kmeans.distance)
            about.update(inertia=kmeans.inertia)
            fitted["centroids"] = kmeans.centroids
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
        with atomic_path(saved) as temporary:
            # one entry: safetensors writes several in no fixed order
            arrays = {"centroids": np.ascontiguousarray(fitted["centroids"], np.float32)}
            save_file(arrays, temporary, metadata={"fit": json.dumps(about)})

    def work(stem: str, bar: Progress) -> pa.Table:
        base = source.table(stem).select(BASE_COLUMNS)
        bar.advance(base.num_rows)
        base = base.append_column(CLUSTER_FIELD, source.column(stem, fitted["cluster"], pa.int32()))
        for i in range(2, 2 + len(levels)):
            field = pa.field(f"cluster_{i}", pa.int32(), metadata={"meaning": f"cluster of the clusters, level {i}"})
            base = base.append_column(field, source.column(stem, fitted[f"cluster_{i}"], pa.int32()))
        return base.append_column(DISTANCE_FIELD, source.column(stem, fitted["distance"], pa.float64()))

    summary = run_stage(
        "cluster",
        out,
        config,
        source.stems,
        work,
        total=source.rows * talk.size,
        inputs=source.identities,
        whole=True,
        begin=begin,
        dry_run=dry_run,
        engine=Engine(ranks=talk),
    )
    if dry_run:
        return {**summary, "k": k, "dimensions": source.dimensions}
    if not talk.rank:
        shutil.rmtree(partials, ignore_errors=True)
    return {**summary, "k": k, **_sizes(out), **_fit_summary(saved)}


class EmbeddingRows:
    """The embeddings of one or several folders of the same model: the rows that are ok, in shard order, on disk.

    With several processes, ``talk``, each has the rows of its share of the shards: ``parts``, ``keys``, ``rows``.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path], talk: RankTalk = ALONE) -> None:
        paths = [folders] if isinstance(folders, (str, Path)) else list(folders)
        if not paths:
            raise InputError("cluster: expected at least one folder of embeddings, got none")
        opened = [ArrayFolder(path, kind="embeddings") for path in paths]
        self.metadata = opened[0].metadata
        for folder in opened:
            _same_model(opened[0], folder)
        self.folders = {stem: folder for folder in opened for stem in folder.stems}
        self.stems = [stem for folder in opened for stem in folder.stems]
        self.identities = {stem: about for folder in opened for stem, about in folder.identities().items()}
        if len(self.folders) != len(self.stems):
            twice = next(stem for stem in self.stems if self.stems.count(stem) > 1)
            raise InputError(f"cluster: shard {twice!r} is in two of the folders; names of shards must be unique")
        self.parts: list[Part] = []
        self.spans: dict[str, tuple[int, np.ndarray, int]] = {}  # its first row here, which rows are ok, of how many
        self.rows, keys = 0, []
        for stem in Engine(ranks=talk).mine(self.stems):
            folder = self.folders[stem]
            table = folder.keys(stem)
            ok = pc.equal(table["status"], "ok")
            rows = np.flatnonzero(ok.to_numpy())
            array = folder.array(stem, by_rows=True)
            self.parts.append(Part(array, None if len(rows) == len(array) else rows))
            self.spans[stem] = (self.rows, rows, len(array))
            keys.append(table["key"].filter(ok))
            self.rows += len(rows)
        self.keys = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.large_string())
        if not self.parts and self.stems:  # more processes than shards: this one has none of their rows
            array = self.folders[self.stems[0]].array(self.stems[0], by_rows=True)
            self.parts.append(Part(array, np.zeros(0, dtype=np.int64)))
        self.dimensions = self.parts[0].array.shape[1] if self.parts else 0
        self.fingerprint = opened[0].fingerprint if len(opened) == 1 else [folder.fingerprint for folder in opened]
        where = ", ".join(map(str, paths))
        if talk.max(self.rows) == 0:
            raise InputError(f"{where}: no sample has an embedding")
        if twice := told_twice(self.keys, talk):
            raise InputError(f"{where}: {twice}; keys must be unique")

    def table(self, stem: str) -> pa.Table:
        """The base columns of one shard's samples, failed ones too."""
        return self.folders[stem].table(stem)

    def column(self, stem: str, values: np.ndarray, dtype: pa.DataType) -> pa.Array:
        """The part of ``values`` [rows] that is of one shard, null for failed samples."""
        first, rows, total = self.spans[stem]
        column, missing = np.zeros(total, values.dtype), np.ones(total, bool)
        column[rows], missing[rows] = values[first : first + len(rows)], False
        return pa.array(column.astype(dtype.to_pandas_dtype()), dtype, mask=missing)


def _same_model(first: ArrayFolder, other: ArrayFolder) -> None:
    for name in ("model", "model_sha256", "shape"):
        one, another = first.metadata.get(name), other.metadata.get(name)
        if one != another:
            raise InputError(
                f"{other.folder}: expected embeddings of the same model as {first.folder}, found {name} {another!r}, "
                f"not {one!r}; distances between them mean nothing"
            )


def load_centroids(path: AnyPath) -> np.ndarray:
    """float32 [k, D] of a file that ``cluster`` wrote; InputError if it is damaged."""
    try:
        with local_file(path) as local, safe_open(local, framework="numpy") as file:
            return file.get_tensor("centroids")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error


def _fit_summary(centroids: AnyPath) -> dict[str, float]:
    with local_file(centroids) as local, safe_open(local, framework="numpy") as file:
        return json.loads(file.metadata()["fit"])


def _sizes(out: AnyPath) -> dict[str, int]:
    counts = pc.value_counts(pc.drop_null(read_folder(out, ["cluster"])["cluster"])).field("counts").to_numpy(False)
    return {"smallest_cluster": int(counts.min()), "largest_cluster": int(counts.max())}
