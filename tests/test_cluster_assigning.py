"""New embeddings are assigned to the clusters of an earlier run; cluster numbers stay, and so does every centroid."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_clustering import SIZES, write_embeddings
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.cli.app import app
from diffprune.cluster_files import CENTROIDS_FILE
from diffprune.errors import InputError, ResumeError
from diffprune.tables import read_folder, read_stage


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(5, 6))[rng.integers(0, 5, sum(SIZES))] + 0.3 * rng.normal(size=(sum(SIZES), 6))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_same_embeddings_get_the_same_clusters(tmp_path, values, metric):
    folder = write_embeddings(tmp_path / "emb", values, failed=(3, 70, 75))
    diffprune.cluster(folder, tmp_path / "old", k=5, metric=metric)
    report = diffprune.cluster(folder, tmp_path / "new", like=tmp_path / "old")
    assert (report["k"], report["samples"], report["failed"]) == (5, 200, 3)
    old, new = read_folder(tmp_path / "old"), read_folder(tmp_path / "new")
    assert new.equals(old)
    assert (tmp_path / "new" / CENTROIDS_FILE).is_file() and read_stage(tmp_path / "new")["config"]["metric"] == metric
    diffprune.cluster(folder, tmp_path / "third", like=tmp_path / "new", memory="1kB")
    assert read_folder(tmp_path / "third").equals(old)


def test_new_shards_join_and_no_centroid_moves(tmp_path, values):
    old = write_embeddings(tmp_path / "old", values)
    diffprune.cluster(old, tmp_path / "clusters", k=5)
    before = load_file(tmp_path / "clusters" / CENTROIDS_FILE)["centroids"]
    near = np.tile(before[2], (sum(SIZES), 1)) + 0.01  # all of one cluster
    new = write_embeddings(tmp_path / "new", near)
    report = diffprune.cluster(new, tmp_path / "out", like=tmp_path / "clusters")
    assert (report["smallest_cluster"], report["largest_cluster"]) == (0, sum(SIZES))
    assert set(read_folder(tmp_path / "out")["cluster"].to_pylist()) == {2}
    assert np.array_equal(load_file(tmp_path / "out" / CENTROIDS_FILE)["centroids"], before)
    grown = tmp_path / "grown"
    shutil.copytree(new, grown)
    for kind in ("parquet", "npy"):
        (grown / f"c.{kind}").rename(tmp_path / f"c.{kind}")
    stage = (grown / "stage.json").read_text()
    (grown / "stage.json").write_text(stage.replace('    "b",\n    "c"\n', '    "b"\n'))
    assert ArrayFolder(grown).stems == ["a", "b"]
    diffprune.cluster(grown, tmp_path / "joined", like=tmp_path / "clusters")
    (grown / "stage.json").write_text(stage)
    for kind in ("parquet", "npy"):
        (tmp_path / f"c.{kind}").rename(grown / f"c.{kind}")
    assert diffprune.cluster(grown, tmp_path / "joined", like=tmp_path / "clusters")["shards_done_before"] == 2
    assert read_folder(tmp_path / "joined").equals(read_folder(tmp_path / "out"))
    diffprune.cluster(old, tmp_path / "other", k=4)
    with pytest.raises(ResumeError, match="centroids was"):
        diffprune.cluster(grown, tmp_path / "joined", like=tmp_path / "other")


def test_what_does_not_fit_is_refused(tmp_path, values):
    folder = write_embeddings(tmp_path / "emb", values)
    diffprune.cluster(folder, tmp_path / "old", k=5)
    diffprune.cluster(folder, tmp_path / "tree", k=5, levels=(2,))

    def cluster(embeddings: Path, **options) -> None:
        diffprune.cluster(embeddings, tmp_path / "new", **{"like": tmp_path / "old", **options})

    with pytest.raises(InputError, match="found model 'other', not 'm'"):
        cluster(write_embeddings(tmp_path / "other", values, model="other"))
    with pytest.raises(InputError, match=r"expected embeddings of 6 dimensions, .* found 3"):
        cluster(write_embeddings(tmp_path / "narrow", values[:, :3]))
    with pytest.raises(InputError, match=r"tree: has levels \[2\]"):
        cluster(folder, like=tmp_path / "tree")
    with pytest.raises(InputError, match="expected a folder that `diffprune cluster` wrote, found 'embed'"):
        cluster(folder, like=folder)
    with pytest.raises(InputError, match="expected k, or the folder of an earlier run"):
        cluster(folder, k=3)
    with pytest.raises(InputError, match="expected k, or the folder of an earlier run"):
        cluster(folder, like=None)
    with pytest.raises(InputError, match="like only assigns"):
        cluster(folder, n_init=2)
    assert not (tmp_path / "new").exists()
    bad = values.copy()
    bad[71] = np.nan
    with pytest.raises(InputError, match="c/071"):
        cluster(write_embeddings(tmp_path / "bad", bad))


def test_the_command_line(tmp_path, values):
    folder = write_embeddings(tmp_path / "emb", values)

    def run(*arguments) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        return result.exit_code, result.output

    assert run("cluster", folder, "-k", 5, "-o", tmp_path / "old")[0] == 0
    assert run("cluster", folder, "--like", tmp_path / "old", "-o", tmp_path / "new")[0] == 0
    assert read_folder(tmp_path / "new").equals(read_folder(tmp_path / "old"))
    code, output = run("cluster", folder, "-k", 5, "--like", tmp_path / "old", "-o", tmp_path / "new")
    assert code == 2 and "expected one of -k, --choose-k and --like" in output
    for option in (("--seed", 0), ("--metric", "euclidean"), ("--levels", 2)):
        code, output = run("cluster", folder, "--like", tmp_path / "old", *option, "-o", tmp_path / "new")
        assert code == 2 and "--like only assigns" in output, output


def test_a_fitted_k_means_of_centroids():
    centroids = np.array([[0.0, 0.0], [9.0, 9.0], [0.0, 4.0]], np.float32)
    fitted = diffprune.KMeans.of_centroids(centroids)
    points = np.array([[1.0, 0.0], [0.0, 3.0]], np.float32)
    assert fitted.predict(points).tolist() == [0, 2]
    assert [found.tolist() for found in fitted.nearest(points)] == [[0, 2], [1.0, 1.0]]
    assert np.array_equal(fitted.centroids_, centroids) and fitted.k == 3
    with pytest.raises(InputError, match="centroids"):
        diffprune.KMeans.of_centroids(np.array([[np.nan, 0.0]], np.float32))
