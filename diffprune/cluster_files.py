"""What ``cluster`` writes: its columns and its centroids."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffprune.errors import InputError
from diffprune.storage import AnyPath
from diffprune.tables import read_folder
from diffprune.tensor_files import load_tensors, save_tensors

CENTROIDS_FILE = "centroids.safetensors"

CLUSTER_FIELD = pa.field("cluster", pa.int32(), metadata={"meaning": "k-means label over the embeddings"})
DISTANCE_FIELD = pa.field(
    "distance",
    pa.float64(),
    metadata={"keep": "lowest", "meaning": "Euclidean distance of the embedding to its cluster's centroid"},
)


def save_centroids(path: AnyPath, centroids: np.ndarray, about: dict[str, Any]) -> None:
    """Write centroids [k, D] as float32, and what the fit has to say, JSON-able."""
    # one entry: safetensors writes several in no fixed order
    tensors = {"centroids": torch.from_numpy(np.ascontiguousarray(centroids, np.float32))}
    save_tensors(path, tensors, {"fit": json.dumps(about)})


def load_centroids(path: AnyPath) -> tuple[np.ndarray, dict[str, Any]]:
    """What ``save_centroids`` wrote; InputError if it is damaged."""
    tensors, about = load_tensors(path)
    try:
        centroids, fit = tensors["centroids"], json.loads(about["fit"])
        if centroids.dim() != 2 or centroids.dtype != torch.float32 or not isinstance(fit, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected centroids that `cluster` wrote; delete it and run again") from error
    return centroids.numpy(), fit


def cluster_sizes(out: AnyPath, k: int) -> dict[str, int]:
    """The smallest and the largest number of samples of a cluster."""
    counts = np.bincount(pc.drop_null(read_folder(out, ["cluster"])["cluster"]).to_numpy(), minlength=k)
    return {"smallest_cluster": int(counts.min()), "largest_cluster": int(counts.max())}
