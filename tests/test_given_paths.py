"""Any ``os.PathLike`` will do where a path is taken, and one of them is not several."""

from __future__ import annotations

import numpy as np

import diffprune
from diffprune.embedding_folders import EmbeddingFolders


class Given:
    """What other libraries' paths have in common."""

    def __init__(self, path: object) -> None:
        self.path = str(path)

    def __fspath__(self) -> str:
        return self.path


def test_folders_of_tables(small_run, tmp_path):
    kept = tmp_path / "kept.parquet"
    diffprune.select(Given(small_run.scores), Given(kept), by="grand", prune=0.5)
    diffprune.select(small_run.scores, tmp_path / "expected.parquet", by="grand", prune=0.5)
    assert kept.read_bytes() == (tmp_path / "expected.parquet").read_bytes()
    assert diffprune.report(tmp_path / "page.html", scores=Given(small_run.scores), dry_run=True)["sections"]


def test_embeddings(small_run):
    assert EmbeddingFolders(Given(small_run.embeddings)).stems == EmbeddingFolders(small_run.embeddings).stems


def test_latents_of_shards(small_run):
    live = diffprune.LiveLatents(Given(small_run.shards), Given(small_run.vqvae))
    assert live.folder == str(small_run.shards)


def test_points_of_k_means(tmp_path):
    points = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    expected = diffprune.KMeans(4).fit([points]).inertia_
    assert diffprune.KMeans(4).fit(Given(tmp_path / "points.npy")).inertia_ == expected
    assert diffprune.KMeans(4).fit([Given(tmp_path / "points.npy")]).inertia_ == expected


def test_a_grid_of_generated_images(small_run, tmp_path):
    diffprune.sample(small_run.surrogate, small_run.vqvae, None, count=4, steps=2, grid=Given(tmp_path / "grid.png"))
    diffprune.report(tmp_path / "page.html", samples={"a": Given(tmp_path / "grid.png")})
    assert "data:image/png" in (tmp_path / "page.html").read_text()
