"""Latents that are too many for memory are read from their files by rows, for the same run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from memory_growth import STATUS, numbers_of

import diffprune
from diffprune import training_latents
from diffprune.arrays import TWIN_SUFFIX, ArrayFolder, sha256_rows, write_array
from diffprune.config import load_config
from diffprune.dit_objective import DitObjective
from diffprune.errors import InputError
from diffprune.ranks import Ranks
from diffprune.row_files import RowFile
from diffprune.shards import index_shard
from diffprune.tables import read_table, table_metadata, write_table
from diffprune.training_latents import StoredLatents, sha256_of_training

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=1", "train.batch_size=8", "train.device=cpu"]


def config(*overrides: str):
    return load_config(
        None, "dit", [*DIT, "train.steps=6", "train.checkpoint_every=3", "train.log_every=1", *overrides]
    )


def left(run: Path) -> tuple[list, dict[str, bytes]]:
    """The losses, and the bytes of the last checkpoint."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    return losses, {path.name: path.read_bytes() for path in (run / "step_00000006").iterdir()}


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(training_latents, "free_bytes", lambda: 0)


@pytest.fixture(scope="module")
def latents(small_run, tmp_path_factory) -> Path:
    """With twins, and samples that failed: their rows are NaN."""
    root = tmp_path_factory.mktemp("latents")
    shards = Path(shutil.copytree(small_run.shards, root / "shards"))
    for shard in sorted(shards.glob("*.tar"))[:2]:
        sample = index_shard(shard).samples[4]
        data = bytearray(shard.read_bytes())
        image = sample.images()[0]
        data[image.data_offset : image.data_offset + image.size] = bytes(image.size)
        shard.write_bytes(data)
    diffprune.encode(shards, small_run.vqvae, root / "latents", flip_twins=True)
    return root / "latents"


