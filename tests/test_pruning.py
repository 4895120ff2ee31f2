from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune.errors import InputError, ResumeError, short
from diffprune.pruning import prune
from diffprune.shards import index_shard, list_shards

COUNTS = [5, 1, 8]  # samples per input shard


def write_tar(path: Path, samples: dict[str, dict[str, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    """By tarfile, with times, owners and long names, so that headers differ from those diffprune would write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for number, (key, members) in enumerate(samples.items()):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime, info.uname, info.mode = len(data), 1.7e9 + number / 4, "somebody", 0o600
                tar.addfile(info, io.BytesIO(data))


def data_set(folder: Path, name: str = "train-%04d", format: int = tarfile.PAX_FORMAT) -> dict[str, dict[str, bytes]]:
    """14 samples in three shards; sample i has key k<i> or a very long one. Returns key -> members."""
    rng = np.random.default_rng(0)
    samples = {}
    for i in range(sum(COUNTS)):
        key = f"k{i:02d}" if i % 3 else f"{'long' * 30}/{'name' * 40}é{i:02d}"
        samples[key] = {
            "jpg": rng.bytes(int(rng.integers(0, 3000))),
            "cls": b"%d" % i,
            "seg.png": rng.bytes(512),
            "txt": b"",
        }
    keys = list(samples)
    for number, count in enumerate(COUNTS):
        start = sum(COUNTS[:number])
        write_tar(folder / f"{name % number}.tar", {key: samples[key] for key in keys[start : start + count]}, format)
    return samples


def place_of(shards: Path) -> dict[str, tuple[str, int, int]]:
    return {s.key: (path.name, s.offset, s.size) for path in list_shards(shards) for s in index_shard(path).samples}


def write_kept(path: Path, shards: Path, keys: list[str]) -> None:
    places = place_of(shards)
    rows = [{"key": key, **dict(zip(("shard", "offset", "size"), places[key], strict=True))} for key in keys]
    pq.write_table(pa.Table.from_pylist(rows), path)


def read_back(paths: list[str]) -> list[tuple[str, dict[str, bytes]]]:
    import webdataset as wds

    samples = wds.WebDataset(paths, shardshuffle=False, empty_check=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def kept(tmp_path):
    """A data set in tmp_path/in, and 9 of its 14 samples, neighbours and not, in no order."""
    samples = data_set(tmp_path / "in")
    keys = [list(samples)[i] for i in (13, 0, 1, 2, 4, 9, 6, 7, 11)]
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", keys)
    in_order = [key for key in samples if key in keys]
    return [(key, samples[key]) for key in in_order]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("shard_size", [1, 4, 9, 100])
def test_kept_samples_are_read_back_by_webdataset(tmp_path, kept, format, shard_size):
    data_set(tmp_path / "in", format=format)
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", [key for key, _ in kept])
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=shard_size)
    assert read_back(result["shards"]) == kept
    assert [len(index_shard(path).samples) for path in result["shards"]] == [
        min(shard_size, 9 - start) for start in range(0, 9, shard_size)
    ]
    assert not any(index_shard(path).damage for path in result["shards"])
    assert (result["count"], result["samples_in"], result["shards_in"]) == (9, 14, 3)
    assert result["bytes"] == sum(Path(path).stat().st_size for path in result["shards"])
    assert list_shards(result["pattern"]) == [Path(path) for path in result["shards"]]


def test_members_are_copied_byte_for_byte(tmp_path, kept):
    """Headers and padding included: each sample's bytes in the input are its bytes in the output."""
    [shard] = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=9)["shards"]
    expected = b""
    places = place_of(tmp_path / "in")
    for key, _ in kept:
        name, offset, size = places[key]
        expected += (tmp_path / "in" / name).read_bytes()[offset : offset + size]
    assert Path(shard).read_bytes() == expected + bytes(1024)
    with tarfile.open(shard) as tar:
        assert {info.uname for info in tar} == {"somebody"}
        assert all(info.mtime >= 1.7e9 for info in tar)


def test_large_samples_are_copied_whole(tmp_path):
    big = np.random.default_rng(0).bytes(9_000_001)
    write_tar(tmp_path / "in/a-0.tar", {"a": {"png": b"1"}, "b": {"png": big}, "c": {"png": b"2"}})
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", ["b"])
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    assert read_back(result["shards"]) == [("b", {"png": big})]


def test_shards_are_as_large_and_named_as_the_inputs(tmp_path, kept):
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    assert result["shard_size"] == 8
    assert [Path(path).name for path in result["shards"]] == ["train-0000.tar", "train-0001.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "prune.json",
        "train-0000.tar",
        "train-0001.tar",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("%05d", {}, ["00000.tar", "00001.tar"]),
        ("v1_%d", {}, ["v1_0.tar", "v1_1.tar"]),
        ("a-%02d", {"prefix": "b"}, ["b-00.tar", "b-01.tar"]),
        ("a-%d", {"shard_size": 1, "prefix": "x7"}, [f"x7-{i}.tar" for i in range(9)]),
    ],
)
def test_names_keep_what_stands_before_the_number_and_its_width(tmp_path, kept, name, arguments, expected):
    data_set(tmp_path / "other", name)
    write_kept(tmp_path / "kept.parquet", tmp_path / "other", [key for key, _ in kept])
    result = prune(tmp_path / "kept.parquet", tmp_path / "other", tmp_path / "out", **arguments)
    assert [Path(path).name for path in result["shards"]] == expected
    assert list_shards(result["pattern"]) == [Path(path) for path in result["shards"]]


def test_more_shards_than_digits_widen_the_number(tmp_path):
    samples = {f"k{i:02d}": {"png": b"x"} for i in range(12)}
    write_tar(tmp_path / "in/all.tar", samples)
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", list(samples))
    result = prune(tmp_path / "kept.parquet", tmp_path / "in/all.tar", tmp_path / "a")
    assert [Path(path).name for path in result["shards"]] == ["all-000000.tar"]
    (tmp_path / "in/all.tar").rename(tmp_path / "in/all1.tar")
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", list(samples))
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "b", shard_size=1)
    assert [Path(path).name for path in result["shards"]] == [f"all{i:02d}.tar" for i in range(12)]
    assert [key for key, _ in read_back(result["shards"])] == list(samples)


