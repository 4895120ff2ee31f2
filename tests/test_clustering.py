"""``cluster``: exact labels, distances to the own centroid, joined by key."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.clustering import CENTROIDS_FILE
from diffprune.errors import InputError
from diffprune.tables import read_folder


def test_labels_are_the_nearest_centroids_in_float64(small_run):
    table, points = ArrayFolder(small_run.embeddings).load()
    centroids = load_file(small_run.clusters / CENTROIDS_FILE)["centroids"].astype(np.float64)
    squared = ((points[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    found = read_folder(small_run.clusters)
    assert found["key"].to_pylist() == table["key"].to_pylist()
    labels = found["cluster"].to_numpy()
    chosen = squared[np.arange(len(points)), labels]
    assert np.allclose(chosen, squared.min(axis=1), rtol=1e-12)
    assert np.allclose(found["distance"].to_numpy(), np.sqrt(chosen), rtol=1e-5, atol=1e-6)
    assert sorted(set(labels.tolist())) == list(range(6))
    for label in range(6):  # labels belong to the final centroids, which are the means of converged clusters
        assert np.allclose(points[labels == label].mean(axis=0), centroids[label], atol=1e-3)


def test_a_second_run_gives_the_same_bytes(small_run, tmp_path):
    result = diffprune.cluster(small_run.embeddings, tmp_path / "again", k=6)
    assert result["samples"] == 120 and result["smallest_cluster"] >= 1
    for path in sorted(small_run.clusters.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_latents_are_no_embeddings_and_too_many_clusters_are_told(small_run, tmp_path):
    with pytest.raises(InputError, match="expected embeddings, found latents"):
        diffprune.cluster(small_run.latents, tmp_path / "c", k=3)
    with pytest.raises(InputError, match="distinct"):
        diffprune.cluster(small_run.embeddings, tmp_path / "c", k=1000)
