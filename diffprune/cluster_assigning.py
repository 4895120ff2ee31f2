"""``cluster --like``: embeddings are assigned to the centroids of an earlier run, whose cluster numbers stay."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

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
from diffprune.kmeans import KMeans
from diffprune.progress import Progress
from diffprune.rank_talk import RankTalk
from diffprune.storage import as_path
from diffprune.tables import BASE_COLUMNS, read_stage


def assign_like(
    like: str | os.PathLike,
    embeddings: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    memory: int | str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """``cluster`` with ``like``: a map over shards, so that a folder takes more of them later."""
    earlier, out = as_path(like), as_path(out)
    stage = read_stage(earlier)
    config = stage.get("config", {})
    if stage.get("stage") != "cluster" or "metric" not in config:
        raise InputError(f"{earlier}: expected a folder that `diffprune cluster` wrote, found {stage.get('stage')!r}")
    if config.get("levels"):
        raise InputError(f"{earlier}: has levels {config['levels']}; like assigns to single clusters only")
    talk = RankTalk.of_torchrun()
    source = EmbeddingRows(embeddings, talk)
    for name in ("model", "model_sha256"):
        here, there = source.metadata.get(name), config.get(name)
        if here != there:
            raise InputError(
                f"{source.folders.folder}: expected embeddings of the model whose clusters {earlier} has, found {name} "
                f"{here!r}, not {there!r}; distances between them mean nothing"
            )
    centroids, _ = load_centroids(earlier / CENTROIDS_FILE)
    if centroids.shape[1] != source.dimensions:
        raise InputError(
            f"{source.folders.folder}: expected embeddings of {centroids.shape[1]} dimensions, as the centroids of "
            f"{earlier} have, found {source.dimensions}"
        )
    metric, k = config["metric"], len(centroids)
    kmeans = KMeans.of_centroids(centroids, metric=metric, memory=source.memory(memory))

    def begin(_: list[str]) -> None:
        saved = out / CENTROIDS_FILE
        if not talk.rank and not saved.is_file():
            save_centroids(saved, centroids, {})

    def work(stem: str, bar: Progress) -> Made:
        base = source.table(stem).select(BASE_COLUMNS)
        part, keys = source.part(stem)
        nearest = kmeans.nearest([part], keys=keys) if len(part) else (np.zeros(0, np.int32), np.zeros(0, np.float32))
        bar.advance(base.num_rows)
        for field, values in zip((CLUSTER_FIELD, DISTANCE_FIELD), nearest, strict=True):
            base = base.append_column(field, source.shard_column(stem, values, field.type))
        return no_failures(base)

    summary = run_stage(
        "cluster",
        out,
        {
            "method": "cluster",
            "k": k,
            "metric": metric,
            "centroids": hashlib.sha256(centroids.tobytes()).hexdigest(),
            "model": config.get("model"),
            "model_sha256": config.get("model_sha256"),
        },
        source.stems,
        work,
        total=sum(rows for _, _, rows in source.spans.values()) * talk.size,  # failed ones too
        inputs=source.identities,
        metadata={"like": str(earlier)},
        begin=begin,
        dry_run=dry_run,
        engine=Engine(ranks=talk),
    )
    if dry_run:
        return {**summary, "k": k, "dimensions": source.dimensions}
    return {**summary, "k": k, **cluster_sizes(out, k)}
