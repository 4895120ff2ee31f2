"""What a stage takes for done: a shard that was replaced is noticed down the chain, and a data set may grow."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import DIT_OVERRIDES
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.cli.app import app
from diffprune.errors import InputError, ResumeError
from diffprune.passes import Passes
from diffprune.tables import read_folder, read_stage, read_table

COUNT = 7


def write_shard(path: Path, *, label: str = "3", seed: int = 0, keys: str = "", mtime: int = 0) -> None:
    """PNGs that are not compressed, so that any picture has the same size; and more than 512 bytes."""
    rng = np.random.default_rng([seed, *path.stem.encode()])
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(COUNT):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG", compress_level=0)
            for extension, data in (("png", buffer.getvalue()), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{keys or path.stem}-{i:03d}.{extension}")
                info.size, info.mtime = len(data), mtime
                tar.addfile(info, io.BytesIO(data))


def write_crawl(folder: Path, stems: Iterable[str], **how) -> Path:
    for stem in stems:
        write_shard(folder / f"{stem}.tar", **how)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    return write_crawl(tmp_path / "crawl", "abc")


@pytest.fixture
def embed(small_run, tmp_path):
    """By the small VQ-VAE, into a folder of this name."""

    def run(shards, out: str, **options) -> dict:
        return diffprune.embed(shards, tmp_path / out, model=f"vqvae:{small_run.vqvae}", **options)

    return run


@pytest.fixture
def encode(small_run, tmp_path):
    def run(shards, out: str, **options) -> dict:
        return diffprune.encode(shards, small_run.vqvae, tmp_path / out, **options)

    return run


# --- replaced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"label": "7"}, {"keys": "x"}, {"seed": 1, "mtime": 1}], ids=str)
def test_a_replaced_shard_of_the_same_size_is_refused_by_name(crawl, tmp_path, embed, change):
    embed(crawl, "emb")
    before, size = contents(tmp_path / "emb"), (crawl / "b.tar").stat().st_size
    write_shard(crawl / "b.tar", **change)
    assert (crawl / "b.tar").stat().st_size == size
    for options in ({}, {"dry_run": True}, {"part": "2/3"}, {"workers": 2}):
        with pytest.raises(ResumeError, match=r"of other shards .*: b \(now with other names, .* delete their files"):
            embed(crawl, "emb", **options)
    assert embed(crawl, "emb", part="3/3")["shards_done_before"] == 1
    assert contents(tmp_path / "emb") == before
    write_crawl(crawl, "d")
    with pytest.raises(ResumeError, match=r"of other shards"):
        embed(crawl, "emb")
    assert contents(tmp_path / "emb") == before, "nor does it say that d is to come"
    for path in [crawl / "d.tar", *(tmp_path / "emb").glob("b.*")]:
        path.unlink()
    assert embed(crawl, "emb")["shards_done_before"] == 2
    embed(crawl, "afresh")
    assert contents(tmp_path / "emb") == contents(tmp_path / "afresh")


def test_a_copy_elsewhere_is_the_same_shard(crawl, tmp_path, embed):
    embed(crawl, "emb")
    shutil.copytree(crawl, tmp_path / "copy", copy_function=shutil.copy)
    os.utime(tmp_path / "copy" / "a.tar", (1, 1))
    listed = [tmp_path / "copy" / f"{stem}.tar" for stem in "cab"]
    assert embed(listed, "emb")["shards_done_before"] == 3
    assert read_stage(tmp_path / "emb")["shards"] == list("abc")


def test_other_pictures_under_the_same_names_are_noticed_down_the_chain(crawl, tmp_path, small_run, embed, encode):
    """Of the same sizes and times: no header says so, but the arrays do."""
    methods = {"per sample": ("loss",), "of all": ("moso",)}

    def rest(embeddings: str, latents: str) -> None:
        diffprune.cluster(tmp_path / embeddings, tmp_path / "clusters", k=3)
        for name, method in methods.items():
            diffprune.score(tmp_path / latents, small_run.surrogate, tmp_path / name, methods=method)

    embed(crawl, "emb")
    encode(crawl, "latents")
    rest("emb", "latents")
    rest("emb", "latents")
    write_shard(crawl / "b.tar", seed=1)
    embed(crawl, "emb2")
    encode(crawl, "latents2")
    one, other = (ArrayFolder(tmp_path / name) for name in ("emb", "emb2"))
    assert one.fingerprint == other.fingerprint and one.identity("a") == other.identity("a")
    assert one.identity("b") != other.identity("b")
    with pytest.raises(ResumeError, match=r"depends on all of them. Different: b is now with other values\. Give"):
        diffprune.cluster(tmp_path / "emb2", tmp_path / "clusters", k=3)
    with pytest.raises(ResumeError, match=r"made of other shards than there are now: b \(now with other values\)"):
        diffprune.score(tmp_path / "latents2", small_run.surrogate, tmp_path / "per sample", methods="loss")
    with pytest.raises(ResumeError, match=r"b is now with other values"):
        diffprune.score(tmp_path / "latents2", small_run.surrogate, tmp_path / "of all", methods="moso")
    selections = [diffprune.select(tmp_path / "per sample", tmp_path / "kept.parquet", by="loss", keep=0.5)]
    (tmp_path / "per sample" / "b.parquet").unlink()
    diffprune.score(tmp_path / "latents2", small_run.surrogate, tmp_path / "per sample", methods="loss")
    diffprune.score(tmp_path / "latents2", small_run.surrogate, tmp_path / "afresh", methods="loss")
    assert contents(tmp_path / "per sample") == contents(tmp_path / "afresh")
    selections.append(diffprune.select(tmp_path / "afresh", tmp_path / "kept2.parquet", by="loss", keep=0.5))
    assert selections[0]["fingerprint"] != selections[1]["fingerprint"]


@pytest.mark.parametrize("live", [False, True])
def test_what_a_stopped_run_found_of_another_shard_is_forgotten(crawl, tmp_path, small_run, encode, monkeypatch, live):
    def source(name: str):
        if live:
            return diffprune.LiveLatents(crawl, small_run.vqvae)
        encode(crawl, name)
        return tmp_path / name

    def stop(self, *args):
        raise KeyboardInterrupt

    options = {"methods": "monotonicity"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Passes, "scores", stop)  # all findings of the checkpoints but the last are there
        diffprune.score(source("latents"), small_run.surrogate, tmp_path / "scores", **options)
    found = sorted((tmp_path / "scores" / "_partials" / "findings-0").iterdir())
    assert len(found) == 3
    before = [path.read_bytes() for path in found]
    write_shard(crawl / "b.tar", seed=1, mtime=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Passes, "scores", stop)
        diffprune.score(source("latents2"), small_run.surrogate, tmp_path / "scores", **options)
    assert [path.read_bytes() == data for path, data in zip(found, before, strict=True)] == [True, False, True]
    diffprune.score(source("latents2"), small_run.surrogate, tmp_path / "scores", **options)
    diffprune.score(source("latents2"), small_run.surrogate, tmp_path / "afresh", **options)
    assert contents(tmp_path / "scores") == contents(tmp_path / "afresh")


def test_an_array_that_is_not_the_tables_is_refused_by_name(small_run, tmp_path, embed, encode, crawl):
    """As of another run, or of a disk that lost a bit: the shape tells nothing."""
    embed(crawl, "embeddings")
    encode(crawl, "latents")
    for folder in ("embeddings", "latents"):
        path = tmp_path / folder / "b.npy"
        array = np.load(path)
        np.save(path, array[::-1])
    with pytest.raises(InputError, match=r"latents/b\.npy: not the values that b\.parquet was written with"):
        diffprune.score(tmp_path / "latents", small_run.surrogate, tmp_path / "scores")
    assert not [*(tmp_path / "scores").glob("b.*")]
    with pytest.raises(InputError, match=r"embeddings/b\.npy: not the values that b\.parquet was written with"):
        diffprune.evaluate(tmp_path / "embeddings", tmp_path / "embeddings", tmp_path / "metrics.json")


# --- grown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["embed", "encode"])
def test_new_shards_join_the_folder(tmp_path, request, stage):
    run = request.getfixturevalue(stage)
    crawl = write_crawl(tmp_path / "crawl", "bd")
    run(crawl, "out")
    write_crawl(crawl, "ac")
    assert run(crawl, "out", dry_run=True)["shards_done_before"] == 2
    assert run(crawl, "out")["shards_done_before"] == 2
    run(crawl, "at once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    assert read_stage(tmp_path / "out")["shards"] == list("abcd")
    (crawl / "b.tar").unlink()  # what is done stays
    assert run(crawl, "out")["shards"] == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    more = write_crawl(tmp_path / "more", "0z")
    assert run([more / "z.tar", more / "0.tar"], "out")["shards_done_before"] == 0
    assert ArrayFolder(tmp_path / "out").stems == list("abcdz0")
    assert read_folder(tmp_path / "out").num_rows == 6 * COUNT


def test_parts_of_a_grown_data_set(crawl, tmp_path, embed):
    embed(crawl, "emb")
    write_crawl(crawl, "de")
    for part in ("3/3", "1/3", "2/3"):
        embed(crawl, "emb", part=part)
    embed(crawl, "at once")
    assert contents(tmp_path / "emb") == contents(tmp_path / "at once")


def test_a_shard_that_was_never_done_and_is_gone_is_not_missed(crawl, tmp_path, embed):
    embed(crawl, "emb")
    for path in [crawl / "b.tar", *(tmp_path / "emb").glob("b.*")]:
        path.unlink()
    with pytest.raises(InputError, match="b is not"):
        read_folder(tmp_path / "emb")
    embed(crawl / "a.tar", "emb", part="1/1")  # of a part the others may be at it
    assert read_stage(tmp_path / "emb")["shards"] == list("abc")
    embed(crawl, "emb")
    embed(crawl, "at once")
    assert contents(tmp_path / "emb") == contents(tmp_path / "at once")


def test_what_depends_on_all_samples_does_not_grow(crawl, tmp_path, small_run, embed, encode, monkeypatch):
    def cluster(**options):
        return diffprune.cluster(tmp_path / "emb", tmp_path / "clusters", k=3, **options)

    def score(method: str, **options):
        out = tmp_path / "-".join([method, *options])
        return diffprune.score(tmp_path / "latents", small_run.surrogate, out, methods=method, **options)

    each = [("loss", {}), ("el2n", {}), ("grand", {}), ("monotonicity", {}), ("random", {})]
    together = [("moso", {}), ("moso", {"one_pass": True}), ("loss", {"normalise_t": True})]
    embed(crawl, "emb")
    encode(crawl, "latents")
    cluster()
    for method, options in each + together:
        score(method, **options)
    write_crawl(crawl, "d")
    embed(crawl, "emb")
    encode(crawl, "latents")
    for dry_run in (True, False):
        with pytest.raises(ResumeError, match=r"`cluster` over other shards, .* Different: d is new\. Give"):
            cluster(dry_run=dry_run)
    for method, options in together:
        with pytest.raises(ResumeError, match=r"`score` over other shards, .* Different: d is new"):
            score(method, **options)
    visited: list[str] = []
    visit = Passes._visit
    monkeypatch.setattr(
        Passes, "_visit", lambda self, n, samples, *rest: visited.append(n) or visit(self, n, samples, *rest)
    )
    for method, _ in each:
        assert score(method)["shards_done_before"] == 3
        table = read_folder(tmp_path / method)
        assert table.num_rows == 4 * COUNT and not table[method].null_count
    assert sorted(visited) == [0, 0, 0, 0, 1, 2], "the new shard, and at each checkpoint for monotonicity alone"


def test_folders_of_before_are_refused_as_another_config(crawl, tmp_path, embed):
    embed(crawl, "emb")
    path = tmp_path / "emb" / "stage.json"
    stage = json.loads(path.read_text())
    path.write_text(
        json.dumps({**stage, "fingerprint": "0" * 16, "config": {**stage["config"], "inputs": {"a.tar": 5}}})
    )
    with pytest.raises(ResumeError, match=r"emb: made by a version of diffprune whose tables did not say"):
        embed(crawl, "emb")


# --- several folders, and options given twice ------------------------------------------------------------------


def test_a_selection_works_on_several_folders_of_embeddings(crawl, tmp_path, small_run, embed):
    more = write_crawl(tmp_path / "more", "d")
    embed(crawl, "old")
    embed(more, "new")
    embed([crawl, more], "all")
    folders = [tmp_path / "old", tmp_path / "new"]
    diffprune.cluster(folders, tmp_path / "clusters", k=3)
    options = {"order": "k-center", "count": 9}
    one = diffprune.select(tmp_path / "clusters", tmp_path / "1.parquet", embeddings=tmp_path / "all", **options)
    two = diffprune.select(tmp_path / "clusters", tmp_path / "2.parquet", embeddings=folders, **options)
    assert read_table(tmp_path / "1.parquet").equals(read_table(tmp_path / "2.parquet"))
    assert one["fingerprint"] != two["fingerprint"]
    given = [argument for folder in folders for argument in ("--embeddings", str(folder))]
    arguments = ["select", str(tmp_path / "clusters"), "--order", "k-center", "--count", "9"]
    result = CliRunner().invoke(app, [*arguments, *given, "-o", str(tmp_path / "3.parquet")])
    assert result.exit_code == 0, result.output
    assert read_table(tmp_path / "3.parquet").equals(read_table(tmp_path / "2.parquet"))
    with pytest.raises(InputError, match="'a' is in two of the folders"):
        diffprune.select(tmp_path / "clusters", tmp_path / "4.parquet", embeddings=[*folders, folders[0]], **options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "a", "--reference", "b", "--same-seed", "c", "--same-seed", "c", "-o", "d"],
        ["evaluate", "a", "--reference", "b", "--kept", "b", "--kept", "c", "-o", "d"],
        ["train", "dit", "a", "--vqvae", "b", "--vqvae", "c", "-o", "d"],
        ["embed", "a", "--model", "b", "-o", "d", "--out", "d"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_an_option_of_one_value_is_given_once(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "given 2 times, it takes one value" in " ".join(result.output.split())
    assert "is required" not in result.output


def test_shards_in_several_places_are_scored_and_trained_on(crawl, tmp_path, small_run, encode):
    more = write_crawl(tmp_path / "more", "d")
    encode([crawl, more], "latents")
    scored = ["--checkpoint", str(small_run.surrogate), "--method", "loss"]
    trained = [f"--set={override}" for override in DIT_OVERRIDES]
    live = [str(crawl), str(more), "--vqvae", str(small_run.vqvae)]
    for verb, options in ((["score"], scored), (["train", "dit"], trained)):
        for source, out in (([str(tmp_path / "latents")], "folder"), (live, "live")):
            result = CliRunner().invoke(app, [*verb, *source, *options, "-o", str(tmp_path / out / verb[-1])])
            assert result.exit_code == 0, result.output
        result = CliRunner().invoke(app, [*verb, *live[:2], *options, "-o", str(tmp_path / "x")])
        assert result.exit_code == 2 and "expected one folder of latents" in result.output
    assert contents(tmp_path / "live" / "score") == contents(tmp_path / "folder" / "score")
    weights = [next((tmp_path / name / "dit").glob("step_*6/model.safetensors")) for name in ("live", "folder")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# --- messages --------------------------------------------------------------------------------------------------


def test_an_unfinished_folder_is_told_so(crawl, tmp_path, small_run, embed, encode):
    embed(crawl, "emb")
    encode(crawl, "latents")
    (tmp_path / "emb" / "b.parquet").unlink()
    (tmp_path / "latents" / "b.parquet").unlink()
    message = "2 of 3 shards are done, b is not; run the command that made it again"
    with pytest.raises(InputError, match=message):
        diffprune.cluster(tmp_path / "emb", tmp_path / "clusters", k=3)
    with pytest.raises(InputError, match=message):
        diffprune.score(tmp_path / "latents", small_run.surrogate, tmp_path / "scores", methods="loss")


def test_images_of_another_vqvae_are_named(crawl, tmp_path, small_run):
    first = sorted(small_run.vqvae.glob("step_*"))[0]
    arguments = [str(crawl), "--vqvae", str(first), "--checkpoint", str(small_run.surrogate), "--method", "loss"]
    result = CliRunner().invoke(app, ["score", *arguments, "-o", str(tmp_path / "scores")])
    assert result.exit_code == 1 and f"error: {crawl}: made by the VQ-VAE" in result.output
