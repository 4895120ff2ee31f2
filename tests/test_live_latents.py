"""Latents encoded on the fly are those of the folder that `encode` writes, to the bit, and so are the scores."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
from test_encoding import damage_image
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.cli.app import app
from diffprune.errors import InputError
from diffprune.image_maps import ImageMap
from diffprune.live_latents import LiveLatents
from diffprune.passes import Passes
from diffprune.prefetch import Prefetch
from diffprune.tables import read_folder


def test_they_are_the_folders(small_run):
    folder, live = ArrayFolder(small_run.latents), LiveLatents(small_run.shards, small_run.vqvae)
    assert live.stems == folder.stems
    assert live.fingerprint == folder.fingerprint
    assert live.metadata.items() <= folder.metadata.items()
    for stem in folder.stems:
        assert live.table(stem).equals(folder.table(stem))
        assert live.array(stem).dtype == np.float16
        assert live.array(stem).tobytes() == folder.array(stem).tobytes()
        assert live.unread_table(stem).equals(folder.table(stem))


def test_a_damaged_image_fails_when_it_is_read(small_run, tmp_path):
    shutil.copytree(small_run.shards, tmp_path / "shards")
    key = damage_image(sorted((tmp_path / "shards").glob("*.tar"))[1])
    diffprune.encode(tmp_path / "shards", small_run.vqvae, tmp_path / "latents")
    folder, live = ArrayFolder(tmp_path / "latents"), LiveLatents(tmp_path / "shards", small_run.vqvae)
    stem = folder.stems[1]
    assert live.table(stem).equals(folder.table(stem))
    assert np.array_equal(live.array(stem), folder.array(stem), equal_nan=True)
    assert live.table(stem)["status"].to_pylist().count("failed") == 1
    row = live.table(stem)["key"].to_pylist().index(key)
    assert np.isnan(live.array(stem)[row]).all()
    assert live.unread_table(stem)["status"].to_pylist().count("failed") == 0


def test_a_shard_is_encoded_once_for_both_and_forgotten_after_the_next_two(small_run, monkeypatch):
    runs = []
    run = ImageMap.run
    monkeypatch.setattr(ImageMap, "run", lambda self, stem, *rest: runs.append(stem) or run(self, stem, *rest))
    live = LiveLatents(small_run.shards, small_run.vqvae)
    a, b, c = live.stems
    for stem in (a, b, a, c, b):
        assert len(live.table(stem)) == len(live.array(stem))
    assert runs == [a, b, c, b]


def test_they_can_be_read_ahead(small_run):
    folder, live = ArrayFolder(small_run.latents), LiveLatents(small_run.shards, small_run.vqvae)
    with Prefetch(lambda stem: [(live.table(stem), live.array(stem))], live.stems) as shards:
        for stem in live.stems:
            [(table, array)] = shards.parts(stem)
            assert array.tobytes() == folder.array(stem).tobytes() and table.num_rows == len(array)


def test_scores_are_the_same(small_run, tmp_path):
    live = LiveLatents(small_run.shards, small_run.vqvae)
    methods = ("loss", "el2n", "grand", "moso", "monotonicity", "random")
    diffprune.score(live, small_run.surrogate, tmp_path / "scores", methods=methods)
    assert read_folder(tmp_path / "scores").equals(read_folder(small_run.scores))
    # a folder of scores begun with the one is finished with the other
    last = sorted((tmp_path / "scores").glob("*.parquet"))[-1]
    last.unlink()
    result = diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "scores", methods=methods)
    assert result["shards_done_before"] == 2
    assert read_folder(tmp_path / "scores").equals(read_folder(small_run.scores))


def test_the_command_line_scores_shards(small_run, tmp_path):
    out = tmp_path / "scores"
    arguments = [str(small_run.shards), "--vqvae", str(small_run.vqvae), "--checkpoint", str(small_run.surrogate)]
    result = CliRunner().invoke(app, ["score", *arguments, "--out", str(out), "--method", "loss"])
    assert result.exit_code == 0, result.output
    assert read_folder(out)["loss"].equals(read_folder(small_run.scores)["loss"])
    missing = CliRunner().invoke(app, ["score", str(tmp_path / "no"), *arguments[1:], "--out", str(tmp_path / "x")])
    assert missing.exit_code == 1


def test_what_cannot_be_encoded_is_told_at_once(small_run, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        LiveLatents(tmp_path / "nowhere", small_run.vqvae)
    with pytest.raises(InputError, match="batch_size"):
        LiveLatents(small_run.shards, small_run.vqvae, batch_size=0)
    with pytest.raises(InputError):
        LiveLatents(small_run.shards, small_run.surrogate)


def test_encode_that_is_interrupted_leaves_no_thread_and_goes_on(small_run, tmp_path, monkeypatch):
    run, calls = ImageMap.run, []

    def interrupted(self, stem, *rest):
        calls.append(stem)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, stem, *rest)

    monkeypatch.setattr(ImageMap, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents")
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("prefetch", "decode"))]
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents")
    assert len(calls) == 4  # of three shards, the first was done
    for stem in ArrayFolder(small_run.latents).stems:
        assert (tmp_path / "latents" / f"{stem}.npy").read_bytes() == (small_run.latents / f"{stem}.npy").read_bytes()


def test_a_shard_that_changes_under_encode_stops_it_and_keeps_what_is_done(small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run.shards, tmp_path / "shards")
    last = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    batches = ImageMap.batches

    def cut_then_read(self, stem):
        if stem == last.stem:
            last.write_bytes(last.read_bytes()[:-2048])
        return batches(self, stem)

    monkeypatch.setattr(ImageMap, "batches", cut_then_read)
    with pytest.raises(InputError, match="changed after it was indexed"):
        diffprune.encode(tmp_path / "shards", small_run.vqvae, tmp_path / "latents")
    assert len(list((tmp_path / "latents").glob("*.parquet"))) == 2


def test_not_strict_is_another_run(small_run, tmp_path):
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents", strict_decode=False)
    with pytest.raises(diffprune.ResumeError, match="strict_decode"):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "latents")


def test_each_pass_of_score_encodes_a_shard_once(small_run, tmp_path, monkeypatch):
    """No look at the images before the first pass; MoSo's two passes at 3 checkpoints and the last visit's tables."""
    run, runs = ImageMap.run, []
    monkeypatch.setattr(ImageMap, "run", lambda self, stem, *rest: runs.append(stem) or run(self, stem, *rest))
    live = LiveLatents(small_run.shards, small_run.vqvae)
    diffprune.score(live, small_run.surrogate, tmp_path / "one", methods=["loss", "grand"], batch_size="auto")
    assert runs == live.stems
    runs.clear()
    result = diffprune.score(live, small_run.surrogate, tmp_path / "many", methods=["moso"])
    assert len(runs) <= result["sweeps"] * len(live.stems)


def test_the_next_shard_is_encoded_while_one_is_scored(small_run, tmp_path, monkeypatch):
    live = LiveLatents(small_run.shards, small_run.vqvae)
    encoded = {stem: threading.Event() for stem in live.stems}
    run, scores = ImageMap.run, Passes.scores
    waited = []

    def announced(self, stem, *rest):
        result = run(self, stem, *rest)
        encoded[stem].set()
        return result

    def after_the_next(self, stem, *rest):
        following = live.stems[live.stems.index(stem) + 1 :][:1]
        waited.extend(encoded[one].wait(timeout=60) for one in following)
        return scores(self, stem, *rest)

    monkeypatch.setattr(ImageMap, "run", announced)
    monkeypatch.setattr(Passes, "scores", after_the_next)
    diffprune.score(live, small_run.surrogate, tmp_path / "scores", methods="loss")
    assert waited == [True] * (len(live.stems) - 1) and waited
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_image_that_fails_on_the_fly_is_no_failure_of_scoring(small_run, tmp_path):
    shutil.copytree(small_run.shards, tmp_path / "shards")
    damage_image(sorted((tmp_path / "shards").glob("*.tar"))[1])
    diffprune.encode(tmp_path / "shards", small_run.vqvae, tmp_path / "latents")
    live = LiveLatents(tmp_path / "shards", small_run.vqvae)
    methods = ("loss", "moso")
    found = diffprune.score(live, small_run.surrogate, tmp_path / "live", methods=methods)
    expected = diffprune.score(tmp_path / "latents", small_run.surrogate, tmp_path / "folder", methods=methods)
    assert (found["failed"], found["failed_in_scoring"]) == (expected["failed"], 0) == (1, 0)
    assert read_folder(tmp_path / "live").equals(read_folder(tmp_path / "folder"))
