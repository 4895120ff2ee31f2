"""The pipeline over S3: the same bytes as from local disk, few requests, and whatever goes wrong on the way."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("s3fs")
from s3_server import Faults, Object, S3Server, serve
from small_run import DIT_OVERRIDES
from small_run import contents as local_contents
from test_packing import encoded, write_parquet
from test_training_ranks import dit, torchrun

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.config import load_config
from diffprune.decode import read_batches
from diffprune.errors import InputError, RemoteError, ResumeError
from diffprune.files import atomic_dir, atomic_file
from diffprune.learner import Learner, Stopped
from diffprune.ranks import Ranks
from diffprune.shards import ShardReader, find_shards, index_each, index_shard, index_shards, list_shards
from diffprune.sources import open_source
from diffprune.storage import as_path, clients, folders, reading, retries, writing
from diffprune.storage.s3 import S3Client
from diffprune.tables import read_folder, read_table
from diffprune.training_images import training_images

METHODS = ("loss", "el2n", "grand", "moso", "monotonicity", "random")


@pytest.fixture(scope="module")
def server():
    with serve() as server:
        yield server
    clients.forget_clients()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """The server, emptied, told to clients by the environment; short waits between tries; own cache and copies."""
    server.reset()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIFFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFPRUNE_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(retries, "RETRIES", retries.Retries(attempts=12, first=0.002, most=0.02))
    folders.forget_spool_folder()
    yield server
    folders.forget_spool_folder()
    left = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    shutil.rmtree(tmp_path / "spool", ignore_errors=True)
    assert all(path.name == "lock" or path.stem.isdigit() for path in left), "a temporary file was left"


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def upload(server: S3Server, folder: Path, name: str) -> str:
    """Put a folder's files into the bucket; its URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            server.objects[f"bucket/{name}/{path.relative_to(folder)}"] = Object(path.read_bytes())
    return f"s3://bucket/{name}"


def contents(server: S3Server, name: str) -> dict[str, bytes]:
    prefix = f"bucket/{name}/"
    return {key.removeprefix(prefix): one.data for key, one in server.objects.items() if key.startswith(prefix)}


def write_tar(path: Path, count: int, size: int, begin: str = "k") -> bytes:
    noise = np.random.default_rng(0).bytes(size)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for extension, data in (("bin", noise), ("cls", b"7"), ("json", b"{}")):
                info = tarfile.TarInfo(f"{begin}{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


# --- the header index ------------------------------------------------------------------------------------------


def test_the_index_is_that_of_the_local_file_and_is_kept(s3, small_run):
    url = upload(s3, small_run.shards, "shards")
    local, remote = index_shards(small_run.shards), index_shards(url)
    assert [index.samples for index in remote] == [index.samples for index in local]
    assert [(index.path.name, index.size, index.damage) for index in remote] == [
        (index.path.name, index.size, []) for index in local
    ]
    gets, heads = s3.count("GET", ".tar"), s3.count("HEAD", ".tar")
    assert index_shards(url) == remote
    assert s3.count("GET", ".tar") == gets and s3.count("HEAD", ".tar") == heads + 3  # which say that it is the same


def test_indexing_shards_in_storage_is_shown_and_of_local_ones_is_not(s3, small_run, capsys):
    index_shards(small_run.shards)
    assert not capsys.readouterr().err
    index_shards(upload(s3, small_run.shards, "shards"))
    assert re.fullmatch(r"index: 3/3 shards .*\n", capsys.readouterr().err)


def test_a_shards_size_and_version_are_asked_for_once(s3, small_run, tmp_path):
    few, shard = upload(s3, small_run.shards, "few"), s3.objects["bucket/few/images-000000.tar"]
    for number in range(10):
        s3.objects[f"bucket/many/{number}.tar"] = Object(shard.data)
    index_shards(few)
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="grand", keep=0.1)

    def asked(work) -> tuple[int, int]:
        """Requests for a shard, and for listings, where the header index is known."""
        before = len(s3.requests)
        work()
        new = [path for method, path, _ in s3.requests[before:] if method == "HEAD" or "list-type" in path]
        return sum(".tar" in path for path in new), sum("list-type" in path for path in new)

    assert asked(lambda: index_shards(few)) == (3, 1)
    assert asked(lambda: list(index_each(find_shards(f"{few}/images-{{000000..000002}}.tar")))) == (3, 0)
    assert asked(lambda: list(index_each(find_shards("s3://bucket/many/{0..9}.tar")))) == (0, 1)
    assert asked(lambda: diffprune.verify(few, dry_run=True)) == (3, 1)
    assert asked(lambda: diffprune.encode(few, small_run.vqvae, "s3://bucket/l", dry_run=True))[0] == 3
    assert asked(lambda: diffprune.prune(tmp_path / "kept.parquet", few, tmp_path / "pruned", dry_run=True)) == (3, 1)


def test_a_damaged_cache_file_is_made_again(s3, small_run, tmp_path):
    url = upload(s3, small_run.shards, "shards")
    expected = [index.samples for index in index_shards(url)]
    files = sorted((tmp_path / "cache" / "index").rglob("*.parquet"))
    assert len(files) == len(expected) == 3
    whole = [file.read_bytes() for file in files]
    rng = np.random.default_rng(1)
    for trial in range(15):
        for file, data in zip(files, whole, strict=True):
            broken = bytearray(data)
            at = int(rng.integers(len(data)))
            if trial % 3 == 0:
                broken = broken[:at]
            else:
                broken[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(broken)
        assert [index.samples for index in index_shards(url)] == expected
    files[0].write_bytes(whole[1])  # another shard's
    files[1].write_bytes(b"")
    assert [index.samples for index in index_shards(url)] == expected
    assert [file.read_bytes() for file in files[:2]] == whole[:2]


def test_a_new_version_has_an_index_of_its_own(s3, tmp_path):
    s3.objects["bucket/a.tar"] = Object(write_tar(tmp_path / "a.tar", 3, 10, "a"))
    assert [s.key for s in index_shard("s3://bucket/a.tar").samples] == ["a0", "a1", "a2"]
    s3.objects["bucket/a.tar"] = Object(write_tar(tmp_path / "a.tar", 3, 10, "b"))
    assert [s.key for s in index_shard("s3://bucket/a.tar").samples] == ["b0", "b1", "b2"]


def test_damage_is_told_and_kept_as_of_a_local_file(s3, tmp_path):
    data = write_tar(tmp_path / "a.tar", 4, 3000)
    (tmp_path / "a.tar").write_bytes(data[:9000])
    s3.objects["bucket/a.tar"] = Object(data[:9000])
    local = index_shard(tmp_path / "a.tar")
    for _ in range(2):
        remote = index_shard("s3://bucket/a.tar")
        assert (remote.samples, remote.damage, remote.ignored) == (local.samples, local.damage, local.ignored)
    assert local.damage
    s3.objects["bucket/empty.tar"] = Object(b"")
    assert index_shard("s3://bucket/empty.tar").damage[0].message == "the file is empty; expected a tar"


def test_an_index_that_cannot_be_kept_is_no_failure(s3, tmp_path, monkeypatch):
    s3.objects["bucket/a.tar"] = Object(write_tar(tmp_path / "a.tar", 3, 10))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DIFFPRUNE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set DIFFPRUNE_CACHE"):
        assert len(index_shard("s3://bucket/a.tar").samples) == 3


def test_of_large_members_only_the_headers_are_read(s3, tmp_path):
    data = write_tar(tmp_path / "a.tar", 5, 2 << 20)
    s3.objects["bucket/a.tar"] = Object(data)
    assert index_shard("s3://bucket/a.tar").samples == index_shard(tmp_path / "a.tar").samples
    # the start, and for each sample what follows its large member
    assert s3.count("GET") <= 8 and s3.sent < len(data) / 10


def test_of_small_members_every_byte_is_read_once_in_large_pieces(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1 << 20)
    data = write_tar(tmp_path / "a.tar", 400, 10_000)
    s3.objects["bucket/a.tar"] = Object(data)
    assert index_shard("s3://bucket/a.tar").samples == index_shard(tmp_path / "a.tar").samples
    assert s3.sent == len(data)
    assert s3.count("GET") <= 2 + len(data) / (1 << 20) + 1


def test_members_of_every_size_give_the_local_index(s3, tmp_path):
    rng = np.random.default_rng(2)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(60):
            size = int(
                rng.choice([0, 1, 511, 5000, 70_000, 1 << 20, (1 << 20) + 600, 3 << 20], p=[0.15] * 6 + [0.05] * 2)
            )
            info = tarfile.TarInfo(f"{'long/' * (40 * (i % 7 == 0))}k{i}.bin")
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    s3.objects["bucket/a.tar"] = Object((tmp_path / "a.tar").read_bytes())
    local, remote = index_shard(tmp_path / "a.tar"), index_shard("s3://bucket/a.tar")
    assert remote.samples == local.samples and len(local.samples) == 60 and not remote.damage


# --- reading ---------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_local_file_in_few_requests(s3, small_run):
    url = upload(s3, small_run.shards, "shards")
    for local, remote in zip(index_shards(small_run.shards), index_shards(url), strict=True):
        before = s3.count("GET")
        options = {"size": 16, "channels": 1, "batch_size": 7, "threads": 3}
        ours, theirs = list(read_batches(remote, **options)), list(read_batches(local, **options))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.images, other.images)
            assert (one.samples, one.labels, one.uids, one.errors) == (
                other.samples,
                other.labels,
                other.uids,
                other.errors,
            )
        assert s3.count("GET") - before == 1


