"""The walk over plain headers in C++ and in Python: the same members, samples and stops, whatever the window."""

from __future__ import annotations

import io
import itertools
import tarfile
from importlib.util import find_spec
from types import ModuleType

import pytest
from tar_mutations import BLOCK, Entry, build, set_checksum

from diffprune import tar_members
from diffprune.tar_index import index_tar
from diffprune.tar_members import PythonMembers, new_members

WHOLE = 1 << 20
needs_cpp = pytest.mark.skipif(not find_spec("diffprune._cpu"), reason="diffprune._cpu was not built")


def entries(*names: str) -> list[Entry]:
    return [Entry(name, bytes([65 + i]) * (i * 301)) for i, name in enumerate(names)]


PLAIN = entries("a.png", "a.cls", "a.JSON", "b/c.png", "b/c.seg.png", "d.cls")


def index(data: bytes, members, windows=(4096, 1024, 2000)):
    return index_tar(lambda offset, size: data[offset : offset + size], len(data), windows, members)


@needs_cpp
def test_the_compiled_walk_is_what_runs():
    assert not isinstance(new_members(), PythonMembers)


@pytest.fixture
def nothing_loaded():
    tar_members._compiled.cache_clear()
    yield
    tar_members._compiled.cache_clear()


def test_without_the_extension_python_walks(monkeypatch, nothing_loaded):
    monkeypatch.setattr(tar_members, "find_spec", lambda name: None)
    assert isinstance(new_members(), PythonMembers)


@pytest.mark.parametrize("error", [ImportError("no such symbol"), None], ids=["of another machine", "of before"])
def test_an_extension_that_does_not_fit_is_told(monkeypatch, nothing_loaded, error):
    def load(name):
        if error:
            raise error
        return ModuleType(name)

    monkeypatch.setattr(tar_members, "find_spec", lambda name: True)
    monkeypatch.setattr(tar_members, "import_module", load)
    with pytest.warns(UserWarning, match="another machine or version .*: install again"):
        assert isinstance(new_members(), PythonMembers)


def test_an_extension_without_stamps_is_told(monkeypatch, nothing_loaded):
    class TarMembers:
        def add(self, name, header_offset, data_offset, size):
            """add(self, name, header_offset, data_offset, size)"""

    module = ModuleType("_cpu")
    module.TarMembers = TarMembers
    monkeypatch.setattr(tar_members, "import_module", lambda name: module)
    with pytest.warns(UserWarning, match="no stamps.*: install again"):
        assert isinstance(new_members(), PythonMembers)


def kind_trusting(kind, header: bytes):
    members = kind()
    members.trust(header)
    return members


@pytest.mark.parametrize("kind", [new_members, PythonMembers])
def test_plain_headers_are_taken_up_to_the_end_of_the_window(kind):
    data = build(PLAIN, "ustar")
    whole, _, _ = index(data, PythonMembers())
    places = [member for sample in whole for member in sample.members]
    members = kind()
    assert members.take(data, 0, 0, len(data)) == (0, 0)  # nobody has looked at its owner yet
    members.trust(data[:BLOCK])
    window = data[: places[3].header_offset + BLOCK - 1]  # the fourth header is not whole
    assert members.take(window, 0, 0, len(data)) == (places[3].header_offset, 2 * BLOCK + BLOCK)
    assert members.take(window, 0, places[3].header_offset, len(data)) == (places[3].header_offset, 0)
    base = places[3].header_offset - 7  # a window that does not begin at a header
    end, widest = members.take(data[base:], base, base + 7, len(data))
    assert end == places[-1].end and widest == max(m.end - m.header_offset for m in places[3:])
    first = places[1]
    small = data[first.header_offset : first.header_offset + 2 * BLOCK] + data[:BLOCK]  # a wide gap, then a narrow one
    assert kind_trusting(kind, data).take(small, 0, 0, WHOLE) == (3 * BLOCK, 2 * BLOCK)
    assert [member[:4] for member in members.all()] == [
        (m.name, m.header_offset, m.data_offset, m.size) for m in places
    ]


