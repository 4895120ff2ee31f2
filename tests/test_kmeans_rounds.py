"""A fit that is stopped goes on from its last round, to the same bytes, and does not do the rounds before again."""

from __future__ import annotations

import pytest
import torch

import diffprune
from diffprune import kmeans_rounds
from diffprune.errors import InputError
from diffprune.kmeans import KMeans
from diffprune.kmeans_lloyd import Lloyd


class Killed(BaseException):
    pass


@pytest.mark.parametrize("algorithm", ["lloyd", "yinyang"])
@pytest.mark.parametrize("stop_at", [1, 2, 7])
def test_a_fit_goes_on_to_the_same_bytes(tmp_path, monkeypatch, algorithm, stop_at):
    points = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    options = {"init": "random", "algorithm": algorithm, "tol": 0.0, "seed": 3}
    expected = KMeans(30, **options).fit(points)
    assert expected.n_iter_ > 8
    monkeypatch.setattr(kmeans_rounds, "COMMIT_EVERY", 0)
    sweeps, real = [], Lloyd._sweep

    def sweep(self, centroids):
        sweeps.append(1)
        if len(sweeps) == stop_at + 1:
            raise Killed
        real(self, centroids)

    monkeypatch.setattr(Lloyd, "_sweep", sweep)
    with pytest.raises(Killed):
        KMeans(30, **options).fit(points, rounds=tmp_path / "rounds")
    found = KMeans(30, **options).fit(points, rounds=tmp_path / "rounds")
    # Those before, the one that was killed, one for the labels of the last round, and the rest.
    assert len(sweeps) == stop_at + 1 + 1 + (expected.n_iter_ + 1 - stop_at)
    assert torch.equal(found.centroids_, expected.centroids_) and torch.equal(found.assignment_, expected.assignment_)
    assert torch.equal(found.distance_, expected.distance_)
    assert (found.inertia_, found.n_iter_, found.moved_) == (expected.inertia_, expected.n_iter_, expected.moved_)


def test_cluster_keeps_its_rounds_until_it_is_done(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans_rounds, "COMMIT_EVERY", 0)
    options, real, sweeps = {"k": 9, "tol": 0.0, "init": "random"}, Lloyd._sweep, []
    diffprune.cluster(small_run.embeddings, tmp_path / "whole", **options)

    def sweep(self, centroids):
        sweeps.append(1)
        if len(sweeps) == 3:
            raise Killed
        real(self, centroids)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Lloyd, "_sweep", sweep)
        with pytest.raises(Killed):
            diffprune.cluster(small_run.embeddings, out, **options)
    assert sorted(path.name for path in out.iterdir()) == ["_partials", "stage.json"]
    path = out / "_partials" / "rounds.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:50])
    with pytest.raises(InputError, match=r"rounds\.safetensors: not a readable round"):
        diffprune.cluster(small_run.embeddings, out, **options)
    path.write_bytes(good)
    diffprune.cluster(small_run.embeddings, out, **options)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_labels_are_made_again_from_the_centroids_of_a_run_that_was_stopped_among_its_tables(small_run, tmp_path):
    out = tmp_path / "out"
    diffprune.cluster(small_run.embeddings, out, k=9)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "images-000001.parquet").unlink()
    kept = (out / "centroids.safetensors").stat().st_mtime_ns
    diffprune.cluster(small_run.embeddings, out, k=9)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (out / "centroids.safetensors").stat().st_mtime_ns == kept