def test_where_few_samples_are_wanted_few_bytes_are_read(s3, tmp_path):
    data = write_tar(tmp_path / "a.tar", 40, 400_000)
    s3.objects["bucket/a.tar"] = Object(data)
    index = index_shard("s3://bucket/a.tar")
    before = s3.sent
    with ShardReader(index.path, index.size, index.version) as reader:
        found = dict(reader.samples([index.samples[3], index.samples[4], index.samples[30]]))
    assert {sample.key: len(members["bin"]) for sample, members in found.items()} == dict.fromkeys(
        ("k3", "k4", "k30"), 400_000
    )
    assert s3.sent - before < 1_300_000


def test_reads_in_any_order_and_by_many_threads_are_right(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 64 << 10)
    data = np.random.default_rng(3).bytes(3_000_000)
    s3.objects["bucket/x.bin"] = Object(data)
    rng = np.random.default_rng(4)
    starts = rng.integers(0, len(data), 300)
    spans = [(int(start), min(len(data), int(start + rng.integers(1, 9_000)))) for start in starts]
    with (
        reading.RemoteFile(as_path("s3://bucket/x.bin")) as file,
        reading.ReadAhead(file, spans[:200]) as ahead,  # some are asked for unplanned
    ):
        got = clients.in_threads(lambda span: ahead.read_at(span[0], span[1] - span[0]), spans)
    assert got == [data[start:stop] for start, stop in spans]


def test_plans_join_what_is_close_and_cut_what_is_long():
    assert reading.plan_blocks([(0, 5), (10, 12), (5, 5)], gap=5, block=100) == [(0, 5), (10, 12)]
    assert reading.plan_blocks([(10, 12), (0, 5)], gap=6, block=100) == [(0, 12)]
    assert reading.plan_blocks([(0, 25), (3, 4)], gap=1, block=10) == [(0, 10), (10, 20), (20, 25)]
    assert reading.plan_blocks([]) == []


# --- stages ----------------------------------------------------------------------------------------------------


def test_encode_and_embed_give_the_local_bytes(s3, small_run):
    shards = upload(s3, small_run.shards, "shards")
    diffprune.encode(f"{shards}/*.tar", small_run.vqvae, "s3://bucket/latents")
    assert contents(s3, "latents") == local_contents(small_run.latents)
    diffprune.embed(shards, "s3://bucket/embeddings", model=f"vqvae:{small_run.vqvae}")
    assert contents(s3, "embeddings") == local_contents(small_run.embeddings)
    puts = s3.count("PUT")
    counts = diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    assert counts["shards_done_before"] == 3 and s3.count("PUT") == puts
    with pytest.raises(ResumeError, match="s3://bucket/latents: holds a run of `encode` with another config"):
        diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents", max_pixels=10**7)


def test_score_gives_the_local_bytes_and_keeps_partial_results_here(s3, small_run, tmp_path):
    latents = upload(s3, small_run.latents, "latents")
    diffprune.score(latents, small_run.surrogate, "s3://bucket/scores", methods=METHODS)
    assert contents(s3, "scores") == local_contents(small_run.scores)
    assert not list((tmp_path / "cache" / "partials").rglob("*.*"))
    live = diffprune.LiveLatents(upload(s3, small_run.shards, "shards"), small_run.vqvae)
    diffprune.score(live, small_run.surrogate, tmp_path / "live", methods="loss")
    diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "local", methods="loss")
    assert local_contents(tmp_path / "live") == local_contents(tmp_path / "local")


@pytest.mark.parametrize("room", ["0", "1GB"])
def test_cluster_and_select_give_the_local_bytes(s3, small_run, tmp_path, monkeypatch, room):
    monkeypatch.setenv("DIFFPRUNE_SPOOL_BYTES", room)
    embeddings = upload(s3, small_run.embeddings, "embeddings")
    diffprune.cluster(embeddings, "s3://bucket/clusters", k=6)
    assert contents(s3, "clusters") == local_contents(small_run.clusters)
    diffprune.cluster(embeddings, tmp_path / "streamed", k=6, memory=2000)  # a few rows at a time
    diffprune.cluster(small_run.embeddings, tmp_path / "expected", k=6, memory=2000)
    assert local_contents(tmp_path / "streamed") == local_contents(tmp_path / "expected")
    scores = upload(s3, small_run.scores, "scores")
    options = {"order": "equal", "within": "herding", "prune": 0.5}
    diffprune.select(["s3://bucket/clusters", scores], "s3://bucket/kept.parquet", embeddings=embeddings, **options)
    diffprune.select(
        [small_run.clusters, small_run.scores], tmp_path / "kept", embeddings=small_run.embeddings, **options
    )
    assert s3.objects["bucket/kept.parquet"].data == (tmp_path / "kept").read_bytes()
    diffprune.export("s3://bucket/kept.parquet", "s3://bucket/keys.txt", format="keys")
    diffprune.export(tmp_path / "kept", tmp_path / "keys.txt", format="keys")
    assert s3.objects["bucket/keys.txt"].data == (tmp_path / "keys.txt").read_bytes()