@pytest.fixture(scope="module")
def kept(latents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "kept.parquet"
    table = ArrayFolder(latents).load()[0].select(["key", "shard", "offset", "size"])
    pq.write_table(table.take(list(range(1, 118, 5))), path)
    return path


@pytest.mark.parametrize("overrides", [[], ["train.flip=true"], ["train.batch_size=40"]])
@pytest.mark.parametrize("selected", [False, True])
def test_rows_read_from_files_train_as_those_in_memory(latents, kept, tmp_path, monkeypatch, overrides, selected):
    options = {"kept": kept} if selected else {"oversample_balanced": "label"}
    held = diffprune.train_dit(config(*overrides), latents, tmp_path / "held", **options)
    half = config(*overrides, "train.steps=3")
    diffprune.train_dit(half, latents, tmp_path / "held-first", **options)
    with monkeypatch.context() as patch:
        patch.setattr(training_latents, "free_bytes", lambda: 0)
        stored = diffprune.train_dit(config(*overrides), latents, tmp_path / "stored", **options)
        diffprune.train_dit(half, latents, tmp_path / "stored-first", **options)
        diffprune.train_dit(config(*overrides), latents, tmp_path / "held-first", **options)
    diffprune.train_dit(config(*overrides), latents, tmp_path / "stored-first", **options)
    size = (24 if selected else 118) * 2 * 4 * 4 * 2 * (2 if "train.flip=true" in overrides else 1)
    assert (held["latents"], held["latents_bytes"]) == ("in memory", size)
    assert (stored["latents"], stored["latents_bytes"]) == ("in files", size)
    losses, checkpoint = left(tmp_path / "held")
    assert len(losses) == 6 and {"model.safetensors", "optimizer.safetensors", "state.json"} <= checkpoint.keys()
    for run in ("stored", "held-first", "stored-first"):
        assert left(tmp_path / run) == (losses, checkpoint)


def test_the_data_are_told_apart_as_they_were_in_memory(latents, tmp_path, no_room):
    """So that a run of an older version goes on."""
    report = diffprune.train_dit(config("train.flip=true"), latents, tmp_path / "run")
    state = json.loads((Path(report["checkpoint"]) / "state.json").read_text())
    folder = ArrayFolder(latents)
    table, values = folder.load()
    labels = np.array(table["label"].to_pylist())
    assert state["data"]["sha256"] == sha256_rows(table["key"].to_pylist(), values, labels, folder.load_twins())


def test_a_dry_run_says_where_the_latents_will_be(latents, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert diffprune.train_dit(config(), latents, run, dry_run=True)["latents"] == "in memory"
    # An eighth of what is free, for the copies of all of this machine's processes.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, where in ((118 * 64 * 16, "in memory"), (118 * 64 * 16 - 1, "in files")):
        monkeypatch.setattr(training_latents, "free_bytes", lambda free=free: free)
        assert diffprune.train_dit(config(), latents, run, dry_run=True)["latents"] == where
    assert not run.exists()


def test_rows_of_any_order_are_those_of_the_files(latents, monkeypatch):
    folder = ArrayFolder(latents)
    table, use = folder.used()
    use = pa.chunked_array([pa.array(np.random.default_rng(0).random(len(use)) < 0.5)]), use
    monkeypatch.setattr(training_latents, "_BLOCK_BYTES", 7 * 64)
    for mask in (pa.chunked_array([pa.array(use[0].to_numpy() & use[1].to_numpy())]), use[1]):
        for twins, read in ((False, folder.array), (True, folder.twins)):
            expected = np.concatenate([read(stem) for stem in folder.stems])[mask.to_numpy()]
            stored = StoredLatents(folder, table, mask, (2, 4, 4), twins=twins)
            assert stored.shape == expected.shape and stored.nbytes == expected.nbytes
            assert stored.held().tobytes() == expected.tobytes()
            rows = torch.randint(len(expected), (300,))  # some of them twice
            assert stored[rows].numpy().tobytes() == expected[rows.numpy()].tobytes()
            assert stored[rows[:0]].shape == (0, 2, 4, 4)
    nothing = StoredLatents(folder, table, pa.chunked_array([pa.array(np.zeros(len(table), bool))]), (2, 4, 4))
    assert len(nothing) == 0 and nothing.held().shape == (0, 2, 4, 4)


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_one_file(tmp_path, order):
    array = np.random.default_rng(0).random((20, 3, 2)).astype(np.float16)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    rows = np.array([0, 1, 2, 7, 7, 9, 18, 19])
    assert np.array_equal(RowFile(tmp_path / "a.npy").take(rows), array[rows])
    assert RowFile(tmp_path / "a.npy").take(rows[:0]).shape == (0, 3, 2)


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (Path.unlink, r"cannot be read any more \(No such file or directory\); it was there before"),
        (
            lambda path: os.truncate(path, path.stat().st_size - 64),
            "was changed while it was in use: expected .* bytes",
        ),
        (lambda path: write_array(path, np.load(path)[::-1]), "was changed while it was in use: expected .* bytes"),
    ],
)
def test_a_file_that_changes_while_it_is_trained_on_is_named(
    latents, tmp_path, no_room, monkeypatch, twins, spoil, told
):
    folder = Path(shutil.copytree(latents, tmp_path / "latents"))
    path = sorted(folder.glob(f"*-000001{TWIN_SUFFIX if twins else '.npy'}"))[0]
    real = DitObjective.rows

    def rows(self, step, train):
        if step == 4:
            spoil(path)
        return real(self, step, train)

    monkeypatch.setattr(DitObjective, "rows", rows)
    with pytest.raises(InputError, match=f"{path}: {told}"):
        diffprune.train_dit(config("train.flip=true", "train.steps=40"), folder, tmp_path / "run")
    assert (tmp_path / "run" / "step_00000003").is_dir()  # and stands


