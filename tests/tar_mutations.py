"""Hostile tars: what a shard may hold, how it is then damaged, and what the header index has to make of it.

``check`` is what both the fuzzer in test_shards_fuzz.py and the long run in soak/fuzz_shards.py call.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from diffprune.decode import DecodeError
from diffprune.pixels import Decoding
from diffprune.shards import Member, ShardIndex, ShardReader, index_shard
from diffprune.tar_index import index_tar
from diffprune.tar_members import PythonMembers

BLOCK = 512
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

STEMS = [
    "a",
    "b",
    "000001",
    "x/y",
    "x/.z",
    "/etc/passwd",
    "../../up",
    "d.dir/k",
    "__meta__/k",
    "é",
    "𝔘",
    "n\x00ul",
    "t\tab",
]
STEMS += ["", ".", "k" * 120, "folder/" * 30 + "k", "long" * 2500]
EXTENSIONS = [".png", ".jpg", ".cls", ".json", ".PNG", ".seg.png", ".", "", "/"]
TYPES = [b"0"] * 12 + [b"\0", b"7", b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"V", b"\xff"]
FILLINGS = [
    b"",
    b"7",
    b"{}",
    b"\0" * 700,
    b"x" * 511,
    b"y" * 512,
    b"z" * 1300,
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
]


@dataclass(frozen=True)
class Entry:
    name: str
    data: bytes
    kind: bytes = b"0"
    latin: bool = False  # names as Latin-1 instead of UTF-8


entries = st.builds(
    Entry,
    name=st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(EXTENSIONS)),
    data=st.sampled_from(FILLINGS),
    kind=st.sampled_from(TYPES),
    latin=st.sampled_from([False] * 9 + [True]),
)
good_samples = st.integers(1, 4).map(
    lambda count: [Entry(f"s{i:03d}{ext}", bytes([i]) * (i * 301)) for i in range(count) for ext in (".png", ".cls")]
)
contents = st.one_of(good_samples, st.lists(entries, max_size=7))


def build(items: list[Entry], fmt: str) -> bytes:
    """A tar as Python's tarfile writes it, with names and types that it would not choose itself."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[fmt], encoding="utf-8") as tar:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.type, info.size, info.linkname = item.kind, len(item.data), "/etc/passwd" if item.kind in b"12" else ""
            encoding = "latin-1" if item.latin else "utf-8"
            try:
                header = info.tobuf(FORMATS[fmt], encoding, "surrogateescape")
            except (ValueError, UnicodeError):  # too long for this format, or no such letter
                continue
            tar.fileobj.write(header)
            if item.kind not in b"123456":
                tar.fileobj.write(item.data + bytes(-len(item.data) % BLOCK))
    return buffer.getvalue()


# a mutation is (what, where, how much): where and how much are fractions of the file
mutations = st.lists(
    st.tuples(
        st.sampled_from(
            ["flip", "byte", "cut", "zero", "insert", "delete", "swap", "repeat", "join", "field", "size", "sum"]
        ),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
    ),
    max_size=3,
)
FIELDS = [(0, 100), (124, 12), (148, 8), (156, 1), (482, 1)]  # those that tarfile reads as the standard says
VALUES = [
    b"",
    b"9" * 11,
    b"-1",
    b"0o17",
    b"1_0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b" 12 ",
    "²".encode(),
    b"77777777777",
]


