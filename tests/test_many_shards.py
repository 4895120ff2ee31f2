"""More shards than a process may have files open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import diffprune
from diffprune.tables import read_folder


@pytest.fixture(scope="module")
def embeddings(small_run, tmp_path_factory):
    """120 shards of an image each."""
    root = tmp_path_factory.mktemp("many")
    diffprune.pack(small_run.images, root / "shards", shard_size=1)
    diffprune.embed(root / "shards", root / "embeddings", model=f"vqvae:{small_run.vqvae}")
    return root / "embeddings"


@contextmanager
def few_open_files(more: int = 60) -> Iterator[None]:
    """So many more than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rows_of_many_shards_are_read_without_holding_their_files(embeddings, tmp_path):
    with few_open_files():
        diffprune.cluster(embeddings, tmp_path / "clusters", k=4)
        diffprune.cluster(embeddings, tmp_path / "streamed", k=4, memory=2000)
        diffprune.cluster(embeddings, tmp_path / "like", like=tmp_path / "clusters")
        options = {"order": "equal", "within": "herding", "keep": 0.5}
        report = diffprune.select(tmp_path / "clusters", tmp_path / "kept.parquet", embeddings=embeddings, **options)
        assert report["count"] == 60
        found = diffprune.KMeans(4).fit(sorted(embeddings.glob("*.npy")))
    for name in ("streamed", "like"):
        assert read_folder(tmp_path / name)["cluster"] == read_folder(tmp_path / "clusters")["cluster"]
    assert len(found.assignment_) == 120


def test_copies_of_remote_rows_are_not_held_open_either(embeddings, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("DIFFPRUNE_SPOOL", str(tmp_path / "spool"))
    storage = fsspec.filesystem("memory")
    for path in embeddings.iterdir():
        storage.pipe_file(f"/many/{path.name}", path.read_bytes())
    try:
        with few_open_files():
            diffprune.cluster("memory://many", tmp_path / "clusters", k=4)
    finally:
        storage.rm("/many", recursive=True)


def test_rows_in_fortran_order_are_read_too(tmp_path):
    rows = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    np.save(tmp_path / "c.npy", rows)
    np.save(tmp_path / "f.npy", np.asfortranarray(rows))
    one, other = (diffprune.KMeans(3).fit([tmp_path / name]) for name in ("c.npy", "f.npy"))
    assert np.array_equal(one.assignment_, other.assignment_)
