"""The header index against tarfile and webdataset on good shards, and what it notices on damaged ones."""

from __future__ import annotations

import importlib
import io
import tarfile
from pathlib import Path

import pytest
from tar_mutations import set_checksum

from diffprune.errors import InputError
from diffprune.shards import ShardReader, index_shard, index_shards, list_shards


def write_tar(path: Path, members: list[tuple[str, bytes]], fmt: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for i in range(start, start + count):
        members += [(f"{i:05d}.png", bytes([i % 251]) * (i * 97 % 1500)), (f"{i:05d}.cls", str(i % 10).encode())]
    return members


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_finds_the_bytes_that_were_written(tmp_path, fmt):
    long = "folder/" + "x" * 160
    members = [*samples(7), (f"{long}.png", b"long" * 300), (f"{long}.cls", b"3")]
    if fmt == tarfile.USTAR_FORMAT:
        members = [
            *samples(7),
            ("f" * 90 + "/" + "x" * 80 + ".png", b"prefix"),
            ("f" * 90 + "/" + "x" * 80 + ".cls", b"3"),
        ]
    index = index_shard(write_tar(tmp_path / "a.tar", members, fmt))
    assert index.damage == []
    with ShardReader(index.path) as reader:
        found = [(member.name, reader.read(member)) for sample in index.samples for member in sample.members]
    assert found == members
    assert [sample.key for sample in index.samples] == list(dict.fromkeys(n.rsplit(".", 1)[0] for n, _ in members))
    # a sample's span holds whole members: cut out and closed with zeros it is a tar of its own
    for sample in index.samples:
        with ShardReader(index.path) as reader:
            span = reader.span(sample.offset, sample.size) + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(span)) as tar:
            assert tar.getnames() == [member.name for member in sample.members]


def test_samples_are_read_whole_whichever_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("diffprune.shards._BLOCK_BYTES", 4000)
    members = samples(40)
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    expected = dict(members)
    with ShardReader(index.path) as reader:
        for chosen in (index.samples, index.samples[::3], index.samples[5:9] + index.samples[7:2:-1], []):
            found = list(reader.samples(chosen))
            assert [sample for sample, _ in found] == chosen
            for sample, data in found:
                assert data == {"png": expected[f"{sample.key}.png"], "cls": expected[f"{sample.key}.cls"]}
        with open(index.path, "r+b") as file:
            file.truncate(index.samples[-1].members[0].data_offset + 1)
        with pytest.raises(InputError, match="changed after it was indexed"):
            list(reader.samples(index.samples))


def test_index_groups_as_webdataset_does(tmp_path):
    import webdataset

    members = [("a/b.jpg", b"1"), ("a/b.CLS", b"2"), ("c.d/e.png", b"3"), ("img.v1.jpg", b"4"), ("img.v2.jpg", b"5")]
    path = write_tar(tmp_path / "a.tar", members)
    expected = [
        (s["__key__"], [k for k in s if not k.startswith("__")])
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    index = index_shard(path)
    assert [(s.key, [m.extension for m in s.members]) for s in index.samples] == expected
    assert len(index.samples[-1].images()) == 2  # img.v1 and img.v2 merged: two images under one key


def test_folders_links_and_meta_names_are_no_samples(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("a/l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("a/1.png", "__meta__/x.json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["a/1"]
    assert index.damage == []
    assert [text.split(" ")[0] for text in index.ignored] == ["a/l.png", "__meta__/x.json"]


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(4))
    data = whole.read_bytes()
    content_end = index_shard(whole).samples[-1].members[-1].end
    first = index_shard(whole).samples[0]
    cuts = {0, 1, 511, 512, 513, first.size, first.size - 1, content_end - 1, content_end, content_end + 512}
    for cut in sorted(cuts | set(range(0, content_end, 777))):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        index = index_shard(path)
        assert index.damage, f"cut at {cut} of {len(data)} went unnoticed"
        intact = [s.key for s in index_shard(whole).samples if s.offset + s.size <= cut]
        # what is whole is still found; a sample cut between its members may be found with the rest missing
        assert [s.key for s in index.samples][: len(intact)] == intact
    path.write_bytes(data[: content_end + 1024])
    assert index_shard(path).damage == []


def test_every_flipped_header_bit_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = bytearray(path.read_bytes())
    header = index_shard(path).samples[1].offset
    for byte in range(0, 512, 3):
        damaged = bytearray(data)
        damaged[header + byte] ^= 1 << (byte % 8)
        path.write_bytes(damaged)
        index = index_shard(path)
        assert index.damage, f"a flipped bit in byte {byte} of a header went unnoticed"
        assert [s.key for s in index.samples] == ["00000"]


def test_a_zeroed_header_and_joined_archives_are_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = path.read_bytes()
    header = index_shard(path).samples[1].offset
    path.write_bytes(data[:header] + bytes(512) + data[header + 512 :])
    assert "zeroed header" in index_shard(path).damage[0].message
    path.write_bytes(data + write_tar(tmp_path / "b.tar", samples(2, 50)).read_bytes())
    assert "two archives" in index_shard(path).damage[0].message


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a.png", "b.png", "a.cls"], "duplicate, or interleaved"),
        (["a.png", "a.cls", "a.png"], "second .png"),
        (["a.png", "README"], "without an extension"),
        (["a\nb.png"], "control characters"),
    ],
)
def test_keys_that_do_not_add_up_are_damage(tmp_path, names, complaint):
    index = index_shard(write_tar(tmp_path / "a.tar", [(name, b"x") for name in names]))
    assert len(index.damage) == 1 and complaint in index.damage[0].message
    with pytest.raises(InputError, match=r"a\.tar.*diffprune verify"):
        index_shards(tmp_path)


