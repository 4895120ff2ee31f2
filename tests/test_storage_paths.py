"""What a user may give as a path, with storage in memory; and that local files never meet fsspec."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from diffprune.errors import InputError, RemoteError
from diffprune.files import atomic_file, atomic_path, read_json, write_json
from diffprune.shards import index_shard, index_shards, list_shards, show_spec
from diffprune.storage import RemotePath, Stat, as_path, existing, is_remote, local_path, stats
from diffprune.storage.retries import judge


@pytest.fixture
def memory():
    """Storage in memory, emptied."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture
def tar_bytes():
    """A tar of one sample with this key."""

    def make(key: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        return buffer.getvalue()

    return make


def put(fs, url: str, data: bytes) -> None:
    fs.pipe_file(url, data)


def test_a_local_path_is_a_path_and_a_url_is_not():
    assert as_path("a/b.tar") == Path("a/b.tar") and as_path(Path("/x")) == Path("/x")
    assert not is_remote("train-{0..3}.tar") and not is_remote("C:/x") and not is_remote("/s3:/x")
    url = as_path("s3://bucket/folder/train-0001.tar")
    assert isinstance(url, RemotePath) and as_path(url) is url
    assert (url.name, url.stem, url.suffix, str(url.parent)) == (
        "train-0001.tar",
        "train-0001",
        ".tar",
        "s3://bucket/folder",
    )
    assert url.parent / "x" / "y.npy" == as_path("s3://bucket/folder/x/y.npy") == url.with_name("x").parent / "x/y.npy"
    assert as_path("S3://Bucket/Key/") == as_path("s3://Bucket/Key")
    assert url.relative_to(as_path("s3://bucket")) == "folder/train-0001.tar"
    assert not url.is_relative_to(as_path("s3://bucket/fold")) and not url.is_relative_to(Path("/"))
    assert pickle.loads(pickle.dumps(url)) == url and len({url, as_path(str(url))}) == 1


def test_a_url_survives_pathlib_which_folds_its_slashes():
    assert str(Path("s3://bucket/x.tar")) == "s3:/bucket/x.tar"  # what a command line's Path makes of it
    assert as_path(Path("s3://bucket/x.tar")) == as_path("s3://bucket/x.tar")
    assert as_path(Path("https://host/x.tar?a=b")) == as_path("https://host/x.tar?a=b")


def test_what_signs_a_url_is_not_shown_and_signs_no_other():
    url = as_path("https://host/data/x.tar?signature=secret")
    assert str(url) == "https://host/data/x.tar?…" and os.fspath(url) == "https://host/data/x.tar?signature=secret"
    assert url.name == "x.tar" and url.suffix == ".tar" and "secret" not in repr(url)
    assert os.fspath(url.with_name("classes.json")) == "https://host/data/classes.json"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://host/x.tar", "s3://, gs://, https://"),
        ("file:///x.tar", "local path"),
        ("simplecache::s3://b/x.tar", "s3://"),
        ("zip://x.tar::s3://b/y.zip", "s3://"),
        ("s3://b/x::y", "s3://"),
        ("pipe:cat x.tar", "runs none"),
        ("s3://", "s3://bucket/folder"),
        ("s3:///key", "s3://bucket/folder"),
        ("https://user:secret@host/x.tar", "no user name or password"),
    ],
)
def test_other_urls_and_commands_are_refused(url, told):
    with pytest.raises(InputError, match=told) as error:
        list_shards(url)
    assert "secret" not in str(error.value)


def test_where_only_a_local_path_will_do_the_error_says_so():
    with pytest.raises(InputError, match=r"s3://b/run: a run folder cannot be a URL yet; copy it to local disk"):
        local_path("s3://b/run", "a run folder")
    assert local_path("run", "a run folder") == Path("run")


def test_shards_in_storage_are_listed_as_local_ones_are(memory, tmp_path, tar_bytes):
    for i in (1, 2, 10):
        put(memory, f"memory://b/set/train-{i:02d}.tar", tar_bytes(f"k{i}"))
    put(memory, "memory://b/set/.hidden.tar", b"")
    put(memory, "memory://b/set/classes.json", b"[]")
    put(memory, "memory://b/set/below/train-99.tar", b"")
    put(memory, "memory://b/list.txt", b"# shards\nset/train-10.tar\nmemory://b/set/train-01.tar\n")
    urls = [as_path(f"memory://b/set/train-{i}.tar") for i in ("01", "02", "10")]
    assert list_shards("memory://b/set") == list_shards("memory://b/set/") == urls
    assert list_shards("memory://b/set/train-0*.tar") == urls[:2]
    assert list_shards("memory://b/set/train-{01..02}.tar") == urls[:2]
    assert list_shards("memory://b/list.txt") == [urls[2], urls[0]]
    local = tmp_path / "own.tar"
    local.write_bytes(tar_bytes("local"))
    assert list_shards([urls[1], str(local)]) == [urls[1], local]
    listing = tmp_path / "list.txt"
    listing.write_text("own.tar\nmemory://b/set/train-02.tar\n")
    assert list_shards(listing) == [local, urls[1]]
    assert [sample.key for index in index_shards("memory://b/set") for sample in index.samples] == ["k1", "k2", "k10"]