def test_shards_of_two_names_need_a_prefix(tmp_path):
    write_tar(tmp_path / "in/a-0.tar", {"a": {"png": b"1"}})
    write_tar(tmp_path / "in/b-0.tar", {"b": {"png": b"2"}})
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", ["a", "b"])
    with pytest.raises(InputError, match=r"begin in 2 ways \(a-, b-\); give a prefix"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", prefix="c", shard_size=2)
    assert read_back(result["shards"]) == [("a", {"png": b"1"}), ("b", {"png": b"2"})]


def test_class_names_come_along(tmp_path, kept):
    (tmp_path / "in/classes.json").write_bytes(b'["cat",\n"dog"]')
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/classes.json").read_bytes() == b'["cat",\n"dog"]'
    write_tar(tmp_path / "more/train-0009.tar", {"z": {"png": b"1"}})
    (tmp_path / "more/classes.json").write_bytes(b'["cow"]')
    with pytest.raises(InputError, match="name different classes"):
        prune(tmp_path / "kept.parquet", [tmp_path / "in", tmp_path / "more"], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_the_same_inputs_give_the_same_bytes(tmp_path, kept):
    for out in ("a", "b"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / out, shard_size=4)
    table = pq.read_table(tmp_path / "kept.parquet")
    pq.write_table(table.take(pa.array(range(8, -1, -1))), tmp_path / "kept.parquet")
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "c", shard_size=4)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "c")


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, kept, monkeypatch):
    from diffprune import pruning

    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "whole", shard_size=3)
    copy, calls = pruning.copy_ranges, []

    def stopping(source, spans, target):
        calls.append(source.name)
        if len(calls) == 4:
            os.write(target, b"half")
            raise KeyboardInterrupt
        copy(source, spans, target)

    monkeypatch.setattr(pruning, "copy_ranges", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=3, workers=1)
    there = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(there) == ["prune.json", "train-0000.tar", "train-0001.tar"]
    (tmp_path / "out/.tmp-train-0002.tar").write_bytes(b"left by a killed run")
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=3)
    assert (result["present"], result["written"]) == (2, 1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_going_on_with_another_plan_is_refused(tmp_path, kept):
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=3)
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(ResumeError, match="shard_size: 3 there, 4 now"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    with pytest.raises(ResumeError, match="prefix"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=3, prefix="x")
    write_kept(tmp_path / "fewer.parquet", tmp_path / "in", [key for key, _ in kept[1:]])
    with pytest.raises(ResumeError, match="selection"):
        prune(tmp_path / "fewer.parquet", tmp_path / "in", tmp_path / "out", shard_size=3)
    (tmp_path / "in/train-0001.tar").unlink()
    with pytest.raises((ResumeError, InputError)):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=3)
    assert folder_bytes(tmp_path / "out") == before


