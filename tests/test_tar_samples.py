"""Samples in arrays are the samples of the objects that they stand for."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprune.tar_samples import Member, Sample, SampleList

quick = settings(deadline=None, derandomize=True)
sizes = st.integers(0, 5_000)
spellings = st.sampled_from(["png", "PNG", "cls", "seg.png", "", "ſ"])
groups = st.lists(st.tuples(st.text("ab/é", max_size=5), st.lists(st.tuples(spellings, sizes), min_size=1)), max_size=9)


def laid_out(found: list[tuple[str, list[tuple[str, int]]]], start: int = 0) -> list[Sample]:
    """Samples one after the other, each member behind one header."""
    samples, offset = [], start
    for number, (key, pieces) in enumerate(found):
        members = []
        for spelt, size in pieces:
            members.append(Member(f"{key}.{spelt}", spelt.lower(), offset, offset + 512, size))
            offset = members[-1].end
        samples.append(Sample(key, number, tuple(members)))
    return samples


def listed(samples: list[Sample]) -> SampleList:
    members = [member for sample in samples for member in sample.members]
    spelt = [member.name[-len(member.extension) or len(member.name) :] for member in members]
    names = sorted(set(spelt))
    columns = [(names.index(one), *member[2:], 7) for one, member in zip(spelt, members, strict=True)]
    first, count = [], 0
    for sample in samples:
        first.append(count)
        count += len(sample.members)
    rows = [list(column) for column in zip(*columns, strict=True)] or [[], [], [], [], []]
    return SampleList([sample.key for sample in samples], first, names, rows)


@quick
@given(groups)
def test_each_sample_is_what_was_put_in(found) -> None:
    samples = laid_out(found, start=2**40)
    packed = listed(samples)
    assert list(packed) == samples and packed == samples and len(packed) == len(samples)
    assert packed.keys == [sample.key for sample in samples]
    assert [packed[row] for row in range(len(samples))] == samples
    assert [span.tolist() for span in packed.spans()] == [
        [sample.offset for sample in samples],
        [sample.size for sample in samples],
    ]
    assert packed[1:4] == samples[1:4] and packed[::-2] == samples[::-2]
    assert list(pickle.loads(pickle.dumps(packed))) == samples
    again = SampleList.of_table(packed.table())
    assert list(again) == samples and again.digest() == packed.digest()


@quick
@given(groups, st.sets(st.text("ab/é", max_size=5)))
def test_some_keep_their_numbers(found, keys) -> None:
    samples = laid_out(found)
    some = listed(samples).only(keys)
    assert list(some) == [sample for sample in samples if sample.key in keys]
    assert list(some.only({"a"})) == [sample for sample in samples if sample.key in keys & {"a"}]


def test_other_samples_are_not_equal() -> None:
    samples = laid_out([("a", [("png", 1)]), ("b", [("png", 2)])])
    packed = listed(samples)
    assert packed != samples[:1] and packed != samples[::-1] and packed != listed(samples[:1]) and packed != 3
    assert packed[-1] == samples[1] == packed[1]
    for beyond in (2, -3):
        with pytest.raises(IndexError):
            packed[beyond]


def test_more_than_are_made_at_a_time() -> None:
    samples = laid_out([(f"{i:05d}", [("jpg", i), ("cls", 1)]) for i in range(2500)])
    assert list(listed(samples)) == samples


def test_a_hundred_bytes_each() -> None:
    """What one process needs for the index of 100 million images: below 10 GB."""
    n = 5000
    keys, first, members = [f"{i:08d}" for i in range(n)], np.arange(n) * 2, np.zeros((5, 2 * n), np.int64)
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    packed = SampleList(keys, first, ["jpg"], members)
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert len(packed) == n and held < 100 * n, held