def test_names_that_are_not_utf8_are_damage(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("\xe9.png"), io.BytesIO(b""))
    assert "UTF-8" in index_shard(path).damage[0].message


def test_one_key_in_two_shards_names_both(tmp_path):
    write_tar(tmp_path / "a.tar", samples(3))
    write_tar(tmp_path / "b.tar", samples(3, 2))
    with pytest.raises(InputError, match=r"b\.tar: key '00002' is also in .*a\.tar"):
        index_shards(tmp_path)


def test_list_shards_takes_patterns_globs_folders_and_lists(tmp_path):
    paths = [write_tar(tmp_path / f"train-{i:04d}.tar", samples(1, i)) for i in range(12)]
    (tmp_path / ".tmp-train-0012.tar").write_bytes(b"half a shard, of a pack that was killed")
    listing = tmp_path / "list.txt"
    listing.write_text("# a comment\ntrain-0003.tar\n\ntrain-0001.tar\n")
    assert list_shards(f"{tmp_path}/train-{{0000..0011}}.tar") == paths
    assert list_shards(f"{tmp_path}/train-*.tar") == paths
    assert list_shards(tmp_path) == paths
    assert list_shards(paths[2]) == [paths[2]]
    assert list_shards(listing) == [paths[3], paths[1]]
    assert list_shards([paths[4], f"{tmp_path}/train-000{{1,2}}.tar"]) == [paths[4], paths[1], paths[2]]


def test_list_shards_errors_name_what_is_missing(tmp_path):
    write_tar(tmp_path / "train-0000.tar", samples(1))
    with pytest.raises(InputError, match=r"train-0001\.tar: no such shard \(2 of 3"):
        list_shards(f"{tmp_path}/train-{{0000..0002}}.tar")
    for nothing in (f"{tmp_path}/none-*.tar", []):
        with pytest.raises(InputError, match="no shards"):
            list_shards(nothing)
    with pytest.raises(InputError, match="no such file or folder"):
        list_shards(tmp_path / "nowhere")
    (tmp_path / "copy").mkdir()
    write_tar(tmp_path / "copy" / "train-0000.tar", samples(1))
    with pytest.raises(InputError, match="the same name"):
        list_shards([tmp_path, tmp_path / "copy"])


@pytest.mark.parametrize("kind", [b"0", b"\0"])
@pytest.mark.parametrize("name, start", [("mode", 100), ("uid", 108), ("gid", 116), ("mtime", 136), ("devminor", 337)])
def test_a_header_whose_numbers_are_none_is_no_header(tmp_path, kind, name, start):
    """`tarfile` ends there, and says nothing."""
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = bytearray(path.read_bytes())
    before = index_shard(path).samples
    second = before[1].offset
    header = data[second : second + 512]
    header[156:157] = kind
    for field, told in (
        (b"\1\1\1\1\1\1\1\0", True),
        (b"0000644\0", False),
        (b"\xff" * 8, False),
        (b" 644 \0\1\1", False),
    ):
        header[start : start + 8] = field
        set_checksum(header)
        data[second : second + 512] = header
        path.write_bytes(data)
        index = index_shard(path)
        assert [(damage.offset, damage.message) for damage in index.damage] == (
            [(second, f"not a tar header: its {name} field is no number")] if told else []
        )
        assert index.samples == before[: 1 if told else 3]
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == sum(len(sample.members) for sample in index.samples)


