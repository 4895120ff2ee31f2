"""A small real run that several test files look at: 120 MNIST digits through every stage, made once per session."""

from __future__ import annotations

import os

import pytest
from small_run import DIT_OVERRIDES, VQVAE_OVERRIDES, SmallRun, write_digits

from diffprune.environment import prepare

# Before torch is imported, here and in subprocesses: the tests' tensors are small, and OpenMP threads that wait for
# each other on a busy machine cost twenty times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare()  # as the command line does


@pytest.fixture(autouse=True)
def progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's --json switches it off for the process, that is for all tests after its own."""
    monkeypatch.setattr("diffprune.progress._enabled", True)


@pytest.fixture(autouse=True)
def cache_is_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not that of whoever runs the tests."""
    monkeypatch.setenv("DIFFPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Stages up to scores and clusters, through the public functions. Tests must not write into it."""
    import diffprune
    from diffprune.config import load_config

    run = SmallRun(tmp_path_factory.mktemp("small"))
    write_digits(run.images, count=120)
    diffprune.pack(run.images, run.shards, shard_size=50)
    diffprune.train_vqvae(load_config(None, "vqvae", VQVAE_OVERRIDES), run.shards, run.vqvae)
    diffprune.encode(run.shards, run.vqvae, run.latents)
    diffprune.embed(run.shards, run.embeddings, model=f"vqvae:{run.vqvae}")
    diffprune.train_dit(load_config(None, "dit", DIT_OVERRIDES), run.latents, run.surrogate)
    methods = ("loss", "el2n", "grand", "moso", "monotonicity", "random")
    diffprune.score(run.latents, run.surrogate, run.scores, methods=methods)
    diffprune.cluster(run.embeddings, run.clusters, k=6)
    return run
