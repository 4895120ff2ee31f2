"""A key that stands twice is found wherever it stands, and no other one for it."""

from __future__ import annotations

import builtins

import pyarrow as pa
import pytest

from diffprune import unique_keys
from diffprune.unique_keys import first_repeated, repeated_key

PARTS = [["a", "b", "c"], [], ["d", "é"], ["f"]]


def repeated(parts):
    return first_repeated([len(part) for part in parts], lambda part: parts[part])


@pytest.mark.parametrize("chunks", [[], [[]], [["a"]], PARTS])
def test_none(chunks):
    assert repeated(chunks) is None
    assert repeated_key(pa.chunked_array(chunks, pa.large_string())) is None


@pytest.mark.parametrize(("part", "key", "expected"), [(0, "c", 0), (2, "b", 0), (3, "é", 2), (3, "f", 3)])
def test_the_key_and_its_two_parts(part, key, expected):
    parts = [list(one) for one in PARTS]
    parts[part].append(key)
    assert repeated(parts) == (key, expected, part)
    assert repeated_key(pa.chunked_array(parts, pa.string())) == key


def test_of_several_the_first_that_comes_again():
    assert repeated([["a", "b"], ["b", "a"], ["a"]]) == ("b", 0, 1)


def test_equal_hashes_of_other_keys_are_no_repetition(monkeypatch):
    monkeypatch.setattr(unique_keys, "hash", lambda key: len(key), raising=False)
    assert builtins.hash is not unique_keys.hash
    assert repeated([["a", "b", "cc"], ["d"]]) is None
    assert repeated([["a", "b", "cc"], ["d", "cc", "b"]]) == ("cc", 0, 1)


def test_long_columns_are_looked_at_piece_by_piece(monkeypatch):
    monkeypatch.setattr(unique_keys, "_AT_A_TIME", 7)
    keys = [f"k{i}" for i in range(100)]
    assert repeated_key(pa.chunked_array([keys[:40], keys[40:]])) is None
    assert repeated_key(pa.chunked_array([keys[:40], [*keys[40:], "k39"]])) == "k39"