def test_prune_gives_the_local_bytes_from_and_to_anywhere(s3, small_run, tmp_path):
    shards = upload(s3, small_run.shards, "shards")
    kept = tmp_path / "kept.parquet"
    diffprune.select(small_run.scores, kept, by="grand", prune=0.6)
    s3.objects["bucket/kept.parquet"] = Object(kept.read_bytes())
    diffprune.prune(kept, small_run.shards, tmp_path / "expected", shard_size=17)
    expected = {name: data for name, data in local_contents(tmp_path / "expected").items() if name != "prune.json"}
    assert len(expected) == 4  # three shards and classes.json
    diffprune.prune("s3://bucket/kept.parquet", shards, "s3://bucket/a", shard_size=17)
    diffprune.prune(kept, shards, tmp_path / "b", shard_size=17)
    report = diffprune.prune(kept, small_run.shards, "s3://bucket/c", shard_size=17)
    for found in (contents(s3, "a"), local_contents(tmp_path / "b"), contents(s3, "c")):
        assert {name: data for name, data in found.items() if name != "prune.json"} == expected
    assert report["pattern"].startswith("s3://bucket/c/") and len(list_shards(report["pattern"])) == 3
    puts = s3.count("PUT", ".tar")
    assert diffprune.prune(kept, small_run.shards, "s3://bucket/c", shard_size=17)["present"] == 3
    assert s3.count("PUT", ".tar") == puts
    with pytest.raises(ResumeError, match="begun with other settings"):
        diffprune.prune(kept, small_run.shards, "s3://bucket/c", shard_size=18)
    for format in ("wids", "timm"):
        out = {"wids": "index.json", "timm": "_info.json"}[format]
        diffprune.export(kept, f"s3://bucket/c/{out}", format=format, shards="s3://bucket/c")
        diffprune.export(kept, tmp_path / "expected" / out, format=format, shards=tmp_path / "expected")
        assert s3.objects[f"bucket/c/{out}"].data == (tmp_path / "expected" / out).read_bytes()


def test_verify_and_pack_take_urls(s3, small_run, tmp_path):
    diffprune.pack(small_run.images, "s3://bucket/packed", shard_size=50)
    assert contents(s3, "packed") == local_contents(small_run.shards)
    local, remote = (diffprune.verify(where, decode=True) for where in (small_run.shards, "s3://bucket/packed"))
    assert remote == local and remote["samples"] == 120
    broken = bytearray(s3.objects["bucket/packed/images-000001.tar"].data)
    broken[700] ^= 1
    s3.objects["bucket/packed/images-000001.tar"] = Object(bytes(broken[:-1500]))
    assert diffprune.verify("s3://bucket/packed")["damage"][0]["shard"] == "s3://bucket/packed/images-000001.tar"


