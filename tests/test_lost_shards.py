"""A shard that disappears, changes or is cut between index and read: a clear error, and finished work is kept."""

from __future__ import annotations

import os
import shutil

import pytest
from small_run import contents

import diffprune
from diffprune.errors import InputError

MODEL = """
import os
calls = []

def embed(images):
    calls.append(1)
    if len(calls) == 2:  # the first one only asks what shape comes out
        path = {path!r}
        {harm}
    return images.float().flatten(1) + 1

embed.image_size = 4
"""


@pytest.fixture
def run(small_run, tmp_path, monkeypatch):
    """Embeds three shards; when the first batch comes, something happens to the third one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(small_run.shards, tmp_path / "shards")
    third = sorted((tmp_path / "shards").glob("*.tar"))[2]

    def embed(harm: str, name: str, **options) -> dict:
        text = MODEL.format(path=str(third), harm=harm)
        (tmp_path / f"{name}.py").write_text(text)
        return diffprune.embed(tmp_path / "shards", tmp_path / "out", model=f"{name}:embed", batch_size=50, **options)

    return embed, third, tmp_path / "out"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("os.rename(path, path + '.away')", "no such shard any more; it was there when this run began"),
        ("os.utime(path, (1, 1))", "changed after it was indexed"),
        ("os.truncate(path, 20480)", "changed after it was indexed"),
        ("open(path, 'ab').write(bytes(512))", "changed after it was indexed"),
    ],
)
def test_it_is_told_and_the_finished_shards_are_kept(run, harm, said):
    embed, third, out = run
    with pytest.raises(InputError, match=f"{third.name}.*({said})"):
        embed(harm, "harmful_" + str(abs(hash(harm))))
    assert sorted(path.stem for path in out.glob("*.parquet")) == ["images-000000", "images-000001"]
    assert not list(out.glob(".tmp-*"))


def test_the_run_goes_on_when_it_is_back(run, small_run, tmp_path):
    embed, third, out = run
    with pytest.raises(InputError, match="no such shard any more"):
        embed(
            "if not os.path.exists(path + '.seen'): open(path + '.seen', 'w'); os.rename(path, path + '.away')", "once"
        )
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(kept) == 2
    os.rename(f"{third}.away", third)
    result = diffprune.embed(tmp_path / "shards", out, model="once:embed", batch_size=50)
    assert (result["samples"], result["shards_done_before"]) == (120, 2)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    diffprune.embed(tmp_path / "shards", tmp_path / "whole", model="once:embed", batch_size=50)
    assert contents(out) == contents(tmp_path / "whole")
