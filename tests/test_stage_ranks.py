"""Stages under torchrun: two and three processes write the bytes that one does, and k-means is the same to the bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_run import contents

import diffprune
from diffprune.kmeans import KMeans
from diffprune.shards import index_shard

SCORE = {"methods": ["loss", "grand", "moso", "monotonicity"], "draws": 2, "normalise_t": True, "trials": 2}
SCORE |= {"device": "cpu", "batch_size": 16}
CLUSTER = {"k": 9, "levels": [3], "tol": 0.0}


def torchrun(processes: int, requests: list[dict], folder: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    path = folder / "requests.json"
    path.write_text(json.dumps(requests))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [sys.executable, *command, str(root / "tests" / "stage_ranks_worker.py"), str(path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def blobs() -> dict[str, np.ndarray]:
    """Points on which rounds, restarts and starts have something to do."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(500, 6)).astype(np.float32)
    normal[::7] = -0.0
    few = np.repeat(rng.normal(size=(8, 3)).astype(np.float16), 30, axis=0)  # 8 distinct points
    rng.shuffle(few)
    return {"normal": normal, "few": few}


def damaged(shards: Path, out: Path) -> None:
    """The last of the shards, which the last process indexes."""
    shutil.copytree(shards, out)
    last = sorted(out.glob("*.tar"))[-1]
    last.write_bytes(b"x" + last.read_bytes()[1:])


def with_a_key_twice(shards: Path, out: Path) -> None:
    """The first key of the first shard also in the last."""
    shutil.copytree(shards, out)
    first, *_, last = sorted(out.glob("*.tar"))
    sample = index_shard(first).samples[0]
    last.write_bytes(first.read_bytes()[: sample.offset + sample.size] + last.read_bytes())


@pytest.fixture(scope="module")
def alone(small_run, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    diffprune.score(small_run.latents, small_run.surrogate, root / "scores", **SCORE)
    diffprune.cluster(small_run.embeddings, root / "clusters", **CLUSTER)
    return root


@pytest.mark.parametrize("processes", [2, 3])
def test_the_bytes_are_those_of_one_process(small_run, alone, tmp_path, processes):
    for name, points in blobs().items():
        np.save(tmp_path / f"{name}.npy", points)
    bounds = {"2": [123], "3": [0, 240]}  # a process may have no points at all
    fits = [
        ("normal", {"k": 20, "init": "k-means||", "seed": 1}),
        ("normal", {"k": 7, "init": "k-means++", "metric": "euclidean", "n_init": 2, "tol": 0.0}),
        ("normal", {"k": 40, "init": "random", "algorithm": "yinyang"}),
        ("few", {"k": 8, "init": "random", "tol": 0.0}),  # empty clusters, which restart at the farthest points
        ("few", {"k": 5, "init": "k-means||", "metric": "cosine"}),
    ]
    requests = [
        {
            "stage": "kmeans",
            "points": str(tmp_path / f"{name}.npy"),
            "bounds": bounds,
            "options": options,
            "answer": str(tmp_path / f"fit-{number}"),
        }
        for number, (name, options) in enumerate(fits)
    ]
    for stage, arguments, options in (
        ("score", [small_run.latents, small_run.surrogate, tmp_path / "scores"], SCORE),
        ("cluster", [small_run.embeddings, tmp_path / "clusters"], CLUSTER),
        ("cluster", [small_run.embeddings, tmp_path / "split"], {"k": 3, "init": "split"}),
        ("encode", [small_run.shards, small_run.vqvae, tmp_path / "latents"], {"workers": 2}),
        ("encode", [small_run.shards, small_run.vqvae, tmp_path / "latents"], {}),
    ):
        answer = str(tmp_path / f"answer-{len(requests)}")
        requests.append({"stage": stage, "arguments": list(map(str, arguments)), "options": options, "answer": answer})
    for name, spoil in (("damaged", damaged), ("twice", with_a_key_twice)):
        spoil(small_run.shards, tmp_path / name)
        arguments = [str(tmp_path / name), str(small_run.vqvae), str(tmp_path / f"{name}-latents")]
        answer = str(tmp_path / f"answer-{name}")
        requests.append({"stage": "encode", "arguments": arguments, "options": {}, "answer": answer})
    torchrun(processes, requests, tmp_path)

    for rank in range(
        processes
    ):  # gloo's threads would outlive the interpreter, and crash, did anything hold the group
        before, after = json.loads((tmp_path / f"requests.json-threads-{rank}.json").read_text())
        assert after < before
    for number, (name, options) in enumerate(fits):
        expected = KMeans(**options).fit(blobs()[name])
        for rank in range(processes):
            found = json.loads((tmp_path / f"fit-{number}-{rank}.json").read_text())
            assert found["centroids"] == expected.centroids_.tobytes().hex(), options
            assert found["assignment"] == expected.assignment_.tolist(), options
            assert found["distance"] == expected.distance_.tobytes().hex(), options
            assert found["about"] == [expected.inertia_, expected.n_iter_, expected.moved_], options
    for name in ("scores", "clusters"):
        assert contents(tmp_path / name) == contents(alone / name)
    assert contents(tmp_path / "latents") == contents(small_run.latents)
    answers = [
        [json.loads((tmp_path / f"answer-{n}-{rank}.json").read_text()) for n in range(5, 10)]
        for rank in range(processes)
    ]
    assert all(answer == answers[0] for answer in answers)
    score, cluster, split, workers, encode = answers[0]
    assert (score["samples"], cluster["samples"], encode["samples"]) == (120, 120, 120)
    told = [
        [json.loads((tmp_path / f"answer-{name}-{rank}.json").read_text())["error"] for rank in range(processes)]
        for name in ("damaged", "twice")
    ]
    assert "at byte 0: a tar header whose checksum is wrong" in told[0][-1]
    assert set(told[0][:-1]) == {"another process of this run has stopped; its message says why"}
    assert "stands in it twice; keys must be unique over all shards" in told[1][0]
    assert not (tmp_path / "damaged-latents").exists() and not (tmp_path / "twice-latents").exists()
    assert "under torchrun it takes no" in split["error"] and "torchrun's processes are the workers" in workers["error"]