@pytest.mark.parametrize("free", [0, 1 << 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_told_before_the_first_step(latents, tmp_path, monkeypatch, free, value):
    monkeypatch.setattr(training_latents, "free_bytes", lambda: free)
    folder = Path(shutil.copytree(latents, tmp_path / "latents"))
    table, path = ArrayFolder(folder).table(ArrayFolder(folder).stems[1]), sorted(folder.glob("*-000001.npy"))[0]
    array = np.load(path)
    array[[7, 20], 1, 2, 3] = value
    write_array(path, array)
    key = table["key"][7].as_py()
    with pytest.raises(InputError, match=f"latents: 2 rows are NaN or infinite, key '{key}' first; make them again"):
        diffprune.train_dit(config(), folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TwoRanks(Ranks):
    """This process and one that answers as it is told."""

    def gathered_objects(self, value):
        self.__dict__["own"] = value
        return [self.__dict__["other"], value]


def two_ranks(other) -> TwoRanks:
    ranks = TwoRanks(1, 2)
    ranks.__dict__["other"] = other
    return ranks


def test_one_process_of_a_machine_reads_all_rows_and_machines_have_to_agree(latents, monkeypatch):
    folder = ArrayFolder(latents)
    table, use = folder.used()
    keys, stored = table.filter(use)["key"].to_pylist(), StoredLatents(folder, table, use, (2, 4, 4))
    digest = sha256_rows(keys, folder.load()[1])
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of a second machine
    assert sha256_of_training(keys, stored, ranks=two_ranks(digest)) == digest
    with pytest.raises(InputError, match="see 2 different sets of latents; give all machines the same"):
        sha256_of_training(keys, stored, ranks=two_ranks("another"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(StoredLatents, "blocks", None)
    assert sha256_of_training(keys, stored, ranks=two_ranks(digest)) == digest
    with pytest.raises(InputError, match="3 rows are NaN"):  # which the first one of this machine found
        sha256_of_training(keys, stored, ranks=two_ranks(InputError("3 rows are NaN")))


MEMORY = """
import sys
import diffprune
from memory_growth import growth
from diffprune import training_latents
from diffprune.config import load_config

training_latents.free_bytes = lambda: 0
overrides = ["model.in_channels=4", "model.input_size=32", "model.patch_size=8", "model.hidden_size=16"]
overrides += ["model.depth=1", "train.batch_size=64", "train.steps=20", "train.device=cpu", "train.flip=true"]
config = load_config(None, "dit", overrides)

diffprune.train_dit(config, sys.argv[1], sys.argv[3] + "/a")  # what libraries need once
with growth("RssAnon", "RssFile") as grown:
    report = diffprune.train_dit(config, sys.argv[2], sys.argv[3] + "/b")
assert report["latents"] == "in files"
print(report["latents_bytes"], *grown)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_latents(small_run, tmp_path):
    folder = ArrayFolder(small_run.latents)
    path = small_run.latents / f"{folder.stems[0]}.parquet"
    base, rows = folder.table(folder.stems[0]).take([0] * 1000), np.zeros((1000, 4, 32, 32), np.float16)
    rows += np.random.default_rng(0).random((1000, 1, 1, 1)).astype(np.float16)

    def made(name: str, shards: int) -> Path:
        out = tmp_path / name
        stems = [f"{name}-{number:06d}" for number in range(shards)]
        stage = json.loads((small_run.latents / "stage.json").read_text())
        out.mkdir()
        for stem in stems:
            keys = pa.array([f"{stem}/{row}" for row in range(1000)], base.schema.field("key").type)
            write_table(out / f"{stem}.parquet", base.set_column(0, "key", keys), table_metadata(read_table(path)))
            for suffix in (".npy", TWIN_SUFFIX):
                if stem == stems[0]:
                    write_array(out / f"{stem}{suffix}", rows)
                else:
                    os.link(out / f"{stems[0]}{suffix}", out / f"{stem}{suffix}")
        text = json.dumps({**stage, "shards": stems}).replace("[2, 4, 4]", "[4, 32, 32]")
        (out / "stage.json").write_text(text)
        return out

    few, many = made("few", 2), made("many", 20)
    size, more = numbers_of(MEMORY, [few, many, tmp_path / "runs"])
    assert size == 2 * 20_000 * 8192 and more < 100 << 20, f"{more / 2**20:.0f} MiB"
