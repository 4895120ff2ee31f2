"""``cluster``: exact labels, distances to the own centroid, joined by key; from disk as from memory; and which k."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

import diffprune
from diffprune import cluster_count
from diffprune.arrays import ArrayFolder, write_array
from diffprune.cli.app import app
from diffprune.cluster_count import adjusted_rand, advise, knee, parse_ks, silhouette
from diffprune.cluster_files import CENTROIDS_FILE
from diffprune.engines import Engine, run_stage
from diffprune.errors import InputError
from diffprune.hierarchical_kmeans import HierarchicalKMeans
from diffprune.quantities import parse_bytes
from diffprune.shards import Member, Sample
from diffprune.tables import base_table, read_folder

SIZES = (70, 1, 129)


def write_embeddings(folder: Path, values: np.ndarray, *, failed: tuple[int, ...] = (), model: str = "m") -> Path:
    """An embeddings folder of three shards; rows in ``failed`` have none."""
    starts = dict(zip(("a", "b", "c"), np.cumsum((0, *SIZES)), strict=False))

    def work(stem: str, bar) -> pa.Table:
        rows = range(starts[stem], starts[stem] + SIZES["abc".index(stem)])
        samples = [
            Sample(f"{stem}/{row:03d}", i, (Member("x.png", "png", 1024 * i, 1024 * i + 512, 99),))
            for i, row in enumerate(rows)
        ]
        errors = ["broken" if row in failed else None for row in rows]
        array = np.where(np.isin(rows, failed)[:, None], np.nan, values[rows.start : rows.stop])
        write_array(folder / f"{stem}.npy", array)
        return base_table(f"{stem}.tar", samples, [None] * len(rows), [None] * len(rows), errors)

    config = {"kind": "embeddings", "model": model, "model_sha256": model * 8, "shape": [values.shape[1]]}
    run_stage("embed", folder, config, list(starts), work, total=len(values), engine=Engine(max_failures=0))
    return folder


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 6))
    return centres[rng.integers(0, 10, sum(SIZES))] + 0.3 * rng.normal(size=(sum(SIZES), 6))


def test_rows_that_failed_before_do_not_stop_it(values, tmp_path):
    """More in a row than stop a stage in which they fail."""
    folder = write_embeddings(tmp_path / "embeddings", values, failed=tuple(range(75, 190)))
    for given in ({"k": 4}, {"like": tmp_path / "k"}):
        report = diffprune.cluster(folder, tmp_path / next(iter(given)), **given)
        assert (report["samples"], report["failed"]) == (200, 115)


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


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"init": "k-means++"}, {"levels": [4, 2]}])
def test_from_disk_the_same_bytes_as_in_memory(tmp_path, values, options):
    folder = write_embeddings(tmp_path / "e", values, failed=(0, 70, 199, 100))
    whole = diffprune.cluster(folder, tmp_path / "whole", k=9, **options)
    streamed = diffprune.cluster(folder, tmp_path / "streamed", k=9, memory="0.5kB", **options)
    assert whole == {**streamed, "out": whole["out"]}
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes(), path.name
    table = read_folder(tmp_path / "whole")
    failed = [row for row, label in enumerate(table["cluster"].to_pylist()) if label is None]
    assert failed == [0, 70, 100, 199]
    assert [row for row, distance in enumerate(table["distance"].to_pylist()) if distance is None] == failed


def test_levels_are_columns(tmp_path, values):
    folder = write_embeddings(tmp_path / "e", values)
    diffprune.cluster(folder, tmp_path / "c", k=9, levels=[4, 2], seed=5)
    table = read_folder(tmp_path / "c")
    tree = HierarchicalKMeans([9, 4, 2], init="k-means||", max_iter=100, seed=5).fit(values.astype(np.float16))
    for name, labels in zip(("cluster", "cluster_2", "cluster_3"), tree.assignments_, strict=True):
        assert table[name].to_pylist() == labels.tolist()


def test_faiss_centroids_get_exact_labels(tmp_path, values):
    pytest.importorskip("faiss")
    folder = write_embeddings(tmp_path / "e", values, failed=(3,))
    ours = diffprune.cluster(folder, tmp_path / "ours", k=6, n_init=4)
    theirs = diffprune.cluster(folder, tmp_path / "theirs", k=6, engine="faiss", max_iter=20)
    assert theirs["inertia"] == pytest.approx(ours["inertia"], rel=0.3)
    centroids = load_file(tmp_path / "theirs" / CENTROIDS_FILE)["centroids"].astype(np.float64)
    ok = np.delete(np.arange(200), 3)
    squared = ((values.astype(np.float16)[ok, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    assert read_folder(tmp_path / "theirs")["cluster"].drop_null().to_pylist() == squared.argmin(axis=1).tolist()


def test_several_folders_of_one_model_and_mixed_models(tmp_path, values):
    one = write_embeddings(tmp_path / "one", values)
    with pytest.raises(InputError, match=r"shard 'a' is in two of the folders"):
        diffprune.cluster([one, one], tmp_path / "c", k=3)
    other = write_embeddings(tmp_path / "other", values, model="n")
    with pytest.raises(InputError, match=r"other: expected embeddings of the same model as .*one, found model 'n'"):
        diffprune.cluster([one, other], tmp_path / "c", k=3)
    again = write_embeddings(tmp_path / "again", values)
    stage = json.loads((again / "stage.json").read_text())
    for suffix in ("npy", "parquet"):
        (again / f"b.{suffix}").rename(again / f"d.{suffix}")
    (again / "stage.json").write_text(json.dumps({**stage, "shards": ["d"]}))
    with pytest.raises(InputError, match=r"one, .*again: key 'b/070' stands in it twice"):
        diffprune.cluster([one, again], tmp_path / "c", k=3)
    for name in ("b.npy", "b.parquet"):  # a shard of the other model in the folder of the first
        (one / name).write_bytes((other / name).read_bytes())
    with pytest.raises(InputError, match=r"b.parquet: made by another run .* maybe by another model"):
        diffprune.cluster(one, tmp_path / "c", k=3)
    assert not (tmp_path / "c").exists()


def test_embeddings_that_are_not_finite_are_named_by_key(tmp_path, values):
    values = values.copy()
    values[70] = np.inf
    values[199, 2] = np.nan
    folder = write_embeddings(tmp_path / "e", values, failed=(2,))
    with pytest.raises(InputError, match="2 of 199 points have NaN or infinity: keys 'b/070', 'c/199'; leave them out"):
        diffprune.cluster(folder, tmp_path / "c", k=3)
    values[[70, 199]] = 0
    folder = write_embeddings(tmp_path / "z", values)
    with pytest.raises(InputError, match="2 of 200 points have length 0, so no direction: keys 'b/070', 'c/199'"):
        diffprune.cluster(folder, tmp_path / "c", k=3, metric="cosine", memory=100)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_clustered_is_told(small_run, tmp_path, values):
    with pytest.raises(InputError, match="expected embeddings, found latents"):
        diffprune.cluster(small_run.latents, tmp_path / "c", k=3)
    with pytest.raises(InputError, match="distinct"):
        diffprune.cluster(small_run.embeddings, tmp_path / "c", k=1000)
    same = write_embeddings(tmp_path / "same", np.ones((200, 6)))
    with pytest.raises(InputError, match=r"at least k=2 distinct points, got 1 \(200 rows\)"):
        diffprune.cluster(same, tmp_path / "c", k=2)
    none = write_embeddings(tmp_path / "none", values, failed=tuple(range(200)))
    with pytest.raises(InputError, match="no sample has an embedding"):
        diffprune.cluster(none, tmp_path / "c", k=2)
    for options, message in (
        ({"engine": "cuml"}, "one of diffprune, faiss, got 'cuml'"),
        ({"engine": "faiss", "n_init": 2}, "takes no levels"),
        ({"levels": [2], "n_init": 2}, "levels take no"),
        ({"memory": "lots"}, "bytes such as 500MB or 2GiB, got 'lots'"),
        ({"memory": "1"}, "memory: expected at least the 12 bytes of an embedding, got 1; write 500MB or 2GiB"),
    ):
        with pytest.raises(InputError, match=message):
            diffprune.cluster(same, tmp_path / "c", k=3, **options)
    assert not (tmp_path / "c").exists()


def test_sizes_in_bytes():
    sizes = {"12": 12, "1kB": 1000, "2 GiB": 2 * 2**30, "1.5m": 1_500_000, "3TB": 3 * 10**12, 7: 7, None: None}
    assert {size: parse_bytes(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("text", "ks"),
    [
        ("8,16,...,128", [8, 16, 32, 64, 128]),
        ("8, 16, …, 32", [8, 16, 32]),
        ("10,20,...,50", [10, 20, 30, 40, 50]),
        ("3,5,10,...,80", [3, 5, 10, 20, 40, 80]),
        ("7,3,9", [3, 7, 9]),
    ],
)
def test_ranges_of_k(text, ks):
    assert parse_ks(text) == ks


@pytest.mark.parametrize("text", ["", "8,...,64", "8,16,...", "8,16,...,100", "16,8,...,64", "a,b"])
def test_ranges_that_go_nowhere(text):
    with pytest.raises(InputError, match="choose-k"):
        parse_ks(text)


def test_silhouette_and_adjusted_rand_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(300, 4)).astype(np.float32)) + 50
    first, second = (torch.from_numpy(np.r_[np.arange(k), rng.integers(0, k - 1, 300 - k)]) for k in (2, 12))
    first = second % 3
    rows = torch.arange(0, 300, 2)
    for found, labels in zip(silhouette(points, [first, second], rows), (first, second), strict=True):
        expected = metrics.silhouette_samples(points.double().numpy(), labels.numpy())[rows]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert silhouette(points, [second], torch.tensor([11]))[0] == 0  # a cluster of one
    for one, other in ((first, second), (second, second.flip(0)), (second, second)):
        expected = metrics.adjusted_rand_score(one.numpy(), other.numpy())
        assert adjusted_rand(one.numpy(), other.numpy()) == pytest.approx(expected, abs=1e-12)


def test_knee():
    assert knee([2, 4, 8, 16, 32], [100, 80, 20, 15, 10]) == (8, pytest.approx(0.5 - 10 / 90))
    assert knee([2, 4, 8], [30, 20, 10])[1] == pytest.approx(0)
    assert knee([2, 4], [1, 1]) == (4, 0)


def trial(k: int, inertia: float, silhouette: float, stability: float) -> cluster_count.Trial:
    return cluster_count.Trial(k, inertia, 0.5, silhouette, 0.01, stability, 0.02, 3)


def test_advice():
    sure = advise([trial(2, 100, 0.2, 0.3), trial(4, 20, 0.5, 0.9), trial(8, 15, 0.3, 0.5), trial(16, 10, 0.2, 0.4)])
    assert (sure.k, sure.sure) == (4, "sure")
    assert sure.accepted == {"inertia": [4], "silhouette": [4], "stability": [4]}
    two = advise([trial(2, 100, 0.2, 0.3), trial(4, 20, 0.5, 0.5), trial(8, 15, 0.495, 0.9), trial(16, 10, 0.2, 0.4)])
    assert (two.k, two.sure) == (4, "fairly sure")
    assert two.reasons[2] == "the stability is best, within its error, at 8, not 4"
    clustered = (trial(2, 90, 0.2, 0.7), trial(4, 60, 0.5, 0.5), trial(8, 30, 0.3, 0.4))
    vague = advise([replace(one, stability_error=0.2) for one in clustered])
    assert (vague.k, vague.sure) == (4, "not sure")  # the silhouette alone tells
    assert vague.reasons[2] == "the stability cannot tell 2, 4, 8 apart, within its error"
    edge = advise([trial(2, 30, 0.2, 0.3), trial(4, 20, 0.3, 0.5), trial(8, 10, 0.5, 0.9)])
    assert (edge.k, edge.sure) == (8, "fairly sure")
    assert edge.reasons == [
        "the inertia falls without a clear knee",
        "the silhouette is best, within its error, at 8",
        "the stability is best, within its error, at 8",
        "8 is the largest that was tried; try more",
    ]
    weak = advise([trial(2, 100, 0.01, 0.3), trial(4, 20, 0.05, 0.9), trial(8, 15, 0.02, 0.5)])
    assert (weak.k, weak.sure) == (4, "not sure") and "run into each other" in weak.reasons[-1]


def test_choose_k_leaves_out_what_half_of_the_sample_has_no_points_for(tmp_path):
    rng = np.random.default_rng(1)
    places = 8 * np.eye(24, 8) + rng.normal(size=(24, 8))
    folder = write_embeddings(tmp_path / "e", places[np.arange(200) % 24])
    found = diffprune.choose_k(folder, tmp_path / "out", ks=[2, 4, 8, 40, 50])
    assert found["reasons"][-1] == "40, 50 left out: half of the sample has fewer distinct embeddings"
    assert [t["k"] for t in json.loads((tmp_path / "out" / cluster_count.VALUES).read_text())["trials"]] == [2, 4, 8]
    assert "40, 50 left out" in (tmp_path / "out" / cluster_count.PAGE).read_text()
    with pytest.raises(
        InputError, match=r"fewer distinct embeddings than 40, 50 clusters: expected at least 3 .*got 2"
    ):
        diffprune.choose_k(folder, tmp_path / "none", ks=[2, 4, 40, 50])
    assert not (tmp_path / "none").exists()


def test_progress_counts_every_row_once(tmp_path, values, capsys):
    folder = write_embeddings(tmp_path / "e", values, failed=(3, 5, 150))
    diffprune.cluster(folder, tmp_path / "c", k=4)
    assert "cluster: 200/200 images" in capsys.readouterr().err
    diffprune.select(tmp_path / "c", tmp_path / "kept.parquet", order="k-center", count=5, embeddings=folder)
    assert "k-center: 5/5 samples" in capsys.readouterr().err


def test_a_dry_run_refuses_what_cannot_be_met(tmp_path, values):
    folder = write_embeddings(tmp_path / "e", values, failed=(5,))
    with pytest.raises(InputError, match="at least k=200 distinct embeddings, got 199 in all"):
        diffprune.cluster(folder, tmp_path / "c", k=200, dry_run=True)
    diffprune.cluster(folder, tmp_path / "c", k=4)
    for options in ({}, {"within": "herding", "embeddings": folder}):
        given = {"order": "balanced", "dry_run": True, **options}
        with pytest.raises(InputError, match=r"balanced: 179 samples asked for"):
            diffprune.select(tmp_path / "c", tmp_path / "kept.parquet", keep=0.9, **given)
        assert diffprune.select(tmp_path / "c", tmp_path / "kept.parquet", keep=0.05, **given)["count"] == 10
    herding = {"order": "cluster-herding", "embeddings": folder, "dry_run": True}
    assert diffprune.select(tmp_path / "c", tmp_path / "kept.parquet", keep=0.5, **herding)["count"] == 100
    dedup = {"order": "random", "dedup": 0.1, "embeddings": folder, "dry_run": True}
    assert diffprune.select(tmp_path / "c", tmp_path / "kept.parquet", **dedup)["count"] is None
    assert not (tmp_path / "kept.parquet").exists()


def test_choose_k_finds_the_clusters_and_says_so(tmp_path):
    rng = np.random.default_rng(1)
    values = 8 * np.eye(8)[rng.integers(0, 8, 200)] + rng.normal(size=(200, 8))
    folder = write_embeddings(tmp_path / "e", values, failed=(5,))
    options = ["cluster", str(folder), "--choose-k", "2,4,...,32", "--sample", "160", "--json"]
    dry = json.loads(CliRunner().invoke(app, [*options, "-o", str(tmp_path / "dry"), "--dry-run"]).stdout)
    assert dry["ks"] == [2, 4, 8, 16, 32] and dry["sample"] == 160 and not (tmp_path / "dry").exists()
    result = CliRunner().invoke(app, [*options, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["k"], found["sure"]) == (8, "sure")
    page = (tmp_path / "out" / cluster_count.PAGE).read_text()
    assert "<strong>8 clusters</strong>: sure." in page and page.count("<svg") == 3
    assert 'src="http' not in page and 'href="http' not in page
    written = json.loads((tmp_path / "out" / cluster_count.VALUES).read_text())
    assert [t["k"] for t in written["trials"]] == dry["ks"]
    CliRunner().invoke(app, [*options, "-o", str(tmp_path / "again")])
    for name in (cluster_count.PAGE, cluster_count.VALUES):
        same = (tmp_path / "again" / name).read_text().replace("again", "out")
        assert same == (tmp_path / "out" / name).read_text()
    with pytest.raises(InputError, match="64 clusters need a sample of at least 256 embeddings, got 199; try fewer"):
        diffprune.choose_k(folder, tmp_path / "c", ks=[8, 16, 64])
    with pytest.raises(InputError, match="at least 3 numbers"):
        diffprune.choose_k(folder, tmp_path / "c", ks=[8, 16])
    with pytest.raises(InputError, match="expected a seed of 0 or more, got -1"):
        diffprune.choose_k(folder, tmp_path / "c", ks=[2, 4, 8], seed=-1)
    with pytest.raises(InputError, match=r"choose_k\.json: expected a folder, found a file"):
        diffprune.choose_k(folder, tmp_path / "out" / cluster_count.VALUES, ks=[2, 4, 8], dry_run=True)
    neither = CliRunner().invoke(app, ["cluster", str(folder), "-o", str(tmp_path / "c")])
    assert neither.exit_code == 2 and "expected one of -k, --choose-k and --like" in neither.stderr