NAMES = {
    "plain": [entry.name for entry in PLAIN],
    "no extension": ["a.png", "b", "c.png"],
    "begins with a dot": ["a.png", ".hidden", "x/.y", "c.png"],
    "meta": ["__meta__/a.png", "b.png", "__x.png"],
    "letters": ["é.png", "é.cls", "b.ü", "b.Ü"],
    "control characters": ["a\tb.png", "c.png", "d.\x1f"],
    "delete is none of them": ["a\x7fb.png"],
    "an extension twice": ["a.png", "a.PNG", "a.cls"],
    "a key twice": ["a.png", "b.png", "a.cls"],
    "dots": ["a..png", "a.", "b.tar.gz", "x.y/z.png", "x.y/z"],
    "names as long as their field": ["a.png", "k" * 96 + ".png", "l" * 96 + ".cls", "m" * 97 + ".cls"],
    "keys that begin alike": ["a.png", "aa.png", "a/a.png"],
    "a member each": ["a.png", "b.cls", "c.json"],
    "nothing": [],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("fmt", ["ustar", "gnu", "pax"])
def test_names(names, fmt):
    data = build(entries(*names), fmt)
    found = index(data, new_members())
    for windows in itertools.product((512, 1500, WHOLE), (512, 3000), (100, WHOLE)):
        for members in (PythonMembers(), new_members()):
            again = index(data, members, windows)
            assert again == found and again[0].digest() == found[0].digest()


@pytest.mark.parametrize("fmt", ["ustar", "gnu", "pax"])
@pytest.mark.parametrize("kind", [new_members, PythonMembers])
def test_a_digest_tells_labels_and_times_apart(kind, fmt):
    def digest(label: bytes = b"3", image: bytes = bytes(700), mtime: float = 0, name: str = "a.png") -> str:
        file = io.BytesIO()
        formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
        with tarfile.open(fileobj=file, mode="w", format=formats[fmt]) as tar:
            for member, data in ((name, image), ("a.cls", label), ("b.png", bytes(100))):
                info = tarfile.TarInfo(member)
                info.size, info.mtime = len(data), mtime if fmt == "pax" else int(mtime)
                tar.addfile(info, io.BytesIO(data))
        return index(file.getvalue(), kind())[0].digest()

    first = digest()
    assert digest(b"3") == first and len(first) == 32
    others = [digest(b"7"), digest(mtime=1), digest(image=bytes(701)), digest(name="A.png"), digest(name="a.PNG")]
    others += [digest(mtime=0.2), digest(mtime=0.3)] if fmt == "pax" else []  # the header alone says 0
    assert len({first, *others}) == 1 + len(others)
    assert digest(image=b"x" * 700) == first, "larger data of one size and time are not looked at, as the docs say"


FIELDS = {
    "size in spaces": (124, b"        303 "),
    "size of eleven digits and a space": (124, b"00000000303 "),
    "size with a letter after it": (124, b"00000000303x"),
    "size of an 8": (124, b"00000000308\0"),
    "size in base 256": (124, b"\x80" + (303).to_bytes(11, "big")),
    "size over the end": (124, b"77777777777\0"),
    "time in spaces": (136, b"          1 "),
    "time of a 9": (136, b"00000000009\0"),
    "another mode": (100, b"0000600\0"),
    "a mode that is no number": (100, b"mode\0\0\0\0"),
    "an old regular file": (156, b"\0"),
    "a contiguous one": (156, b"7"),
    "a link": (156, b"2"),
    "a prefix": (345, b"folder\0"),
    "no name": (0, b"\0"),
    "no UTF-8": (0, b"\xff.png\0"),
    "a device": (329, b"0000001\0"),
    "a byte over 127": (500, b"\x90"),
    "padding that counts": (505, b"\x7f"),
}
SUMS = {
    "as tar writes it": b"%06o\0 ",
    "the other way round": b"%06o \0",
    "two NULs": b"%06o\0\0",
    "seven digits": b"%07o\0",
    "in spaces": b"%6o\0 ",
    "a letter behind it": b"%06o\0x",
    "a letter in it": b"%06ox ",
    "eight digits": b"%08o",
}


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("sum_format", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("change", [None, *FIELDS.values()], ids=["as it is", *FIELDS])
def test_headers(place, sum_format, change):
    """Of the first, second or fourth member."""
    data = bytearray(build(PLAIN, "ustar"))
    whole, _, _ = index(bytes(data), PythonMembers())
    at = [member.header_offset for sample in whole for member in sample.members][place]
    if change:
        start, value = change
        data[at + start : at + start + len(value)] = value
    set_checksum(data, at)
    number = int(data[at + 148 : at + 154], 8)
    for total in (number, number - 1, number + 1):
        data[at + 148 : at + 156] = sum_format % total
        found = index(bytes(data), new_members())
        assert found == index(bytes(data), PythonMembers())
        assert total == number or found[1], "a checksum that is wrong"


def of_owners(numbers: range) -> bytes:
    data, header = bytearray(), bytearray(build([Entry("a.cls", b"")], "ustar")[:BLOCK])
    for number in numbers:
        header[:10] = b"%05d.cls\0" % number
        header[108:116] = b"%07o\0" % number
        set_checksum(header)
        data += header
    return bytes(data)


@pytest.mark.parametrize("kind", [new_members, PythonMembers])
def test_only_so_many_owners_are_remembered_and_all_are_taken(kind):
    """A tar of nothing but owners does not fill the memory."""
    data, members = of_owners(range(10_100)), kind()
    for start in range(0, len(data), BLOCK):
        members.trust(data[start : start + BLOCK])
    assert members.take(data, 0, 0, len(data))[0] == 10_000 * BLOCK
    samples, damage, _ = index(data + bytes(1024), kind())
    assert len(samples) == 10_100 and damage == []
