"""Files that a user names to be written: links and pipes stay what they are, inputs and files of another kind are not
replaced."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import diffprune
from diffprune.errors import InputError
from diffprune.files import atomic_dir, atomic_path, write_json
from diffprune.outputs import HTML, KEY_LIST, PARQUET, PNG, Kind, check_output, is_stdout, is_stream
from diffprune.tables import write_table

KEYS = ["k0", "k1", "k2"]


@pytest.fixture
def kept(tmp_path) -> Path:
    table = pa.table({"key": KEYS, "shard": ["a.tar"] * 3, "offset": [0, 512, 1024], "size": [512] * 3})
    write_table(tmp_path / "kept.parquet", table, {"stage": "select"})
    return tmp_path / "kept.parquet"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path, there):
    target, link = tmp_path / "store" / "x.json", tmp_path / "link.json"
    if there:
        write_json(target, {"old": 1})
    link.symlink_to("store/x.json")
    with atomic_path(link) as temporary:
        assert temporary.parent.resolve() == target.parent, "on the target's disk, where renaming is atomic"
        temporary.write_text("new")
        assert not target.exists() or "old" in target.read_text()
    assert link.is_symlink() and target.read_text() == "new"
    assert names(tmp_path) == ["link.json", "store"] and names(target.parent) == ["x.json"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/old").touch()
    (tmp_path / "link").symlink_to("store")
    with atomic_dir(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "store") == ["new"]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="leads back to itself"), atomic_path(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a", "b"]


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(small_run, tmp_path, kept):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer need not wait
    try:
        diffprune.export(kept, fifo, format="keys")
        assert os.read(reader, 1000) == b"k0\nk1\nk2\n"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(fifo.stat().st_mode) and is_stream(fifo)
    assert names(tmp_path) == ["fifo", "kept.parquet"]
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(InputError, match="found a pipe"):
        diffprune.select(small_run.scores, tmp_path / "link", order="random", keep=0.5)
    assert is_stdout("-") and is_stdout("/dev/stdout") and not is_stdout("/dev/fd/2") and not is_stdout(fifo)


def test_a_descriptor_as_bash_gives_it_gets_the_bytes(kept):
    """``-o >(wc -l)`` is ``-o /dev/fd/63``."""
    reader, writer = os.pipe()
    try:
        diffprune.export(kept, f"/dev/fd/{writer}", format="keys")
        assert os.read(reader, 1000) == b"k0\nk1\nk2\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_standard_output_holds_the_keys_alone_and_what_was_there_before(tmp_path, kept):
    told = tmp_path / "told.txt"
    told.write_text("before\n")
    with open(told, "ab") as file:
        command = [sys.executable, "-m", "diffprune", "export", str(kept), "-f", "keys", "-o", "-"]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "count" in done.stderr and "3" in done.stderr
    assert told.read_text() == "before\nk0\nk1\nk2\n"
    assert names(tmp_path) == ["kept.parquet", "told.txt"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_result_that_finds_no_room_is_told_in_one_line(tmp_path, kept, more):
    out = tmp_path / "keys"
    command = [sys.executable, "-m", "diffprune", "export", str(kept), "-f", "keys", "-o", str(out), *more]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "error: the result could not be printed" in done.stderr
    assert "No space left" in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert out.read_text().split() == KEYS


def test_what_was_printed_comes_before_what_is_written(kept):
    code = f"import diffprune; print('first'); diffprune.export({str(kept)!r}, '-', format='keys'); print('last')"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered)
    assert done.stdout.split() == ["first", *KEYS, "last"], done.stderr


def test_a_reader_that_goes_away_is_no_error_to_read_about(tmp_path):
    many = pa.table({"key": [f"{i:0100d}" for i in range(5000)]})
    write_table(tmp_path / "kept.parquet", many, {"stage": "select"})
    command = [sys.executable, "-m", "diffprune", "export", str(tmp_path / "kept.parquet"), "-f", "keys", "-o", "-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert len(process.stdout.readline()) == 101
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and "Traceback" not in told and "error" not in told, told


# --- what may be replaced ---------------------------------------------------------------------------------------


def tar_of(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.size = len(data := b'{"metrics": 1, "splits": 2, "__kind__": 3}<!doctype html>split_parts:')
        tar.addfile(info, io.BytesIO(data))


def an_array(path: Path) -> None:
    np.save(path, np.zeros(3))


def weights(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, path)


OTHERS = {"a.tar": tar_of, "a.npy": an_array, "a.safetensors": weights, "stage.json": lambda p: p.write_text("{}")}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", [PNG, HTML, PARQUET, Kind("result", b'"metrics"')], ids=lambda kind: kind.name)
def test_a_file_of_another_kind_is_not_replaced(tmp_path, kind, name):
    OTHERS[name](tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match=f"{name}: already there and no {kind.name}"):
        check_output(tmp_path / name, kind)
    assert (tmp_path / name).read_bytes() == before


def test_a_text_replaces_texts_and_no_binary_file(tmp_path, kept):
    for name in ("a.tar", "a.npy", "a.safetensors"):
        OTHERS[name](tmp_path / name)
        with pytest.raises(InputError, match="no text"):
            diffprune.export(kept, tmp_path / name, format="keys")
    (tmp_path / "keys.txt").write_text("old\n")
    (tmp_path / "empty").touch()
    for name in ("keys.txt", "empty", "new"):
        diffprune.export(kept, tmp_path / name, format="keys")
    check_output(tmp_path / "empty", KEY_LIST)


@pytest.mark.parametrize("text", ["# Notes\n\nMine.\n", "[train]\nlr = 1\n[model]\nlr = 1\nlr = 1\n", "no end"])
def test_a_text_that_is_no_list_of_keys_is_not_replaced_by_one(tmp_path, kept, text):
    out = tmp_path / "notes.txt"
    out.write_text(text)
    with pytest.raises(InputError, match=r"notes.txt: already there and no text with a key a line of an earlier run"):
        diffprune.export(kept, out, format="keys")
    assert out.read_text() == text
    for earlier in ("", "k7\nk2\n", "k" * (16 << 20)):  # the last is more than is looked at
        out.write_text(earlier)
        diffprune.export(kept, out, format="keys")
        assert out.read_text().split() == KEYS


def test_an_input_is_not_written_to_whatever_it_is_called(tmp_path, kept, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.link(kept, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("kept.parquet")
    (tmp_path / "keys.txt").write_text("k0\n")
    before = kept.read_bytes()
    for out in ("kept.parquet", "./kept.parquet", tmp_path / "hard", "soft"):
        with pytest.raises(InputError, match=r"the same file as .*kept.parquet, which this command needs"):
            diffprune.export(kept, out, format="keys")
    assert kept.read_bytes() == before and (tmp_path / "soft").is_symlink()
    with pytest.raises(InputError, match="the same file as"):
        check_output("new.png", PNG, [None, tmp_path / "new.png"])
    check_output("new.png", PNG, [None, kept, tmp_path / "other"])


def test_no_verb_writes_over_what_it_reads(small_run, tmp_path):
    kept = tmp_path / "kept.parquet"
    diffprune.select(small_run.scores, kept, order="random", keep=0.5)
    diffprune.prune(kept, small_run.shards, tmp_path / "pruned")
    [shard, *_] = sorted((tmp_path / "pruned").glob("*.tar"))
    dit, vqvae = tmp_path / "dit", tmp_path / "vqvae"
    shutil.copytree(small_run.surrogate, dit)
    shutil.copytree(small_run.vqvae, vqvae)
    [weights, *_] = sorted(vqvae.rglob("model.safetensors"))
    manifest = tmp_path / "pruned/prune.json"
    embeddings = tmp_path / "embeddings"
    shutil.copytree(small_run.embeddings, embeddings)
    metrics = tmp_path / "metrics.json"
    diffprune.evaluate(embeddings, embeddings, metrics)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wids = {"format": "wids", "shards": tmp_path / "pruned"}
    attempts = [
        lambda: diffprune.export(kept, kept, format="keys"),
        lambda: diffprune.export(kept, shard, **wids),
        lambda: diffprune.export(kept, manifest, **wids),
        lambda: diffprune.report(kept, selections={"a": kept}),
        lambda: diffprune.report(metrics, metrics=[metrics]),
        lambda: diffprune.evaluate(embeddings, embeddings, kept, kept=kept),
        lambda: diffprune.evaluate(embeddings, embeddings, embeddings / "stage.json"),
        lambda: diffprune.sample(dit, vqvae, None, count=1, grid=weights),
        lambda: diffprune.sample(dit, vqvae, tmp_path / "s", count=1, grid=tmp_path / "s/samples-000000.tar"),
        lambda: diffprune.reconstruct(small_run.shards, vqvae, grid=weights),
        lambda: diffprune.reconstruct(small_run.shards, vqvae, out=weights),
        lambda: diffprune.reconstruct(small_run.shards, vqvae, out=tmp_path / "x", grid=tmp_path / "x"),
        lambda: diffprune.select(small_run.scores, shard, order="random", keep=0.5),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="write to another file"):
            attempt()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # and each replaces its own
    diffprune.evaluate(embeddings, embeddings, metrics, name="again")
    assert json.loads(metrics.read_text())["name"] == "again"