@pytest.mark.parametrize("name", ["old/", "o" * 120 + "/"])
def test_an_old_header_is_a_folders_if_its_own_name_ends_in_a_slash(tmp_path, name):
    """As `tarfile` reads it: not by a long name before it, whose file may have data."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type = tarfile.AREGTYPE
        data = b"" if name == "old/" else b"data" * 200
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        for key, data in samples(2):
            info = tarfile.TarInfo(key)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["00000", "00001"]
    assert [damage.message for damage in index.damage] == (
        [] if name == "old/" else ["a name without an extension belongs to no sample"]
    )


@pytest.mark.parametrize("at", [124, 148])
def test_digits_behind_a_nul_are_no_number(tmp_path, at):
    """`tarfile` reads a size of 0 there, or a wrong checksum."""
    path = write_tar(tmp_path / "a.tar", samples(2))
    data = bytearray(path.read_bytes())
    second = index_shard(path).samples[1].offset
    header = data[second : second + 512]
    header[at] = 0
    if at != 148:
        set_checksum(header)
    data[second : second + 512] = header
    path.write_bytes(data)
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["00000"] and [d.offset for d in index.damage] == [second]


def extended(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "before",
    [
        [(b"x", b"14 path=b.png\n")],
        [(b"X", b"14 path=b.png\n")],
        [(b"L", b"b.png\0"), (b"x", b"14 path=c.png\n")],
        [(b"x", b"14 path=b.png\n"), (b"L", b"c.png\0"), (b"x", b"10 size=9\n")],
        [(b"x", b"10 size=7\n"), (b"x", b"10 size=9\n"), (b"L", b"b.png\0")],
        [(b"L", b"b.png\0"), (b"L", b"c.png\0")],
    ],
)
def test_extended_headers_mean_what_they_mean_to_tarfile(tmp_path, before):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1234567"), ("z.png", b"")])
    path.write_bytes(b"".join(extended(*one) for one in before) + path.read_bytes())
    index = index_shard(path)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert not index.damage and expected[0][0] == "b.png"
    assert [(m.name, m.data_offset, m.size) for sample in index.samples for m in sample.members] == expected


@pytest.mark.parametrize("record", [b"14 path=b.pngX", b"11 =b.png.\n", b"13 path=b.png\n"])
def test_a_pax_record_that_tarfile_would_cut_or_pass_over_is_damage(tmp_path, record):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1234567")])
    path.write_bytes(extended(b"x", record) + path.read_bytes())
    assert [damage.message for damage in index_shard(path).damage] == ["a malformed pax header"]


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_names_prefix_counts_as_for_tarfile(tmp_path, fmt):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1234567")], fmt)
    data = bytearray(path.read_bytes())
    data[345:351] = b"folder"
    set_checksum(data)
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert index_shard(path).samples[0].key == "folder/a" and tar.getnames() == ["folder/a.png"]


@pytest.mark.parametrize(
    "kind, data, at",
    [
        (b"x", b"14 path=b.png\n", 14),  # Python 3.13's tarfile stops at it, and says nothing
        (b"L", b"b.png", 5),  # a letter more of the name, to tarfile
        (b"x", b"10 size=7\n", 10),
    ],
)
def test_an_extended_headers_padding_is_zeros(tmp_path, kind, data, at):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1234567")])
    before = bytearray(extended(kind, data) + path.read_bytes())
    path.write_bytes(before)
    assert not index_shard(path).damage
    for padding in (b"x", b"14 path=c.png\n"):
        changed = before.copy()
        changed[512 + at : 512 + at + len(padding)] = padding
        path.write_bytes(changed)
        index = index_shard(path)
        assert [(one.offset, one.message) for one in index.damage] == [
            (0, "an extended header whose padding is not zeros: damaged")
        ]
        assert index.samples == []


def test_a_checksum_that_is_no_number_is_right_for_no_header(tmp_path):
    """Even where the signed sum of all other bytes is that of none."""
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1234567")])
    data = bytearray(path.read_bytes())
    data[148:156] = b"garbage!"
    signed = sum(byte - 256 * (byte > 127) for byte in data[:148] + data[156:512])
    low, rest = divmod(-256 - signed, -128)
    data[157 : 157 + low] = b"\x80" * low
    data[157 + low] = rest % 256
    path.write_bytes(data)
    assert [one.message for one in index_shard(path).damage] == ["a tar header whose checksum is wrong: damaged"]


@pytest.mark.parametrize("compress", ["gzip", "bz2", "lzma"])
def test_a_compressed_tar_is_told_as_one(tmp_path, compress):
    """Not as a damaged one, which would be fetched again in vain."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    data = importlib.import_module(compress).compress(plain.getvalue())
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar.gz").write_bytes(data)
    name = {"bz2": "bzip2", "lzma": "xz"}.get(compress, compress)
    for spec in (tmp_path / "a.tar", tmp_path / "*.tar.gz"):
        with pytest.raises(InputError, match=f"compressed by {name}; .* the whole list, then decompress it$"):
            index_shards(spec)
    with pytest.raises(InputError, match=r"b.tar.gz: expected a .tar, .*; decompress it"):
        index_shards(tmp_path / "b.tar.gz")


def test_a_list_that_names_itself_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("list.txt\n")
    with pytest.raises(InputError, match=r"list.txt: a list of shards that leads back to itself"):
        index_shards(tmp_path / "list.txt")


def test_a_pattern_of_more_names_than_there_are_shards_anywhere_is_told_at_once():
    for spec in ("train-{0..999999999}.tar", "train-{00..99}{000..999}{000..999}.tar"):
        with pytest.raises(InputError, match=r"\}\.tar: a brace pattern of more than 1,000,000 names"):
            list_shards(spec)