def test_an_out_with_other_files_is_refused_even_if_they_are_named_like_ours(tmp_path, kept):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-0000.tar").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"1 other file\(s\), first 'train-0000.tar'"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == {"train-0000.tar": b"mine"}
    before = folder_bytes(tmp_path / "in")
    with pytest.raises(InputError, match="other file"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "in")
    assert folder_bytes(tmp_path / "in") == before
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "done")
    (tmp_path / "done/notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes.txt"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "done")
    (tmp_path / "done/notes.txt").unlink()
    (tmp_path / "done/prune.json").write_text("[]")
    with pytest.raises(InputError, match=r"prune.json: expected the plan"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "done")


def test_dry_run_checks_and_writes_nothing(tmp_path, kept):
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4, dry_run=True)
    assert not (tmp_path / "out").exists()
    done = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    assert {**done, "dry_run": True} == result == json.loads(json.dumps(result))


# --- selections and shards that do not belong together -----------------------------------------------------------


def test_a_selection_of_another_data_set_is_refused_with_key_expected_and_found(tmp_path, kept):
    samples = {f"other{i}": {"jpg": b"x" * 700, "cls": b"1"} for i in range(14)}
    keys = list(samples)
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 14)]):
        write_tar(tmp_path / f"else/train-{number:04d}.tar", {key: samples[key] for key in keys[start:stop]})
    first = kept[0][0]
    with pytest.raises(
        InputError, match=rf"train-0000.tar: expected key '{first[:100]}.* at byte 0 .*found key 'other0' there"
    ):
        prune(tmp_path / "kept.parquet", tmp_path / "else", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("column", "change"), [("offset", 512), ("offset", 1), ("size", -512), ("size", 512)])
