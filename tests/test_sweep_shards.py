"""A sweep of shards: they may lie in several places, and are the same ones in every run of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_identity import write_crawl, write_shard
from test_sweep import TINY, changed

import diffprune
from diffprune.errors import InputError, ResumeError
from diffprune.sweeping import running
from diffprune.sweeping.settings import load_sweep


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for folder, stems in (("old", "ab"), ("new", "c"), ("held-out", "de")):
        write_crawl(tmp_path / folder, stems)
    for stem, label in zip("abcde", "01010", strict=True):
        write_shard(tmp_path / {"a": "old", "b": "old", "c": "new"}.get(stem, "held-out") / f"{stem}.tar", label=label)
    (tmp_path / "all.toml").write_text(TINY)
    places = [str(tmp_path / "old"), str(tmp_path / "new" / "*.tar")]
    return changed(
        tmp_path / "all.toml",
        tmp_path / "sweep.toml",
        ('source = "SOURCE"', f"shards = {json.dumps(places)}"),
        ("resize = 16", f"held_out_shards = {json.dumps(str(tmp_path / 'held-out'))}"),
        ("held_out = 0.2", ""),
        ('methods = ["random", "grand-high", "cluster-balanced"]', "methods = []"),
        ("seeds = [0, 1]", "seeds = [0]"),
        ('model = "classifier"', 'model = "vqvae"'),
    )


def test_other_shards_than_those_of_the_first_run_are_refused(config, tmp_path, monkeypatch):
    indexed, real = [], running.index_found
    monkeypatch.setattr(running, "index_found", lambda found: (indexed.extend(found), real(found))[1])
    report = diffprune.sweep(config, tmp_path / "out")
    assert len(indexed) == 5
    assert (report["done"], report["left"]) == (1, [])
    recorded = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (sorted(recorded["shards"]), sorted(recorded["held_out_shards"])) == (
        ["a.tar", "b.tar", "c.tar"],
        ["d.tar", "e.tar"],
    )
    assert diffprune.sweep(config, tmp_path / "out", cells=["full-s0"])["done"] == 1
    assert len(indexed) == 5  # once, and not again by each cell's process
    more = changed(config, tmp_path / "more.toml", ("seeds = [0]", "seeds = [0, 1]"))

    def refused(message: str) -> None:
        for which, options in ((config, {}), (more, {}), (more, {"dry_run": True}), (more, {"shared_only": True})):
            with pytest.raises(ResumeError, match=rf"over other images: of data\.{message}\. Its cells"):
                diffprune.sweep(which, tmp_path / "out", **options)
        assert diffprune.sweep(config, tmp_path / "out", listing=True)["done"] == 1

    write_shard(tmp_path / "new" / "z.tar", label="1")
    refused(r"shards z\.tar is new")
    (tmp_path / "new" / "z.tar").rename(tmp_path / "held-out" / "z.tar")
    refused(r"held_out_shards z\.tar is new")
    (tmp_path / "held-out" / "z.tar").unlink()
    shutil.copy(tmp_path / "old" / "b.tar", tmp_path / "b.tar")
    write_shard(tmp_path / "old" / "b.tar", label="0")
    refused(r"shards b\.tar is now with other names, sizes, times or labels")
    (tmp_path / "old" / "b.tar").unlink()
    refused(r"shards b\.tar is gone")
    shutil.copy(tmp_path / "b.tar", tmp_path / "old" / "b.tar")
    assert diffprune.sweep(config, tmp_path / "out")["done"] == 1
    for folder in ("old", "new"):
        shutil.rmtree(tmp_path / folder)
    with pytest.raises(InputError, match="old: no such file or folder"):
        diffprune.sweep(config, tmp_path / "out")


def test_shards_are_text_or_a_list_of_it(config, tmp_path):
    assert len(load_sweep(config).data.shards) == 2
    wrong = changed(config, tmp_path / "wrong.toml", ("held_out_shards = ", "held_out_shards = 3 #"))
    with pytest.raises(InputError, match=r"held_out_shards: expected a str or a list of str, found 3"):
        load_sweep(wrong)