def set_checksum(data: bytearray, at: int = 0) -> None:
    """Make the checksum of the header there right."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def mutate(data: bytes, steps: list[tuple[str, float, float]]) -> bytes:
    """Damage a tar in the given steps; "field", "size" and "sum" leave a valid checksum, as an attacker would."""
    for what, where, much in steps:
        at = int(where * min(len(data), len(data.rstrip(b"\0")) + 1024))  # not in a record's padding, mostly
        block = at // BLOCK * BLOCK
        if what == "cut":
            data = data[:at]
        elif what == "join":
            data = data + data
        elif not data:
            continue
        elif what == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << int(much * 8)]) + data[at + 1 :]
        elif what == "byte":
            data = data[:at] + bytes([int(much * 256)]) + data[at + 1 :]
        elif what == "zero":
            end = block + BLOCK * (1 + int(much * 3))
            data = data[:block] + bytes(len(data[block:end])) + data[end:]
        elif what == "insert":
            data = data[:at] + bytes([int(much * 256)]) * int(much * 1025) + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + int(much * 1025) :]
        elif what in ("swap", "repeat"):
            other = int(much * len(data)) // BLOCK * BLOCK
            first, second = data[block : block + BLOCK], data[other : other + BLOCK]
            data = data[:block] + second + data[block + BLOCK :]
            if what == "swap":
                data = data[:other] + first + data[other + BLOCK :]
        else:
            start, width = FIELDS[int(much * len(FIELDS))] if what == "field" else (124, 12)
            value = VALUES[int(much * 997) % len(VALUES)][:width]
            header = bytearray(data[block : block + BLOCK].ljust(BLOCK, b"\0"))
            header[start : start + width] = value.ljust(width, b"\0")
            set_checksum(header)
            data = data[:block] + bytes(header) + data[block + BLOCK :]
    return data


ACCIDENTS = {"flip", "byte", "cut", "zero"}


def check(path: Path, items: list[Entry], fmt: str, steps: list[tuple[str, float, float]]) -> str:
    """Build, mutate, index, read; raise AssertionError where a promise is broken. Returns what became of it."""
    original = build(items, fmt)
    path.write_bytes(original)
    before = index_shard(path)
    data = mutate(original, steps)
    path.write_bytes(data)
    index = index_shard(path)
    outcome = check_index(index, data)
    if not before.damage and {what for what, _, _ in steps} <= ACCIDENTS:
        _nothing_is_lost(index, data, before, original)
    return outcome


def check_index(index: ShardIndex, data: bytes) -> str:
    """The promises about any bytes whatever; what became of them."""
    _is_consistent(index, data)
    _python_finds_the_same(index, data)
    if not index.damage:
        _agrees_with_tarfile(index, data)
    _every_sample_can_be_asked_for(index)
    return "damage told" if index.damage else "still whole" if index.samples else "no sample"


def _is_consistent(index: ShardIndex, data: bytes) -> None:
    """Samples in order, apart from each other, within the file, each behind a header with a right checksum."""
    assert [sample.index for sample in index.samples] == list(range(len(index.samples)))
    end = 0
    for sample in index.samples:
        assert sample.key and sample.members
        assert sample.offset >= end, "samples overlap"
        place = sample.offset
        for member in sample.members:
            assert member.header_offset >= place, "members overlap"
            assert member.data_offset + member.size <= len(data), "a member beyond the end of the file"
            header = data[member.data_offset - BLOCK : member.data_offset]
            assert _stored_sum(header) in _sums(header), "an invented header"
            place = member.end
        end = place
        assert len({member.extension for member in sample.members}) == len(sample.members)
    assert all(0 <= damage.offset <= len(data) for damage in index.damage)


def _python_finds_the_same(index: ShardIndex, data: bytes) -> None:
    """What C++ takes of the headers changes nothing, nor does how much is read at a time."""
    if data:
        found = index_tar(
            lambda offset, size: data[offset : offset + size], len(data), (1024, 512, 700), PythonMembers()
        )
        assert found == (index.samples, index.damage, index.ignored)


def _stored_sum(header: bytes) -> int | None:
    field = header[148:156].strip(b" \0") or b"0"
    return int(field, 8) if re.fullmatch(rb"[0-7]+", field) else None


def _sums(header: bytes) -> tuple[int, int]:
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 32
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in rest)


def _agrees_with_tarfile(index: ShardIndex, data: bytes) -> None:
    """Of an archive in which nothing is wrong, every regular file is in a sample or listed, just as tarfile has it."""
    expected = Counter()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if member.isreg():
                    expected[member.name, member.offset_data, member.size] += 1
            rest = data[tar.offset :]
        assert not rest.strip(b"\0") and 2 * BLOCK <= len(rest) <= 22 * BLOCK, "not the end of an archive"
    except tarfile.ReadError:  # its first header is none to tarfile: then nothing may be found here either
        assert not expected
    found = Counter((m.name, m.data_offset, m.size) for sample in index.samples for m in sample.members)
    lost = {name for name, _, _ in (expected - found)}
    told = {text.rpartition(" (")[0] for text in index.ignored}
    assert lost <= told, f"lost and not told: {lost - told}"
    assert not found - expected, f"invented: {found - expected}"


def _nothing_is_lost(index: ShardIndex, data: bytes, before: ShardIndex, original: bytes) -> None:
    """A sample that was whole before an accident is still there, or damage is told no later than at its end.

    Three exceptions, which nothing in a tar tells. All from one of its members on became zeros, and few enough:
    padding. Other letters in a name longer than a header holds, which no checksum covers: then its members' data have
    to be there under whatever name. And changes to a header that leave its sum: a checksum is no more than that.
    """
    found = {(sample.key, sample.offset, sample.size): sample for sample in index.samples}
    members = {(member.data_offset, member.size) for sample in index.samples for member in sample.members}
    for sample in before.samples:
        end = sample.offset + sample.size
        still = found.get((sample.key, sample.offset, sample.size))
        told = any(damage.offset <= end for damage in index.damage)
        last = sample.members[-1].header_offset
        zeroed = not data[last:].strip(b"\0") and len(data) - last <= 11 * 1024
        renamed = any(_extended(data, member) != _extended(original, member) for member in sample.members) and (
            members.issuperset((member.data_offset, member.size) for member in sample.members)
        )
        same_sum = any(_changed_but_for_the_sum(data, original, member) for member in sample.members)
        whole = still is not None and still.members == sample.members
        assert whole or told or zeroed or renamed or same_sum, f"{sample.key!r} lost"


def _changed_but_for_the_sum(data: bytes, original: bytes, member: Member) -> bool:
    own = slice(member.data_offset - BLOCK, member.data_offset)
    header = data[own]
    return header != original[own] and len(header) == BLOCK and _stored_sum(header) in _sums(header)


def _extended(data: bytes, member: Member) -> bytes:
    """What stands before a member's own header: extended headers and what they hold, such as a long name."""
    return data[member.header_offset : member.data_offset - BLOCK]


def _every_sample_can_be_asked_for(index: ShardIndex) -> None:
    """Its bytes are read, and its image decodes or says why not."""
    decoding = Decoding(size=4, max_pixels=10_000)
    with ShardReader(index.path) if index.size else io.BytesIO() as reader:
        for sample, members in reader.samples(index.samples) if index.samples else ():
            assert {name: len(data) for name, data in members.items()} == {m.extension: m.size for m in sample.members}
            for image in sample.images():
                try:
                    pixels, _ = decoding.decode(members[image.extension])
                    assert pixels.shape == (3, 4, 4)
                except DecodeError as error:
                    assert str(error)