def test_a_place_that_is_off_is_refused(tmp_path, kept, column, change):
    table = pq.read_table(tmp_path / "kept.parquet")
    values = table[column].to_pylist()
    values[5] += change
    number = table.column_names.index(column)
    pq.write_table(table.set_column(number, column, pa.array(values)), tmp_path / "kept.parquet")
    key = table["key"][5].as_py()
    with pytest.raises(InputError, match=rf"expected key '{key[:100]}.* at byte .*as .*kept.parquet says"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")


def test_two_keys_whose_places_are_swapped_are_refused(tmp_path):
    write_tar(tmp_path / "in/a-0.tar", {"a": {"png": b"1"}, "b": {"png": b"2"}})
    write_kept(tmp_path / "kept.parquet", tmp_path / "in", ["a", "b"])
    table = pq.read_table(tmp_path / "kept.parquet")
    pq.write_table(table.set_column(0, "key", pa.array(["b", "a"])), tmp_path / "kept.parquet")
    with pytest.raises(InputError, match="expected key 'b' at byte 0"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")


def test_damaged_shards_are_refused(tmp_path, kept):
    path = tmp_path / "in/train-0002.tar"
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(InputError, match=r"train-0002.tar: damaged at byte"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")


def test_shards_that_are_not_there_are_named(tmp_path, kept):
    with pytest.raises(InputError, match=r"1 of its 2 shards, first 'train-0002.tar', are not among the 2 shards"):
        prune(tmp_path / "kept.parquet", str(tmp_path / "in/train-{0000..0001}.tar"), tmp_path / "out")
    with pytest.raises(InputError, match="no such"):
        prune(tmp_path / "kept.parquet", str(tmp_path / "nowhere/train-{0000..0001}.tar"), tmp_path / "out")


def test_selections_that_cannot_be_used_are_refused(tmp_path, kept):
    table = pq.read_table(tmp_path / "kept.parquet")
    broken = {
        "found none": table.slice(0, 0),
        "stands in it twice": pa.concat_tables([table, table.slice(3, 1)]),
        "1 rows have no key": table.set_column(0, "key", pa.array([None, *table["key"].to_pylist()[1:]])),
        "1 of 9 rows have no shard, offset and size.*clip-retrieval:FOLDER": table.set_column(
            2, "offset", pa.array([None, *table["offset"].to_pylist()[1:]], pa.int64())
        ),
        "'offset'": table.drop_columns(["offset"]),
    }
    for message, content in broken.items():
        pq.write_table(content, tmp_path / "broken.parquet")
        with pytest.raises(InputError, match=message):
            prune(tmp_path / "broken.parquet", tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="shard_size"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=0)
    with pytest.raises(InputError, match="prefix"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", prefix="a/b")
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_stage_is_no_selection_and_rows_of_it_are(tmp_path, kept):
    from diffprune.exporting import export
    from diffprune.tables import kept_keys, write_table

    table, clusters = pq.read_table(tmp_path / "kept.parquet"), tmp_path / "clusters"
    clusters.mkdir()
    (clusters / "stage.json").write_text("{}")
    write_table(clusters / "train-0000.parquet", table, {"stage": "cluster"})
    for use in (
        lambda path: prune(path, tmp_path / "in", tmp_path / "out"),
        lambda path: export(path, tmp_path / "keys.txt", format="keys"),
        kept_keys,
    ):
        with pytest.raises(InputError, match=r"train-0000.parquet: expected a selection, found a table of `cluster`"):
            use(clusters / "train-0000.parquet")
    by_hand = pq.read_table(clusters / "train-0000.parquet").slice(0, 5)  # with the metadata
    pq.write_table(by_hand, tmp_path / "hand.parquet")
    assert prune(tmp_path / "hand.parquet", tmp_path / "in", tmp_path / "out")["count"] == 5


def test_a_shard_that_shrinks_while_it_is_copied_leaves_nothing_half_written(tmp_path, kept, monkeypatch):
    from diffprune import pruning

    copy = pruning.copy_ranges

    def shrinking(source, spans, target):
        if source.name == "train-0002.tar":
            source.write_bytes(source.read_bytes()[:3000])
        copy(source, spans, target)

    monkeypatch.setattr(pruning, "copy_ranges", shrinking)
    with pytest.raises(InputError, match=r"train-0002.tar: expected bytes up to \d+, found its end at 3000"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=9)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prune.json"]


# --- how bytes are copied, what is left behind ------------------------------------------------------------------


@pytest.mark.parametrize("lost", [[], ["copy_file_range"], ["copy_file_range", "sendfile"]])
@pytest.mark.parametrize("how", ["missing", "refused", "silent"])
def test_every_way_of_copying_gives_the_same_bytes(tmp_path, kept, monkeypatch, lost, how):
    """Where the system lacks a call, the file system refuses it, or it copies nothing (as some kernels' do)."""
    import errno

    from diffprune import copying

    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "whole", shard_size=4)
    called = []

    def unable(source, target, begin, size):
        called.append(size)
        if how == "silent":
            return 0
        raise OSError(errno.EXDEV if len(called) % 2 else errno.EINVAL, "cannot")

    for name in lost:
        if how == "missing":
            monkeypatch.delattr(copying.os, name)
        else:
            monkeypatch.setitem(copying._WAYS, name, unable)
    monkeypatch.setattr(copying, "_COPY_BYTES", 1000)
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert bool(called) == (bool(lost) and how != "missing")


def test_an_error_of_the_disk_is_told_and_leaves_nothing_half_written(tmp_path, kept, monkeypatch):
    import errno

    from diffprune import copying

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in copying._WAYS:
        monkeypatch.setitem(copying._WAYS, name, full)
    with pytest.raises(OSError, match="No space left"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prune.json"]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(tmp_path, kept, workers):
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "whole", shard_size=1)
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=1, workers=workers)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    with pytest.raises(InputError, match="workers: expected at least 1"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "other", workers=0)


def test_the_manifest_counts_what_lies_beside_it(tmp_path, kept):
    result = prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    manifest = json.loads((tmp_path / "out/prune.json").read_text())
    assert (manifest["count"], manifest["samples_in"], manifest["shards_in"]) == (9, 14, 3)
    assert manifest["bytes"] == result["bytes"]
    for about, path in zip(manifest["shards"], result["shards"], strict=True):
        assert about["name"] == Path(path).name and about["bytes"] == Path(path).stat().st_size
        assert about["samples"] == len(index_shard(path).samples)
    assert len({about["fingerprint"] for about in manifest["shards"]}) == 3
    write_kept(tmp_path / "fewer.parquet", tmp_path / "in", [key for key, _ in kept[:-1]])
    prune(tmp_path / "fewer.parquet", tmp_path / "in", tmp_path / "fewer", shard_size=4)
    fewer = json.loads((tmp_path / "fewer/prune.json").read_text())
    assert fewer["shards"][:2] == manifest["shards"][:2], "the same samples, the same fingerprint"
    assert fewer["fingerprint"] != manifest["fingerprint"]


def test_a_new_shard_that_was_changed_is_refused(tmp_path, kept):
    prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    path = tmp_path / "out/train-0001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(InputError, match=r"train-0001.tar: expected \d+ bytes, found \d+: it was changed; delete it"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)
    path.unlink()
    assert prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=4)["written"] == 1


def test_verify_finds_any_byte_that_was_changed_and_names_its_key(tmp_path, kept):
    given = [tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out"]
    assert "verified" not in prune(*given, shard_size=4)
    assert prune(*given, shard_size=4, verify=True)["verified"] == 3
    path = tmp_path / "out/train-0001.tar"
    whole = path.read_bytes()
    samples = index_shard(path).samples
    places = {s.offset: s.key for s in samples} | {s.offset + s.size - 1: s.key for s in samples}
    for at, key in {**places, len(whole) - 1: None}.items():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        before = folder_bytes(tmp_path / "out")
        assert prune(*given, shard_size=4)["present"] == 3, "sizes alone are compared"
        told = f"train-0001.tar: byte {at}{'' if key is None else re.escape(f' (key {short(key)})')} is not as in"
        with pytest.raises(InputError, match=told):
            prune(*given, shard_size=4, verify=True)
        assert folder_bytes(tmp_path / "out") == before
    path.unlink()
    assert prune(*given, shard_size=4, verify=True)["verified"] == 3 and path.read_bytes() == whole
    with pytest.raises(InputError, match="verify compares what was written"):
        prune(*given, shard_size=4, verify=True, dry_run=True)


def test_a_comparison_tells_where_a_file_is_shorter_or_longer():
    from diffprune.copying import Comparison

    for there, expected in ((b"abcdef", None), (b"abcdeX", 5), (b"Xbcdef", 0), (b"abcd", 4), (b"abcdefg", 6)):
        comparison = Comparison(io.BytesIO(there))
        for part in (b"abc", b"def"):
            comparison.write(part)
        assert comparison.end() == expected, there


def test_pruning_goes_on_beside_the_indexes_of_energon(tmp_path, kept):
    given = [tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out"]
    prune(*given, shard_size=4)
    for path in list((tmp_path / "out").glob("*.tar")):
        (tmp_path / "out" / f"{path.name}.idx").write_bytes(bytes(8))
    assert prune(*given, shard_size=4)["present"] == 3
    (tmp_path / "out/train-0009.tar.idx").touch()
    with pytest.raises(InputError, match=r"first 'train-0009.tar.idx'"):
        prune(*given, shard_size=4)


def test_a_shard_that_is_written_to_while_it_is_copied_is_refused(tmp_path, kept, monkeypatch):
    from diffprune import pruning

    copy = pruning.copy_ranges

    def touching(source, ranges, target):
        copy(source, ranges, target)
        if source.name == "train-0002.tar":
            os.utime(source, ns=(1, 1))

    monkeypatch.setattr(pruning, "copy_ranges", touching)
    with pytest.raises(InputError, match=r"train-0002.tar: changed while it was copied"):
        prune(tmp_path / "kept.parquet", tmp_path / "in", tmp_path / "out", shard_size=9)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prune.json"]
