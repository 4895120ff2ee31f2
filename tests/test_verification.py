"""What `verify` counts, and what it calls damage."""

from __future__ import annotations

import json

import pytest
from test_pruning import write_tar
from typer.testing import CliRunner

import diffprune
from diffprune.cli.app import app
from diffprune.errors import InputError
from diffprune.shards import list_shards


def image() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def crawl(tmp_path):
    """Samples with an image, without one (one of them with a bad cls), and in the second shard one with two."""
    png = image()
    (tmp_path / "crawl").mkdir()
    samples = {"a": {"png": png, "txt": b"x"}, "b": {"txt": b"x"}, "c": {"json": b"{}", "cls": b"x"}}
    write_tar(tmp_path / "crawl/0.tar", samples)
    write_tar(tmp_path / "crawl/1.tar", {"d": {"png": png}})
    return tmp_path / "crawl"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("decode", [False, True])
def test_samples_without_an_image_are_counted_and_no_damage(crawl, decode, workers):
    found = diffprune.verify(crawl, decode=decode, workers=workers)
    assert (found["samples"], found["samples_without_image"], found["damaged"]) == (4, 2, 0)
    assert CliRunner().invoke(app, ["verify", str(crawl)]).exit_code == 0
    write_tar(crawl / "2.tar", {"e": {"png": image(), "jpg": image()}})
    found = diffprune.verify(crawl, decode=decode, workers=workers)
    assert [(entry["key"], entry["error"]) for entry in found["damage"]] == [
        ("e", "expected one jpg, png or webp member, found 2")
    ]


def test_a_link_to_nothing_is_listed_and_the_others_are_looked_at(crawl):
    (crawl / "lost.tar").symlink_to("blobs/nowhere")
    found = diffprune.verify(crawl)
    assert (found["shards"], found["samples"], found["damaged"]) == (2, 4, 1)
    assert found["damage"][0]["shard"] == str(crawl / "lost.tar")
    assert found["damage"][0]["error"] == "a link to blobs/nowhere, where there is no file"
    result = CliRunner().invoke(app, ["verify", str(crawl), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["samples"] == 4
    for use in (list_shards, lambda shards: diffprune.verify(f"{shards}/{{0,9}}.tar")):
        with pytest.raises(InputError, match="no such shard"):
            use(crawl)


def test_a_shard_given_twice_is_told_as_such(crawl, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/0.tar").symlink_to(crawl / "0.tar")
    with pytest.raises(InputError, match=r"0.tar: given twice; give it once"):
        list_shards([crawl, crawl / "0.tar"])
    with pytest.raises(InputError, match=r"linked/0.tar: given twice, as .*crawl/0.tar too; give it once"):
        list_shards([crawl, tmp_path / "linked"])
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/0.tar").write_bytes((crawl / "0.tar").read_bytes())
    with pytest.raises(InputError, match=r"another shard has the same name \(.*\); rename one of them"):
        list_shards([crawl, tmp_path / "copy"])


def test_a_uid_may_have_capitals(tmp_path):
    """As `export` takes it."""
    from diffprune.decode import read_all_annotations
    from diffprune.shards import index_shard

    uids = ["0123456789abcdef" * 2, "0123456789ABCDEF" * 2, "0123456789ABCDEG" * 2]
    samples = {f"k{i}": {"json": json.dumps({"uid": uid}).encode()} for i, uid in enumerate(uids)}
    write_tar(tmp_path / "a.tar", samples)
    assert read_all_annotations(index_shard(tmp_path / "a.tar"))[1] == [*uids[:2], None]
