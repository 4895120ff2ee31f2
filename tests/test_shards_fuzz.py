"""The header index and the sample reader on hostile tars: no crash, nothing lost or invented without a word.

The long form, 100,000 mutations with memory and time watched, is ``python tests/soak/fuzz_shards.py``.
"""

from __future__ import annotations

import io
import resource
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_mutations import FORMATS, Entry, build, check, contents, mutations, set_checksum

from diffprune.decode import read_batches
from diffprune.errors import InputError
from diffprune.shards import ShardReader, index_shard, index_shards


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.tar"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(items=contents, fmt=st.sampled_from(sorted(FORMATS)), steps=mutations)
def test_mutated_tars(path, items, fmt, steps):
    check(path, items, fmt, steps)


SAMPLES = [Entry(f"s{i}{ext}", bytes([65 + i]) * (i * 401)) for i in range(4) for ext in (".png", ".cls")]


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_cut_at_every_block_keeps_what_is_whole_and_is_told(path, fmt):
    data = build(SAMPLES, fmt)
    path.write_bytes(data)
    whole = index_shard(path).samples
    end = whole[-1].offset + whole[-1].size
    for cut in range(0, end + 1024, 256):
        path.write_bytes(data[:cut])
        index = index_shard(path)
        assert index.damage, cut
        expected = [sample for sample in whole if sample.offset + sample.size <= cut]
        assert index.samples[: len(expected)] == expected
        reported = len(whole) - len(expected)  # counts add up: good + what lies behind the damage
        assert reported == sum(sample.offset + sample.size > cut for sample in whole)


def test_a_tail_of_zeros_is_told_unless_it_is_padding(path):
    data = build(SAMPLES, "ustar")
    path.write_bytes(data)
    whole = index_shard(path)
    end = whole.samples[-1].offset + whole.samples[-1].size
    for zeros in (1024, 1536, 11 * 1024):
        path.write_bytes(data[:end] + bytes(zeros))
        assert index_shard(path).damage == [] and index_shard(path).samples == whole.samples
    for zeros in (11 * 1024 + 512, 3 << 20):
        path.write_bytes(data[:end] + bytes(zeros))
        assert f"cut it to {end + 1024} bytes" in index_shard(path).damage[0].message
    path.write_bytes(bytes(50_000))
    assert index_shard(path).damage


def test_a_flip_in_data_changes_that_member_and_nothing_else(path):
    data = bytearray(build(SAMPLES, "ustar"))
    path.write_bytes(data)
    whole = index_shard(path)
    member = whole.samples[2].members[0]
    data[member.data_offset + 5] ^= 8
    path.write_bytes(data)
    assert index_shard(path) == whole


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ({"size": "²"}, "malformed pax"),
        ({"size": "9" * 5000}, "malformed pax"),
        ({"size": "-1"}, "malformed pax"),
        ({"size": "9" * 18}, "was cut"),
        ({"GNU.sparse.major": "1", "GNU.sparse.name": "s.png"}, "sparse member"),
    ],
)
def test_pax_tricks_are_told(path, records, complaint):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("s.png")
        info.size, info.pax_headers = 3, records
        tar.addfile(info, io.BytesIO(b"abc"))
    [damage] = index_shard(path).damage
    assert complaint in damage.message


def test_a_global_pax_header_that_renames_everything_is_told(path):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil.png"}) as tar:
        tar.addfile(tarfile.TarInfo("s.png"))
    assert "global pax" in index_shard(path).damage[0].message


def test_a_long_name_that_is_not_utf8_is_not_replaced_by_its_beginning(path):
    data = build([Entry("é" * 150 + ".png", b"x", latin=True)], "gnu")
    path.write_bytes(data)
    index = index_shard(path)
    assert index.samples == [] and "not UTF-8" in index.damage[0].message


def test_extended_headers_without_a_member_are_told(path):
    data = build([Entry("k" * 150 + ".png", b"")], "gnu")
    path.write_bytes(data[: 2 * 512] + bytes(1024))  # the long name alone
    assert "without its member" in index_shard(path).damage[0].message


