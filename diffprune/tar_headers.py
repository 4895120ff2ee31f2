"""What the fields of a tar's 512-byte header say, as ``tarfile``, and so webdataset, reads them."""

from __future__ import annotations

import re
from zlib import adler32, crc32

SPARSE = ord("S")
SMALL = 512  # data of so many bytes, such as a label, are part of a member's stamp
_NO_SUM = -(1 << 30)  # that no header has
_OCTAL = re.compile(rb"\s*[0-7]*\s*")


def name_of(header: bytes) -> str | None:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[156] != SPARSE:  # as tarfile, and so webdataset, joins them: whatever the header's magic
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name
    return text_of(name)


def text_of(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _octal(field: bytes) -> int | None:
    digits = field.rstrip(b" \0").lstrip(b" ")  # a NUL ends a field: nothing may follow it
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def number_of(field: bytes) -> int | None:
    """A numeric header field: octal text, or base 256 after a byte 128 (GNU); empty is 0, negative ones are none."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    return _octal(field) if field.strip(b" \0") else 0


def is_number(field: bytes) -> bool:
    """Whether ``tarfile`` can read a field that means nothing here, so that it is a header's: octal, or base 256."""
    return field[0] in b"\x80\xff" or bool(_OCTAL.fullmatch(field.partition(b"\0")[0]))


def pax_fields(body: bytes) -> dict[str, str] | None:
    """The records of a pax extended header (``length key=value\\n``), or None if malformed."""
    fields: dict[str, str] = {}
    position = 0
    if body and not body.strip(b"\0"):  # wiped: the name that it held is lost
        return None
    body = body.rstrip(b"\0")
    while position < len(body):
        digits, space, _ = body[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            return None
        end = position + int(digits)
        record = body[position + len(digits) + 1 : end]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        text = text_of(value)
        if not key or not equals or end > len(body) or not record.endswith(b"\n") or text is None:
            return None
        fields[key.decode("latin-1")] = text
        position = end
    return fields


def stamp_of(header: bytes, data: bytes, extended: int = 0) -> int:
    """What tells a member from another one of its name and place: a CRC of its time of change and its data if SMALL.

    ``extended``: the CRC of what extended headers say of it. Relabelled samples keep all sizes, and many programs write
    the time 0 into every header.
    """
    return crc32(data, crc32(header[136:148], extended))


def checksum_is_right(header: bytes, sums: dict[bytes, int]) -> bool:
    """Whether a header's bytes add up to what it says; ``sums`` is a cache: checksum field -> the sum of all bytes."""
    stored = header[148:156]
    expected = sums.get(stored)
    if expected is None:
        number = number_of(stored)  # the field itself counts as spaces
        expected = sums[stored] = _NO_SUM if number is None else number + sum(stored) - 8 * 32
    # the low half of Adler-32 is 1 + the sum of the bytes, exact for 256 bytes, and much faster than any other sum
    found = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    return found == expected or found - 256 * _high(header) == expected - 256 * _high(stored)  # some sum signed bytes


def _high(data: bytes) -> int:
    return sum(byte > 127 for byte in data)