def test_a_missing_shard_is_named(memory, tar_bytes):
    for i in range(20):
        put(memory, f"memory://b/train-{i:02d}.tar", tar_bytes(f"k{i}"))
    with pytest.raises(InputError, match=r"memory://b/train-20.tar: no such shard \(2 of 22"):
        list_shards("memory://b/train-{00..21}.tar")  # many: by a listing
    with pytest.raises(InputError, match=r"memory://b/train-20.tar: no such shard \(1 of 2"):
        list_shards("memory://b/train-{19..20}.tar")  # few: asked for one by one
    with pytest.raises(InputError, match="no shards"):
        list_shards("memory://nowhere")
    assert existing([as_path("memory://b/train-01.tar"), as_path("memory://b/x")]) == {
        as_path("memory://b/train-01.tar")
    }
    size = len(tar_bytes("k0"))
    for count in (3, 22):  # one by one, and by a listing
        urls = [as_path(f"memory://b/train-{i:02d}.tar") for i in range(22 - count, 22)]
        assert {url: about.st_size for url, about in stats(urls).items()} == dict.fromkeys(urls[:-2], size)
    here = Path(__file__)
    assert {path: about.st_size for path, about in stats([here, here.parent, here.with_name("gone")]).items()} == {
        here: here.stat().st_size
    }


def test_an_object_appears_when_it_is_whole(memory):
    url = as_path("memory://b/out/x.bin")
    with pytest.raises(RuntimeError), atomic_file(url) as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_path(url) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not url.exists() and list(as_path("memory://b").iterdir()) == []
    with atomic_file(url) as file:
        file.write(b"who")
        file.write(b"le")
        assert not url.exists()
    assert url.read_bytes() == b"whole" and url.stat().st_size == 5
    write_json("memory://b/out/x.json", {"a": 1})
    assert read_json("memory://b/out/x.json") == {"a": 1}
    assert sorted(path.name for path in as_path("memory://b/out").iterdir()) == ["x.bin", "x.json"]
    url.unlink()
    assert not url.exists() and as_path("memory://b/out").is_dir()
    with pytest.raises(InputError, match="https:// can only be read"), atomic_path("https://host/x"):
        pass


def test_an_object_that_changes_while_it_is_read_is_noticed(memory, tar_bytes):
    from diffprune.shards import ShardReader

    put(memory, "memory://b/x.tar", tar_bytes("a"))
    index = index_shard("memory://b/x.tar")
    put(memory, "memory://b/x.tar", tar_bytes("b"))  # of the same size
    with pytest.raises(
        RemoteError, match=r"memory://b/x.tar: expected version .*, found .*changed after it was indexed"
    ):
        ShardReader(index.path, index.size, index.version).__enter__()
    index = index_shard("memory://b/x.tar")
    assert [sample.key for sample in index.samples] == ["b"]
    reader = ShardReader(index.path, index.size, index.version)
    with pytest.raises(RemoteError, match="changed after it was indexed"), reader:
        reader.read(index.samples[0].members[0])
        put(memory, "memory://b/x.tar", tar_bytes("c"))


def test_without_the_packages_the_error_names_them(monkeypatch):
    from diffprune.storage import clients

    clients.forget_clients()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"needs the packages fsspec and s3fs .*pip install 'diffprune\[remote\]'"):
        list_shards("s3://bucket/x.tar")
    clients.forget_clients()


def test_local_files_do_not_import_fsspec(small_run):
    code = (
        "import sys, diffprune.shards, diffprune.files, diffprune.tables\n"
        f"diffprune.shards.index_shards({str(small_run.shards)!r})\n"
        f"diffprune.tables.read_folder({str(small_run.scores)!r})\n"
        "assert not {'fsspec', 's3fs', 'aiohttp'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_versions_that_a_listing_lacks_are_asked_for(memory, monkeypatch):
    """Some servers that speak S3 list objects without an ETag."""
    urls = [as_path(f"memory://listed/{i:02d}.tar") for i in range(12)]
    for url in urls:
        memory.pipe_file(f"/listed/{url.name}", b"x")
    asked = stats(urls[:1]) | stats(urls[1:2])  # few: each by itself
    listing = {url.name: Stat(1, "listed" if i >= 2 else "") for i, url in enumerate(urls)}
    monkeypatch.setattr(RemotePath, "_listed", lambda self, begin="": listing)
    found = stats([*urls, as_path("memory://listed/gone.tar")])
    assert found == asked | {url: Stat(1, "listed") for url in urls[2:]}
    assert all(about.version for about in found.values())


def test_signatures_are_not_told():
    assert show_spec(["https://host/a.tar?sig=secret", Path("b.tar")]) == "https://host/a.tar?…, b.tar"
    error = RuntimeError("403, message='Forbidden', url='https://host/a.tar?X-Signature=secret&b=1'")
    for status in (403, None):
        error.status = status
        told = judge(error)[1]
        assert "https://host/a.tar'" in told and "secret" not in told