def test_the_command_line_takes_urls(s3, small_run):
    from typer.testing import CliRunner

    from diffprune.cli.app import app

    upload(s3, small_run.scores, "scores")
    arguments = ["select", "s3://bucket/scores", "--by", "grand", "--prune", "0.5", "-o", "s3://bucket/kept.parquet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "s3://bucket/kept.parquet" in result.output, result.output
    upload(s3, small_run.shards, "shards")
    arguments = ["prune", "s3://bucket/kept.parquet", "s3://bucket/shards", "-o", "s3://bucket/pruned"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert not Path("s3:").exists() and "bucket/pruned/prune.json" in s3.objects
    s3.faults.expired = True
    result = CliRunner().invoke(app, ["verify", "s3://bucket/pruned"])
    assert result.exit_code == 1 and "credentials have expired" in result.output


def test_checkpoints_are_read_from_storage(s3, small_run, tmp_path):
    vqvae, surrogate = upload(s3, small_run.vqvae, "vqvae"), upload(s3, small_run.surrogate, "surrogate")
    diffprune.encode(small_run.shards, vqvae, tmp_path / "latents")
    assert arrays(tmp_path / "latents") == arrays(small_run.latents)
    diffprune.embed(small_run.shards, tmp_path / "embeddings", model=f"vqvae:{vqvae}")
    assert arrays(tmp_path / "embeddings") == arrays(small_run.embeddings)
    began = s3.count("GET", ".safetensors")
    diffprune.score(small_run.latents, surrogate, tmp_path / "scores", methods=METHODS)
    assert read_folder(tmp_path / "scores").equals(read_folder(small_run.scores))
    last = sorted(small_run.surrogate.glob("step_*"))[-1]
    weights = s3.count("GET", "ema.safetensors") + s3.count("GET", "model.safetensors") - began
    assert weights <= len(list(small_run.surrogate.glob("step_*"))), "each checkpoint is copied here once"
    config = load_config(None, "dit", [*DIT_OVERRIDES, "train.steps=2"])
    for name, start in (("local", last), ("remote", f"{surrogate}/{last.name}")):
        diffprune.train_dit(config, small_run.latents, tmp_path / name, start_from=start)
    [weights] = {(tmp_path / name / "step_00000002" / "model.safetensors").read_bytes() for name in ("local", "remote")}
    assert weights


def test_a_checkpoint_in_storage_that_is_none_is_named(s3, small_run, tmp_path):
    surrogate = upload(s3, small_run.surrogate, "surrogate")
    [*_, state] = sorted(name for name in s3.objects if name.endswith("state.json"))
    weights = state.replace("state.json", "ema.safetensors")
    whole = s3.objects[weights].data
    for damaged, told in ((whole[:-1] + b"x", "damaged: expected sha256"), (None, "no such file, although state.json")):
        if damaged is None:
            del s3.objects[weights]
        else:
            s3.objects[weights] = Object(damaged)
        with pytest.raises(InputError, match=rf"s3://{weights}: {told}"):
            diffprune.score(small_run.latents, surrogate, tmp_path / "x", weights="ema")
    for url in ("s3://bucket/nothing", "s3://bucket"):
        with pytest.raises(InputError, match=rf"{url}: no .*; expected a run folder"):
            diffprune.score(small_run.latents, url, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("spool", ["1GB", "0"])
def test_latents_in_storage_train_by_rows_as_local_ones_do(s3, small_run, tmp_path, monkeypatch, spool):
    monkeypatch.setenv("DIFFPRUNE_SPOOL_BYTES", spool)  # from local copies, or by ranges
    latents, config = upload(s3, small_run.latents, "latents"), load_config(None, "dit", DIT_OVERRIDES)
    reports = [diffprune.train_dit(config, small_run.latents, tmp_path / "local")]
    reports.append(diffprune.train_dit(config, latents, tmp_path / "held"))
    monkeypatch.setattr("diffprune.training_latents.free_bytes", lambda: 0)
    reports.append(diffprune.train_dit(config, latents, tmp_path / "rows"))
    assert [report["latents"] for report in reports] == ["in memory", "in memory", "in files"]
    assert bool(list((tmp_path / "spool").rglob("*.npy"))) == (spool != "0")
    for name in ("model.safetensors", "state.json"):
        files = [Path(report["checkpoint"]) / name for report in reports]
        assert len({file.read_bytes() for file in files}) == 1


def test_a_run_in_storage_has_the_local_bytes_and_goes_on_there(s3, small_run, tmp_path):
    steps = ["train.steps=6", "train.checkpoint_every=2", "train.log_every=1", "train.sample_every=2"]
    config = load_config(None, "dit", [*DIT_OVERRIDES, *steps])
    options = {"decode_with": small_run.vqvae}
    diffprune.train_dit(config, small_run.latents, tmp_path / "run", **options)
    url = "s3://bucket/run"
    first = load_config(None, "dit", [*DIT_OVERRIDES, *steps, "train.steps=4"])
    report = diffprune.train_dit(first, small_run.latents, url, **options)
    assert report["checkpoint"] == f"{url}/step_00000004"
    # a kill while the next checkpoint goes up: weights, but no state.json
    s3.objects["bucket/run/step_00000006/model.safetensors"] = Object(b"half")
    assert diffprune.train_dit(config, small_run.latents, url, dry_run=True, **options)["first_step"] == 4
    report = diffprune.train_dit(config, small_run.latents, url, **options)
    assert report["first_step"] == 4
    found, expected = contents(s3, "run"), local_contents(tmp_path / "run")
    assert found.keys() == expected.keys()
    different = {name for name in found if found[name] != expected[name]}
    timed = {"log.jsonl"}  # images per second
    states = {f"step_{step:08d}/state.json" for step in (2, 4)}  # of a run of so many steps
    assert different <= timed | states
    assert [json.loads(line)["step"] for line in found["log.jsonl"].splitlines()] == list(range(1, 7))
    [losses, again] = ([json.loads(line)["loss"] for line in of["log.jsonl"].splitlines()] for of in (found, expected))
    assert losses == again
    other = load_config(None, "dit", [*DIT_OVERRIDES, *steps, "train.seed=9"])
    with pytest.raises(ResumeError, match=f"{url}/step_00000006: of another run"):
        diffprune.train_dit(other, small_run.latents, url, **options)
    assert not list((tmp_path / "spool").rglob("model.safetensors"))


def test_a_run_killed_between_objects_goes_on(s3, small_run, tmp_path):
    """Storage fails for good at the n-th object that is written; the same command then ends as if it had not."""
    config = load_config(None, "dit", [*DIT_OVERRIDES, "train.steps=4", "train.checkpoint_every=2"])
    diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    expected = local_contents(tmp_path / "run")
    puts = s3.count("PUT")
    diffprune.train_dit(config, small_run.latents, "s3://bucket/whole")
    puts = s3.count("PUT") - puts
    assert puts > 2 * 4, "the files of two checkpoints, and more"
    put = S3Client.put_bytes
    for stop in range(puts):
        count, url = iter(range(1000)), f"s3://bucket/run{stop}"

        def failing(self, path, data, stop=stop, count=count):
            if next(count) == stop:
                raise RemoteError(f"{path}: gone", "failed")
            put(self, path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(S3Client, "put_bytes", failing)
            with pytest.raises(RemoteError):
                diffprune.train_dit(config, small_run.latents, url)
        diffprune.train_dit(config, small_run.latents, url)
        found = contents(s3, f"run{stop}")
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} <= {"log.jsonl"}


def test_a_report_shows_logs_and_pictures_from_storage(s3, small_run, tmp_path):
    run = upload(s3, small_run.surrogate, "run")
    pages = []
    for name, folder in (("local", small_run.surrogate), ("remote", run)):
        told = {"logs": {"a": f"{folder}/log.jsonl"}, "samples": {"b": f"{folder}/loss.png"}}
        diffprune.report(tmp_path / f"{name}.html", scores=[small_run.scores], **told)
        pages.append((tmp_path / f"{name}.html").read_text().replace(str(folder), "RUN"))
    assert pages[0] == pages[1] and "data:image/png" in pages[0]
    with pytest.raises(InputError, match=r"s3://bucket/run/none.jsonl: not a readable log"):
        diffprune.report(tmp_path / "x.html", scores=[small_run.scores], logs={"a": f"{run}/none.jsonl"})


def test_a_run_in_storage_that_stops_itself_keeps_its_log(s3, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "step", exploding_at(4, Learner.step))
    steps = ["train.steps=9", "train.checkpoint_every=3", "train.log_every=1"]
    with pytest.raises(Stopped):
        diffprune.train_dit(load_config(None, "dit", [*DIT_OVERRIDES, *steps]), small_run.latents, "s3://bucket/run")
    found = contents(s3, "run")
    assert len(found["log.jsonl"].splitlines()) == 4
    assert json.loads(found["stopped.json"])["last_checkpoint"] == "s3://bucket/run/step_00000003"


def test_two_processes_train_into_storage(s3, small_run, tmp_path):
    url, every = "s3://bucket/run", ("train.checkpoint_every=2", "train.log_every=1")
    requests = [
        dit(small_run, out, f"train.steps={steps}", *every, reports=str(tmp_path / "reports"))
        for out, steps in ((tmp_path / "run", 4), (url, 2), (url, 4))
    ]
    torchrun(tmp_path / "requests", 2, *requests)
    found, expected = contents(s3, "run"), local_contents(tmp_path / "run")
    assert found.keys() == expected.keys()
    different = {name for name in found if found[name] != expected[name]}
    assert different <= {"log.jsonl", "step_00000002/state.json"}  # of images per second; of a run of 2 steps


def exploding_at(stop, step):
    def one(self, draw):
        if draw.step == stop:
            raise Stopped("loss", {"step": draw.step})
        return step(self, draw)

    return one


def test_a_checkpoint_that_is_written_again_is_not_there_in_between(s3, monkeypatch):
    url = as_path("s3://bucket/run/step_00000001")
    for text in ("first", "second"):
        with atomic_dir(url, last="state.json") as folder:
            for name in ("state.json", "model.safetensors"):  # the last one is not the last that is made
                (folder / name).write_text(text)
        assert contents(s3, "run/step_00000001") == {
            name: text.encode() for name in ("state.json", "model.safetensors")
        }
    order = [(method, path.partition("?")[0].rpartition("/")[2]) for method, path, _ in s3.requests if method != "HEAD"]
    again = [("PUT", "model.safetensors"), ("PUT", "state.json")]
    assert order == [*again, ("DELETE", "state.json"), *again]


def test_other_programs_weights_in_storage(s3, small_run, tmp_path):
    [last] = list(small_run.surrogate.glob("step_*"))[-1:]
    s3.objects["bucket/dit.safetensors"] = Object((last / "ema.safetensors").read_bytes())
    config = load_config(None, "dit", [*DIT_OVERRIDES, "train.steps=1"])
    options = {"start_from": "s3://bucket/dit.safetensors"}
    diffprune.train_dit(config, small_run.latents, tmp_path / "run", **options)
    s3.objects["bucket/dit.safetensors"] = Object(b"junk")
    with pytest.raises(InputError, match=r"s3://bucket/dit.safetensors: not a readable safetensors file"):
        diffprune.train_dit(config, small_run.latents, tmp_path / "other", **options)
    with pytest.raises(InputError, match=r"s3://bucket/none.pt: no such file"):
        diffprune.train_dit(config, small_run.latents, tmp_path / "other", start_from="s3://bucket/none.pt")
    for url in ("s3://bucket/kl-f8.ckpt@512", "s3://bucket/dit.safetensors"):
        with pytest.raises(InputError, match=f"{url.partition('@')[0]}.* cannot be a URL yet"):
            diffprune.encode(small_run.shards, url, tmp_path / "latents")


def test_pack_writes_the_same_shards_from_parquet_in_storage(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1 << 10)  # read by ranges, not whole
    images = [encoded("png", i) for i in range(13)]
    for part, rows in enumerate((slice(0, 8), slice(8, 13))):
        name = f"train-0000{part}-of-00002.parquet"
        write_parquet(tmp_path / "in" / name, images[rows], [i % 3 for i in range(13)][rows], ["a", "b", "c"])
    url = upload(s3, tmp_path / "in", "in")
    s3.objects["bucket/in/readme.txt"] = Object(b"no parquet")
    diffprune.pack(tmp_path / "in", tmp_path / "local", shard_size=5)
    expected = local_contents(tmp_path / "local")
    plan = json.loads(expected.pop("pack.json"))["plan"]
    for number, source in enumerate((url, f"{url}/train-*.parquet")):
        result = diffprune.pack(source, f"s3://bucket/out{number}", shard_size=5, workers=1 + number)
        assert (result["kind"], result["count"], result["source"]) == ("parquet", 13, source)
        found = contents(s3, f"out{number}")
        assert json.loads(found.pop("pack.json"))["plan"] == plan | {"source": open_source(source).identity}
        assert found == expected
    assert diffprune.pack(url, "s3://bucket/out0", shard_size=5)["present"] == 3

    s3.anonymous = True
    name = "train-00000-of-00002.parquet"
    diffprune.pack(tmp_path / "in" / name, tmp_path / "one")
    web = f"{s3.environment['AWS_ENDPOINT_URL']}/bucket/in/{name}"
    result = diffprune.pack(f"{web}?X-Signature=secret", tmp_path / "web")
    assert result["source"] == f"{web}?…" and "secret" not in (tmp_path / "web/pack.json").read_text()
    shard = Path(result["shards"][0]).name
    assert (tmp_path / "web" / shard).read_bytes() == (tmp_path / "one" / shard).read_bytes()


def test_what_signs_a_url_is_neither_told_nor_kept(s3, small_run, tmp_path):
    diffprune.select(small_run.scores, tmp_path / "in/kept.parquet", by="grand", prune=0.5)
    table = pq.read_table(tmp_path / "in/kept.parquet")
    pq.write_table(
        table.set_column(0, "key", pa.array([f"no-{i}" for i in range(len(table))])), tmp_path / "in/other.parquet"
    )
    (tmp_path / "in/broken").write_text("{")
    upload(s3, tmp_path / "in", "in")
    s3.anonymous = True
    kept, other, broken = (
        f"{s3.environment['AWS_ENDPOINT_URL']}/bucket/in/{name}?X-Signature=secret"
        for name in ("kept.parquet", "other.parquet", "broken")
    )
    diffprune.report(tmp_path / "page.html", scores=[small_run.scores], selections={"grand": kept})
    page = (tmp_path / "page.html").read_text()
    assert "kept.parquet?…" in page and "secret" not in page
    live = diffprune.LiveLatents(small_run.shards, small_run.vqvae)
    for call in (
        lambda: diffprune.report(tmp_path / "no.html", metrics=[broken]),
        lambda: diffprune.report(tmp_path / "no.html", scores=[small_run.scores], selections={"grand": other}),
        lambda: diffprune.select_rows({"label": [1, 2]}, count=1, quota=as_path(broken)),
        lambda: load_config(broken, "dit"),
        lambda: ArrayFolder(small_run.latents).load(other),
        lambda: live.load(other),
        lambda: training_images(small_run.shards, size=16, channels=1, kept=other, ranks=Ranks()),
        lambda: diffprune.prune(other, small_run.shards, tmp_path / "no"),
        lambda: diffprune.evaluate(small_run.embeddings, small_run.embeddings, tmp_path / "no.json", kept=other),
    ):
        with pytest.raises(InputError, match=r"(broken|other\.parquet)\?…") as error:
            call()
        assert "secret" not in str(error.value)


def test_a_config_may_lie_in_storage(s3):
    s3.objects["bucket/c.toml"] = Object(b"[train]\nsteps = 7\n")
    assert load_config("s3://bucket/c.toml", "dit").train.steps == 7
    with pytest.raises(InputError, match=r"s3://bucket/none.toml: no such config file"):
        load_config("s3://bucket/none.toml", "dit")


def test_parquet_in_storage_that_cannot_be_packed(s3, tmp_path):
    write_parquet(tmp_path / "x.parquet", [encoded("png", i) for i in range(4)], [0] * 4)
    s3.objects["bucket/x.parquet"] = Object((tmp_path / "x.parquet").read_bytes())
    source = open_source("s3://bucket/x.parquet")
    s3.objects["bucket/x.parquet"] = Object(s3.objects["bucket/x.parquet"].data + b"x")
    with pytest.raises(RemoteError, match=r"s3://bucket/x.parquet: .* it changed after it was indexed"):
        list(source.read([0]))
    for url, told in {
        "s3://bucket/x.parquet": "not a readable parquet file",
        "s3://bucket/none.parquet": "no such file",
        "s3://bucket/none*.parquet": "found none",
        "http://127.0.0.1:1/folder": "found none",
    }.items():
        with pytest.raises(InputError, match=f"^{re.escape(url)}: .*{told}"):
            diffprune.pack(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_remote_yet_says_so(s3, small_run, tmp_path):
    url = "s3://bucket/x"
    board = load_config(None, "dit", [*DIT_OVERRIDES, "train.tensorboard=true"])
    calls = [
        lambda: diffprune.train_dit(board, small_run.latents, url),
        lambda: diffprune.pack(url, tmp_path / "x"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"s3://bucket/x: .* cannot be a URL yet"):
            call()
    assert not Path("s3:").exists() and not s3.objects


# --- what goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [("error", "busy"), ("cut",), ("dropped", "lost")])
def test_with_every_third_request_failing_the_bytes_are_the_same(s3, small_run, tmp_path, faults):
    shards = upload(s3, small_run.shards, "shards")
    s3.faults.rates = dict.fromkeys(faults, 0.33 / len(faults))
    diffprune.embed(shards, "s3://bucket/embeddings", model=f"vqvae:{small_run.vqvae}")
    diffprune.cluster("s3://bucket/embeddings", "s3://bucket/clusters", k=6)
    diffprune.select("s3://bucket/clusters", "s3://bucket/kept.parquet", order="equal", prune=0.5)
    diffprune.prune("s3://bucket/kept.parquet", shards, "s3://bucket/pruned")
    assert all(s3.faults.seen[fault] > 5 for fault in faults)
    s3.faults.rates = {}
    assert contents(s3, "embeddings") == local_contents(small_run.embeddings)
    assert contents(s3, "clusters") == local_contents(small_run.clusters)
    diffprune.select(small_run.clusters, tmp_path / "kept.parquet", order="equal", prune=0.5)
    diffprune.prune(tmp_path / "kept.parquet", small_run.shards, tmp_path / "pruned")
    expected = local_contents(tmp_path / "pruned")
    found = contents(s3, "pruned")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if name.endswith(".tar"))


def test_an_answer_that_does_not_come_is_asked_for_again(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "PATIENCE", 0.3)
    s3.objects["bucket/x"] = Object(b"abc")
    with reading.RemoteFile(as_path("s3://bucket/x")) as file:
        s3.faults.rates, s3.faults.most, s3.faults.pause = {"slow": 1.0}, 1, 1.0
        assert file.read_at(1, 2) == b"bc"
    assert s3.faults.seen["slow"] == 1 and s3.count("GET") == 2


def test_a_body_of_another_length_is_never_taken(s3, monkeypatch):
    """Whatever the packages below let through."""
    s3.objects["bucket/x"] = Object(b"0123456789")
    with reading.RemoteFile(as_path("s3://bucket/x")) as file:
        bodies = [b"12", b"", b"123"]
        monkeypatch.setattr(file._client, "_range", lambda *_: bodies.pop(0))
        assert file.read_at(1, 3) == b"123" and not bodies
        bodies = [b"1234"]
        with pytest.raises(RemoteError, match="gives no ranges"):
            file.read_at(1, 3)
        monkeypatch.setattr(file._client, "_range", lambda *_: b"")
        with pytest.raises(
            RemoteError, match=r"tried 12 times, the last time: Truncated.'3 bytes asked for, 0 received'"
        ):
            file.read_at(1, 3)


def test_when_tries_run_out_the_error_says_what_was_tried_and_finished_shards_stay(s3, small_run):
    shards = upload(s3, small_run.shards, "shards")
    index_shards(shards)
    s3.faults.only, s3.faults.rates = "shards/images-000001.tar", {"error": 1.0}
    with pytest.raises(RemoteError) as error:
        diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    assert "s3://bucket/shards/images-000001.tar" in str(error.value) and "tried 12 times" in str(error.value)
    assert "the last time: 500" in str(error.value) and error.value.kind == "failed"
    s3.faults.only = "GET /bucket/shards/images-000002.tar"
    with pytest.raises(RemoteError, match=r"images-000002.tar, bytes \d+ to [\d,]+: tried 12 times"):
        diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    done = contents(s3, "latents")
    assert {"images-000000.parquet", "images-000001.npy"} <= done.keys() and "images-000002.parquet" not in done
    s3.faults.rates = {}
    diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    assert contents(s3, "latents") == local_contents(small_run.latents)
    assert s3.count("PUT", "images-000000.parquet") == 1


def test_expired_credentials_are_told_at_once_and_new_ones_go_on(s3, small_run, monkeypatch):
    from diffprune import encoding

    shards = upload(s3, small_run.shards, "shards")
    index_shards(shards)
    s3.faults.expired = True
    for call in (
        lambda: as_path(f"{shards}/images-000000.tar").stat(),  # a HEAD, whose answer has no body to say why
        lambda: list_shards(shards),
        lambda: ShardReader(f"{shards}/images-000000.tar").__enter__(),
    ):
        before = len(s3.requests)
        with pytest.raises(RemoteError, match=r"s3://bucket/shards.*: the credentials have expired .*ExpiredToken"):
            call()
        assert len(s3.requests) - before <= 3  # boto looks for another region, and the reason is asked for
    s3.faults.expired = False
    writes = encoding.write_array

    def expiring(path, array):
        s3.faults.expired = path.name == "images-000001.npy"
        return writes(path, array)

    monkeypatch.setattr(encoding, "write_array", expiring)
    with pytest.raises(RemoteError, match="the credentials have expired") as error:
        diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    monkeypatch.setattr(encoding, "write_array", writes)
    assert error.value.kind == "expired"
    s3.faults.expired = False
    assert "images-000000.parquet" in contents(s3, "latents")
    diffprune.encode(shards, small_run.vqvae, "s3://bucket/latents")
    assert contents(s3, "latents") == local_contents(small_run.latents)
    assert s3.count("PUT", "images-000000.parquet") == 1


def test_failures_are_judged_by_what_the_server_or_the_package_said():
    class HttpError(Exception):  # as gcsfs has it
        code = 503

    class ContentLengthError(type("ClientPayloadError", (Exception,), {})):  # as aiohttp has it, of a body that was cut
        code = 400

    assert retries.judge(HttpError())[0] == "passing" and retries.judge(ContentLengthError())[0] == "passing"
    for error, kind in (
        (ConnectionResetError(), "passing"),
        (TimeoutError(), "passing"),
        (FileNotFoundError(), "missing"),
        (PermissionError(), "denied"),
        (ValueError("what"), "refused"),
    ):
        assert retries.judge(error)[0] == kind
        wrapped = OSError("wrapped")
        wrapped.__cause__ = error
        assert retries.judge(wrapped)[0] == (kind if kind == "passing" else "refused")
    unavailable = FileNotFoundError()  # what fsspec makes of any failure of a HEAD over http
    unavailable.__cause__ = type("ClientResponseError", (Exception,), {"status": 500})()
    assert retries.judge(unavailable)[0] == "passing"


def test_denied_and_missing_credentials_are_not_tried_again(s3, monkeypatch):
    s3.objects["bucket/x"] = Object(b"abc")
    s3.faults.denied = True
    with pytest.raises(RemoteError, match=r"s3://bucket/x: access denied \(403 AccessDenied") as error:
        as_path("s3://bucket/x").stat()
    assert error.value.kind == "denied" and len(s3.requests) == 2
    s3.faults.denied = False
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    clients.forget_clients()
    with pytest.raises(RemoteError, match=r"NoCredentialsError.*check the credentials"):
        as_path("s3://bucket/x").stat()
    clients.forget_clients()


def test_a_shard_that_changes_or_goes_between_index_and_read(s3, small_run):
    shards = upload(s3, small_run.shards, "shards")
    [index, *_] = index_shards(shards)
    name = "bucket/shards/images-000000.tar"
    original = s3.objects[name]
    changes = {
        r"expected bytes [\d,]+, found [\d,]+ and version": Object(original.data + bytes(512)),
        r"expected version \w+, found \w+: it changed": Object(original.data[:600] + b"x" + original.data[601:]),
    }
    for told, other in changes.items():
        s3.objects[name] = other
        with pytest.raises(RemoteError, match=rf"s3://{name}: {told}") as error:
            list(read_batches(index, size=16, channels=1))
        assert error.value.kind == "changed"
    del s3.objects[name]
    with pytest.raises(RemoteError, match=f"s3://{name}: it was removed after it was indexed"):
        list(read_batches(index, size=16, channels=1))
    with pytest.raises(InputError, match="no such shard"):
        list_shards(f"s3://{name}")
    s3.objects[name] = original
    assert sum(len(batch.keys) for batch in read_batches(index, size=16, channels=1)) == 50


def test_a_shard_that_changes_while_prune_copies_it_is_noticed(s3, small_run, tmp_path, monkeypatch):
    from diffprune import pruning

    shards = upload(s3, small_run.shards, "shards")
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="grand", prune=0.5)
    copy = pruning.copy_ranges

    def changing(source, ranges, target):
        copy(source, ranges, target)
        if source.name == "images-000001.tar":
            one = s3.objects["bucket/shards/images-000001.tar"]
            s3.objects["bucket/shards/images-000001.tar"] = Object(one.data[:-1] + b"x")

    monkeypatch.setattr(pruning, "copy_ranges", changing)
    with pytest.raises(InputError, match=r"images-000001.tar: changed while it was copied"):
        diffprune.prune(tmp_path / "kept.parquet", shards, "s3://bucket/pruned", workers=1)


# --- writing ---------------------------------------------------------------------------------------------------

PART = 64 << 10


@pytest.fixture
def small_parts(monkeypatch, s3):
    monkeypatch.setattr(writing, "PART", PART)
    s3.smallest_part = PART


def test_a_large_object_goes_up_in_parts_and_appears_at_the_end(s3, small_parts):
    data = np.random.default_rng(5).bytes(5 * PART + 1)
    url = as_path("s3://bucket/large.bin")
    with atomic_file(url) as file:
        for at in range(0, len(data), 9_999):
            file.write(data[at : at + 9_999])
        assert not url.exists() and len(s3.uploads) == 1
    assert s3.objects["bucket/large.bin"].data == data and s3.objects["bucket/large.bin"].parts == 6
    assert not s3.uploads and url.read_bytes() == data


def test_parts_grow_so_that_ten_thousand_are_enough(s3, small_parts, monkeypatch):
    monkeypatch.setattr(writing, "_LARGER_AFTER", 2)
    with atomic_file(as_path("s3://bucket/large.bin")) as file:
        file.write(bytes(10 * PART))
    assert s3.objects["bucket/large.bin"].parts == 5  # of 1, 1, 2, 2 and 4 times the size
    assert len(s3.objects["bucket/large.bin"].data) == 10 * PART


def test_an_upload_that_fails_leaves_nothing(s3, small_parts):
    url = as_path("s3://bucket/large.bin")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(url) as file:
            file.write(bytes(3 * PART))
            raise error
        assert not s3.objects and not s3.uploads
    s3.faults.only, s3.faults.rates = "partNumber=2", {"error": 1.0}
    told = r"s3://bucket/large.bin, part 2 \(65,536 bytes\): tried 12 times"
    with pytest.raises(RemoteError, match=told), atomic_file(url) as file:
        file.write(bytes(9 * PART))
    assert not s3.objects and not s3.uploads


def test_where_not_even_the_parts_can_be_removed_the_error_says_so(s3, small_parts):
    s3.faults.only, s3.faults.rates = "uploadId", {"error": 1.0}
    with (
        pytest.raises(RemoteError, match=r"part 1 .*could not be removed .*: the next run removes them"),
        atomic_file(as_path("s3://bucket/large.bin")) as file,
    ):
        file.write(bytes(3 * PART))
    assert not s3.objects and len(s3.uploads) == 1
    s3.faults.rates = {}
    with atomic_file(as_path("s3://bucket/large.bin")) as file:
        file.write(bytes(3 * PART))
    assert len(s3.objects) == 1 and not s3.uploads


def test_the_upload_of_a_killed_run_is_removed_by_the_next(s3, small_parts):
    s3.uploads["old"] = ("bucket/large.bin", {1: b"x"})
    s3.uploads["others"] = ("bucket/large.bin.2", {1: b"x"})
    with atomic_file(as_path("s3://bucket/large.bin")) as file:
        file.write(bytes(3 * PART))
    assert list(s3.uploads) == ["others"] and len(s3.objects["bucket/large.bin"].data) == 3 * PART


@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_an_upload_whose_last_answer_is_lost_is_no_failure(s3, small_parts, fault):
    s3.faults.only, s3.faults.rates, s3.faults.most = "POST /bucket/large.bin?uploadId", {fault: 1.0}, 1
    with atomic_file(as_path("s3://bucket/large.bin")) as file:
        file.write(bytes(3 * PART))
    assert s3.faults.seen[fault] == 1 and len(s3.objects["bucket/large.bin"].data) == 3 * PART and not s3.uploads


def test_parts_survive_faults(s3, small_parts):
    s3.faults = Faults({"error": 0.1, "cut": 0.1, "dropped": 0.1, "lost": 0.1, "busy": 0.1})
    data = np.random.default_rng(6).bytes(40 * PART)
    with atomic_file(as_path("s3://bucket/large.bin")) as file:
        file.write(data)
    assert s3.objects["bucket/large.bin"].data == data
    assert as_path("s3://bucket/large.bin").read_bytes() == data


# --- copies, and plain web servers -----------------------------------------------------------------------------


def test_copies_are_made_once_while_there_is_room_and_those_of_killed_runs_are_removed(s3, tmp_path, monkeypatch):
    from diffprune.arrays import load_array

    arrays = {f"a{i}": np.random.default_rng(i).standard_normal((100, 5)).astype(np.float16) for i in range(3)}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        s3.objects[f"bucket/{name}.npy"] = Object(buffer.getvalue())
    abandoned = tmp_path / "spool" / "diffprune-spool-dead"
    abandoned.mkdir(parents=True)
    (abandoned / "lock").touch()
    (abandoned / "0.npy").write_bytes(b"x")
    monkeypatch.setenv("DIFFPRUNE_SPOOL_BYTES", "2500")  # two of them
    for _ in range(2):
        for name, array in arrays.items():
            found = load_array(as_path(f"s3://bucket/{name}.npy"), "make it again")
            assert np.array_equal(found, array) and isinstance(found, np.memmap) == (name != "a2")
    assert not abandoned.exists()
    reads = {name: s3.count("GET", f"{name}.npy") for name in arrays}
    assert reads["a0"] == reads["a1"] < reads["a2"]
    rows = load_array(as_path("s3://bucket/a2.npy"), "make it again", by_rows=True)
    wanted = np.array([5, 6, 7, 99, 0, 50, 50])
    assert np.array_equal(rows[wanted], arrays["a2"][wanted]) and np.array_equal(rows[-3:], arrays["a2"][-3:])
    assert np.array_equal(rows[arrays["a2"][:, 0] > 0], arrays["a2"][arrays["a2"][:, 0] > 0])
    assert len(rows[np.array([], int)]) == 0 and rows[10:3].shape == (0, 5)


@pytest.mark.parametrize("kind", ["objects", "cut", "text", "fortran", "longer"])
def test_arrays_that_are_none_are_refused(s3, kind):
    from diffprune.arrays import load_array

    buffer = io.BytesIO()
    array = np.arange(12, dtype=np.float16).reshape(4, 3)
    np.save(
        buffer,
        np.array([{}], object) if kind == "objects" else np.asfortranarray(array) if kind == "fortran" else array,
    )
    data = {"cut": buffer.getvalue()[:-1], "text": b"hello", "longer": buffer.getvalue() + b"x"}.get(
        kind, buffer.getvalue()
    )
    s3.objects["bucket/a.npy"] = Object(data)
    for by_rows in (True, False):
        with pytest.raises(InputError, match=r"s3://bucket/a.npy: not a readable .npy file .*make it again"):
            load_array(as_path("s3://bucket/a.npy"), "make it again", by_rows)


def test_a_small_table_costs_one_request(s3, small_run):
    upload(s3, small_run.scores, "scores")
    name = "images-000000.parquet"
    assert read_table(f"s3://bucket/scores/{name}", ["key"]) == read_table(small_run.scores / name, ["key"])
    assert [method for method, _, _ in s3.requests] == ["GET"]


def test_whole_objects_of_any_size_are_read(s3, monkeypatch):
    monkeypatch.setattr(reading, "SKIP", 1000)
    for size in (0, 1, 999, 1000, 1001, 5000):
        data = np.random.default_rng(size).bytes(size)
        s3.objects["bucket/x"] = Object(data)
        with reading.open_remote(as_path("s3://bucket/x")) as file:
            assert file.read() == data
        assert as_path("s3://bucket/x").read_bytes() == data
    for missing in ("s3://bucket/none", "s3://bucket"):
        with pytest.raises(FileNotFoundError):
            as_path(missing).read_bytes()
    s3.faults = Faults({"cut": 0.3, "busy": 0.2, "dropped": 0.2}, seed=3)
    assert all(as_path("s3://bucket/x").read_bytes() == data for _ in range(20))
    assert s3.faults.seen["cut"] > 2


def test_evaluate_names_urls_as_urls(s3, small_run, tmp_path):
    """Also those that the command line made paths of."""
    url = upload(s3, small_run.embeddings, "embeddings")
    context = diffprune.evaluate(Path(url), Path(url), tmp_path / "metrics.json", limit=50)["context"]
    assert (context["samples"]["path"], context["reference"]["path"], context["reference"]["split"]) == (
        url,
        url,
        "embeddings",
    )


def test_score_and_cluster_read_each_table_twice_and_each_array_once(s3, small_run, tmp_path):
    latents, embeddings = upload(s3, small_run.latents, "latents"), upload(s3, small_run.embeddings, "embeddings")

    def asked(folder, work):
        """(GETs of tables, GETs of arrays, HEADs of either) of the input, for each of the three shards."""
        s3.requests.clear()
        work()
        ours = [(method, path.partition("?")[0]) for method, path, _ in s3.requests if f"/{folder}/images" in path]
        gets = [path for method, path in ours if method == "GET"]
        heads = len(ours) - len(gets)
        return tuple(
            n / 3 for n in (*(sum(path.endswith(end) for path in gets) for end in (".parquet", ".npy")), heads)
        )

    # two: what is known before the first shard is begun, and its rows; a HEAD each for whether they are there
    score = {"methods": "loss", "batch_size": 64}
    assert asked("latents", lambda: diffprune.score(latents, small_run.surrogate, "s3://bucket/a", **score)) == (
        2,
        1,
        2,
    )
    moso = {"methods": ("moso", "loss"), "batch_size": 64}
    found = asked("latents", lambda: diffprune.score(latents, small_run.surrogate, "s3://bucket/b", **moso))
    assert found[1] == 0, "they are here already"
    assert asked("embeddings", lambda: diffprune.cluster(embeddings, "s3://bucket/c", k=6)) == (2, 2, 2)


def test_cluster_writes_tables_at_once_and_goes_on_where_it_was(s3, small_run, tmp_path, monkeypatch):
    embeddings = upload(s3, small_run.embeddings, "embeddings")
    diffprune.cluster(small_run.embeddings, tmp_path / "local", k=6)
    gate, put, asked = threading.Barrier(3, timeout=60), S3Client.put_bytes, len(s3.requests)

    def together(self, path, data):
        if path.suffix == ".parquet":
            gate.wait()  # broken unless all three tables are under way
        put(self, path, data)

    monkeypatch.setattr(S3Client, "put_bytes", together)
    diffprune.cluster(embeddings, "s3://bucket/out", k=6)
    assert contents(s3, "out") == local_contents(tmp_path / "local")
    ours = [method for method, path, _ in s3.requests[asked:] if "/out/images-000001.parquet" in path]
    # Of more than eight shards a listing says at the begin and at the end which are there; failures and sizes of
    # clusters are counted at the end.
    assert sorted(ours) == ["GET", "GET", "HEAD", "HEAD", "PUT"]

    def failing(self, path, data):
        if path.name == "images-000001.parquet":
            raise RemoteError(f"{path}: refused", "failed")
        put(self, path, data)

    monkeypatch.setattr(S3Client, "put_bytes", failing)
    with pytest.raises(RemoteError, match=r"images-000001.parquet: refused"):
        diffprune.cluster(embeddings, "s3://bucket/again", k=6)
    assert "images-000001.parquet" not in contents(s3, "again")
    monkeypatch.setattr(S3Client, "put_bytes", put)
    diffprune.cluster(embeddings, "s3://bucket/again", k=6)
    assert contents(s3, "again") == local_contents(tmp_path / "local")


def test_select_and_train_read_each_table_once(s3, small_run, tmp_path):
    scores, clusters = upload(s3, small_run.scores, "scores"), upload(s3, small_run.clusters, "clusters")
    latents = upload(s3, small_run.latents, "latents")

    def gets(work) -> set[int]:
        """How often tables are read, but the first of a folder, whose columns are looked at."""
        s3.requests.clear()
        work()
        return {s3.count("GET", path) for folder, path in tables if s3.count("GET", folder)}

    tables = [(f"/{folder}/", f"/{folder}/images-000001.parquet") for folder in ("scores", "clusters", "latents")]
    kept = tmp_path / "kept.parquet"
    options = {"order": "equal", "within": "highest:grand", "keep": 0.5}
    assert gets(lambda: diffprune.select([scores, clusters], kept, **options)) == {1}
    diffprune.select([small_run.scores, small_run.clusters], tmp_path / "local.parquet", **options)
    assert kept.read_bytes() == (tmp_path / "local.parquet").read_bytes()
    config = load_config(None, "dit", DIT_OVERRIDES)
    assert gets(lambda: diffprune.train_dit(config, latents, tmp_path / "run")) == {1}


def test_large_tables_are_read_by_columns(s3, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(reading, "BLOCK", 1 << 20)
    rng = np.random.default_rng(7)
    table = pa.table({"a": rng.standard_normal(300_000), "b": rng.standard_normal(300_000), "c": range(300_000)})
    pq.write_table(table, tmp_path / "t.parquet")
    s3.objects["bucket/t.parquet"] = Object((tmp_path / "t.parquet").read_bytes())
    assert read_table("s3://bucket/t.parquet", ["c"]).equals(table.select(["c"]))
    assert s3.sent < 0.7 * len(s3.objects["bucket/t.parquet"].data)
    assert read_table("s3://bucket/t.parquet").equals(table)
    with pytest.raises(InputError, match=r"s3://bucket/t.parquet: no column 'x'; it has a, b, c"):
        read_table("s3://bucket/t.parquet", ["x"])
    with pytest.raises(InputError, match=r"s3://bucket/u.parquet: no such table"):
        read_table("s3://bucket/u.parquet")
    s3.objects["bucket/u.parquet"] = Object(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"s3://bucket/u.parquet: not a readable parquet file"):
        read_table("s3://bucket/u.parquet")


def test_shards_of_a_web_server_are_read_by_ranges(s3, small_run):
    upload(s3, small_run.shards, "shards")
    s3.anonymous = True
    base = f"{s3.environment['AWS_ENDPOINT_URL']}/bucket/shards"
    indexes = index_shards(f"{base}/images-{{000000..000002}}.tar")
    assert [index.samples for index in indexes] == [index.samples for index in index_shards(small_run.shards)]
    assert sum(len(batch.keys) for batch in read_batches(indexes[0], size=16, channels=1)) == 50
    s3.faults.rates = {"error": 0.3, "dropped": 0.2}
    diffprune.embed(f"{base}/images-{{000000..000002}}.tar", "s3://bucket/e", model=f"vqvae:{small_run.vqvae}")
    s3.faults.rates = {}
    assert contents(s3, "e") == local_contents(small_run.embeddings)
    with pytest.raises(InputError, match=r"has no folders; name the files: .*\{0000..0127\}.tar"):
        list_shards(base)
    with pytest.raises(InputError, match="no such shard"):
        list_shards(f"{base}/images-{{000000..000003}}.tar")
    with pytest.raises(InputError, match="can only be read"):
        diffprune.encode(small_run.shards, small_run.vqvae, f"{base}/latents")


def test_a_server_without_ranges_is_refused(s3, small_run):
    handler = lambda *args: SimpleHTTPRequestHandler(*args, directory=str(small_run.shards))  # noqa: E731
    SimpleHTTPRequestHandler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/images-000000.tar"
            index = index_shard(url)  # small enough to be asked for whole
            with pytest.raises(RemoteError, match="gives no ranges"), ShardReader(url) as reader:
                reader.read(index.samples[3].members[0])
        finally:
            server.shutdown()


def test_a_forked_process_has_clients_of_its_own(s3):
    s3.objects["bucket/x"] = Object(b"abc")
    assert as_path("s3://bucket/x").read_bytes() == b"abc"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if as_path("s3://bucket/x").read_bytes() == b"abc" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_parts_of_samples(s3, small_run, tmp_path):
    run = (small_run.surrogate, small_run.vqvae)
    options = {"count": 11, "shard_size": 3, "steps": 2, "grid": tmp_path / "grid.png"}
    diffprune.sample(*run, tmp_path / "out", **options)
    grid = (tmp_path / "grid.png").read_bytes()
    for part in ("2/2", "1/2", None):
        (tmp_path / "grid.png").unlink()
        report = diffprune.sample(*run, "s3://bucket/out", part=part, **options)
        assert report["grid"] is None if part == "2/2" else (tmp_path / "grid.png").read_bytes() == grid
        (tmp_path / "grid.png").touch()
    assert (report["written"], report["present"]) == (0, 4)
    found = {name.removeprefix("bucket/out/"): stored.data for name, stored in s3.objects.items()}
    assert found == local_contents(tmp_path / "out")
    s3.objects["bucket/out/samples-000003.tar"] = Object(found["samples-000002.tar"])
    with pytest.raises(InputError, match=r"samples-000003\.tar: expected the samples .*; delete it"):
        diffprune.sample(*run, "s3://bucket/out", **options)