def test_a_gnu_sparse_member_is_told_and_what_follows_is_found(path):
    sparse = bytearray(build([Entry("s.png", b"x" * 700, kind=b"S")], "gnu")[: 512 * 3])
    sparse[482] = 1  # one more block of the map of holes
    set_checksum(sparse)
    path.write_bytes(bytes(sparse[:512]) + bytes(512) + bytes(sparse[512:]) + build(SAMPLES, "gnu"))
    index = index_shard(path)
    assert ["sparse" in damage.message for damage in index.damage] == [True]
    assert [sample.key for sample in index.samples] == ["s0", "s1", "s2", "s3"]


def test_hostile_headers_cost_no_time(path):
    """Half a million links, a megabyte of pax, and a name of 10 kB: seconds at most, memory by the file's size."""
    link = build([Entry("l.png", b"", kind=b"2")], "ustar")[:512]
    path.write_bytes(link * 20_000 + bytes(1024))
    begin = time.process_time()
    assert len(index_shard(path).ignored) == 20_000
    pax = b"".join(b"%d k%06d=v\n" % (13, i) for i in range(70_000))
    header = tarfile.TarInfo("x")
    header.size, header.type = len(pax), b"x"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + pax + bytes(-len(pax) % 512) + build(SAMPLES, "pax"))
    assert len(index_shard(path).samples) == 4
    assert time.process_time() - begin < 20


def test_a_member_of_five_gigabytes_is_found_and_never_read(path):
    size = 5 << 30
    header = tarfile.TarInfo("big.png")
    header.size = size
    try:
        with open(path, "wb") as file:
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.seek(512 + size)
            file.write(build(SAMPLES, "gnu"))
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    tracemalloc.start()
    index = index_shard(path)
    batches = list(read_batches(index, size=8, channels=3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert index.damage == [] and [sample.key for sample in index.samples] == ["big", "s0", "s1", "s2", "s3"]
    assert "5,368,709,120 bytes" in batches[0].errors[0]
    assert peak < 50 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


def test_a_shard_that_changes_is_an_error_and_no_signal(path):
    path.write_bytes(build(SAMPLES, "ustar"))
    [index] = index_shards(path)
    last = index.samples[-1].members[0]
    with ShardReader(path, index.size) as reader:
        path.write_bytes(build(SAMPLES, "ustar")[: last.data_offset + 3])
        with pytest.raises(InputError, match="changed after it was indexed"):
            reader.read(last)
    with pytest.raises(InputError, match=r"a\.tar: expected [\d,]+ bytes, found 6,659"):
        next(read_batches(index, size=8, channels=3))


def test_a_size_that_is_neither_octal_nor_positive_base_256_is_damage(tmp_path):
    """Found by the soak: a link whose size begins with another byte above 127, at which tarfile ends the archive."""
    link, last = Entry("b.png", b"", b"1", False), Entry("c.png", b"x", b"0", False)
    path = tmp_path / "a.tar"
    for first in range(128, 256):
        data = bytearray(build([link, last], "gnu"))
        data[124:136] = bytes([first]) + bytes(11)
        set_checksum(data)
        path.write_bytes(data)
        index = index_shard(path)
        assert [sample.key for sample in index.samples] == (["c"] if first == 128 else [])
        assert [damage.message for damage in index.damage] == (
            [] if first == 128 else ["not a tar header: its size field is no number"]
        )


def test_a_wiped_pax_header_is_damage(tmp_path):
    """Found by the soak: the name that it held was lost, and the short one in the member's own header taken."""
    data = bytearray(build([Entry("é.png", b"", b"0", False)], "pax"))
    data[512:1024] = bytes(512)
    (tmp_path / "a.tar").write_bytes(data)
    index = index_shard(tmp_path / "a.tar")
    assert not index.samples and [damage.message for damage in index.damage] == ["a malformed pax header"]
