"""A full disk is told in one line that names the file and what to do, whatever library was writing."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

import diffprune
from diffprune import arrays, tensor_files
from diffprune.arrays import write_array
from diffprune.cli.app import app
from diffprune.errors import DiskFullError
from diffprune.files import write_json
from diffprune.tables import read_folder, write_table
from diffprune.tensor_files import save_tensors


@pytest.fixture
def safetensors_find_it_full(monkeypatch):
    """As safetensors, written in Rust, says it."""

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)


def test_safetensors(tmp_path, safetensors_find_it_full):
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.safetensors'") as error:
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("out", "name"), [("-", "standard output"), ("/dev/full", "/dev/full")])
def test_a_pipe_that_takes_no_more(small_run, tmp_path, out, name):
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="loss", keep=0.5)
    command = [sys.executable, "-m", "diffprune", "export", str(tmp_path / "kept.parquet"), "--format", "keys"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, "-o", out], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and ended.stderr == f"error: [Errno 28] No space left on device: {name!r}\n"


def test_clusters(small_run, tmp_path, safetensors_find_it_full):
    with pytest.raises(
        DiskFullError, match=r"clusters: no space left on the disk .*rounds.*0 of 3 shards are finished"
    ):
        diffprune.cluster(small_run.embeddings, tmp_path / "clusters", k=4)
    # the rounds found room, the centroids do not
    with pytest.raises(DiskFullError, match=r"like: no space left on the disk .*centroids\.safetensors"):
        diffprune.cluster(small_run.embeddings, tmp_path / "like", like=small_run.clusters)


def test_clusters_come_once_there_is_room(small_run, tmp_path, monkeypatch, safetensors_find_it_full):
    with pytest.raises(DiskFullError):
        diffprune.cluster(small_run.embeddings, tmp_path / "clusters", k=6)
    monkeypatch.undo()
    diffprune.cluster(small_run.embeddings, tmp_path / "clusters", k=6)
    assert read_folder(tmp_path / "clusters").equals(read_folder(small_run.clusters))


@pytest.fixture
def arrays_find_it_full(monkeypatch):
    @contextmanager
    def device(path: Path) -> Iterator[Path]:
        yield Path("/dev/full")  # which open() leaves as it is

    monkeypatch.setattr(arrays, "atomic_path", device)


def test_arrays(small_run, tmp_path, arrays_find_it_full):
    with pytest.raises(OSError, match="No space left") as error:
        write_array(tmp_path / "x.npy", np.zeros((100, 500)))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(
        DiskFullError, match=r"latents: no space left on the disk .*0 of 3 shards are finished and kept"
    ):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_array(path, np.zeros((100, 500))),
        lambda path: save_tensors(path, {"a": torch.zeros(100, 500)}),
        lambda path: write_json(path, "x" * 50_000),
        lambda path: write_table(path, pa.table({"a": np.random.default_rng(0).random(10_000)}), {}),
    ],
    ids=["array", "tensors", "json", "table"],
)
def test_files_half_of_which_find_room(tmp_path, write):
    """By the limit of a file's size, which a process may set for itself: the system's number of the error is kept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(OSError) as error:
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not list(tmp_path.iterdir())
    assert error.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("array", [np.ones((3, 2)), np.ones((2, 3)).T, np.ones((4, 2, 3))[:, 1], np.zeros((0, 5))])
def test_arrays_are_as_numpy_writes_them(tmp_path, array):
    digest = write_array(tmp_path / "ours.npy", array)
    with open(tmp_path / "theirs.npy", "wb") as file:
        np.save(file, np.ascontiguousarray(array.astype(np.float16)))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert digest == arrays.array_digest(np.load(tmp_path / "ours.npy")) and len(digest) == 32


VERBS = [
    "pack {images} {out}/packed",
    "select {scores} --by loss --keep 0.5 -o {out}/kept.parquet",
    "prune {kept} {shards} -o {out}/pruned",
    "export {kept} --format keys -o {out}/keys.txt",
    "sample {surrogate} --vqvae {vqvae} --count 4 --steps 2 -o {out}/samples",
    "evaluate {embeddings} --reference {embeddings} -o {out}/metrics.json",
    "report {out}/report.html --scores {scores}",
]


@pytest.mark.parametrize("line", VERBS, ids=lambda line: line.split()[0])
def test_verbs_name_the_file(small_run, tmp_path, monkeypatch, line):
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="loss", keep=0.5)
    names = ("images", "shards", "vqvae", "surrogate", "scores", "embeddings")
    places = {name: getattr(small_run, name) for name in names} | {"kept": tmp_path / "kept.parquet"}
    out = tmp_path / "out"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() says it, without a name

    monkeypatch.setattr(os, "fsync", full)
    result = CliRunner().invoke(app, line.format(**places, out=out).split())
    message = " ".join(result.output.split())
    assert result.exit_code == 1 and re.search(r"[Nn]o space left on (the|device)", message), message
    assert str(out) in message.split("error:")[1], message
